"""Answer a few prompts at once. The engine runs in a process of its own; no __main__ guard."""

from nanovllm import LLM, SamplingParams

llm = LLM("smollm2", max_model_len=2048)
questions = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Name three uses of a paper clip.",
]
conversations = [[{"role": "user", "content": question}] for question in questions]
outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=80))
for question, output in zip(questions, outputs, strict=True):
    print(f"\n> {question}\n{output.outputs[0].text}")
