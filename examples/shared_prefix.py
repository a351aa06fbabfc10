"""Prefix caching: questions about one long text compute that text once."""

from nanovllm import LLM, SamplingParams

TEXT = "The lighthouse keeper wrote down the weather every evening for forty years. " * 40
llm = LLM("smollm2", max_model_len=2048)
params = SamplingParams(temperature=0, max_tokens=16)
for question in ("Who wrote?", "What was written down?", "For how long?"):
    (output,) = llm.generate([f"{TEXT}\nQuestion: {question}\nAnswer:"], params, use_tqdm=False)
    metrics = output.metrics
    print(
        f"{question:24} {len(output.prompt_token_ids)} prompt tokens, "
        f"{output.num_cached_tokens} cached, first token after "
        f"{(metrics.first_token_time - metrics.arrival_time) * 1e3:.0f} ms"
    )
