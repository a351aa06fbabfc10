"""The official OpenAI client against `nanovllm serve` (start that first; `pip install openai`)."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Why is the sky blue? One sentence."}],
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"top_k": 20},  # vLLM's fields go here
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} → {chunk.usage.completion_tokens} tokens]")
