"""Outputs that must match a JSON schema, a regular expression, a choice or a grammar."""

import json

from nanovllm import LLM, SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
ARITHMETIC = """
start: number (" " ("+" | "-" | "*") " " number)~1..4
number: /[1-9][0-9]?/
"""
TASKS = {
    "Describe a fictional person as JSON.": StructuredOutputsParams(json=PERSON),
    "Invent a phone number.": StructuredOutputsParams(regex=r"\+1 [2-9][0-9]{2}-[0-9]{3}-[0-9]{4}"),
    "Is 'I love this film' positive or negative?": StructuredOutputsParams(
        choice=["positive", "negative"]
    ),
    "Write a sum.": StructuredOutputsParams(grammar=ARITHMETIC),
}

llm = LLM("smollm2", max_model_len=2048)
conversations = [[{"role": "user", "content": task}] for task in TASKS]
params = [
    SamplingParams(temperature=0.7, max_tokens=200, seed=1, structured_outputs=wanted)
    for wanted in TASKS.values()
]
outputs = llm.chat(conversations, params)
for task, output in zip(TASKS, outputs, strict=True):
    print(f"\n> {task}\n{output.outputs[0].text}")
if outputs[0].outputs[0].finish_reason == "stop":
    print("\nParsed:", json.loads(outputs[0].outputs[0].text))
