"""Structured outputs: do they all validate, and what does a constrained token cost the host?

    python benchmarks/structured.py [--model smollm2] [--num-outputs 240]

Samples at temperature 1 from many schemas, regexes, choices and grammars at once. An output cut by
max_tokens is no whole output and is counted apart. Then replays the outputs through the core's part
of the work, 32 at a time: mask, plan transport (encode, decode), accepting the token;
in CPU time of all threads, best of five, each with a lexer that has to warm up. Last, what the
masks of a batch take by the clock, in the loop and from a thread of their own (`--num-outputs 0`:
only this, without a model).
"""

import argparse
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from typing import Any

import jsonschema
import msgspec
import numpy as np

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.core.grammar import Grammar, GrammarCompiler, Matcher
from nanovllm.core.kept_masks import SentMasks
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.plan import StepMasks, WorkerInfo

BATCH = 32
Check = Callable[[str], bool]
Row = tuple[Matcher, list[int]]  # and the tokens it is to accept


def text(longest: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": longest}


def record(**properties: Any) -> dict[str, Any]:
    """All properties required, no others allowed."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PERSON = record(name=text(30), age={"type": "integer", "minimum": 0, "maximum": 120})
WEATHER = record(
    city=text(20),
    unit={"enum": ["celsius", "fahrenheit"]},
    degrees={"type": "number", "minimum": -60, "maximum": 140},
    rain={"type": "boolean"},
)
ORDER = record(
    id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    lines={
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": record(article=text(15), count={"type": "integer", "minimum": 1, "maximum": 99}),
    },
    note={"anyOf": [text(20), {"type": "null"}]},
)
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "left"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
MAIL = r"[a-z][a-z0-9._]{2,15}@[a-z]{3,12}\.(com|org|net)"
COLOURS = ["red", "green", "blue", "dark blue", "café au lait", "🟣 violet"]
SUM = 'start: number (" " ("+" | "-") " " number)~1..4\nnumber: /[1-9][0-9]?/'
SUM_PATTERN = r"[1-9][0-9]?( [+-] [1-9][0-9]?){1,4}"
BRACKETS = 'root ::= "(" item ")"\nitem ::= root | [a-z] | [a-z] [a-z]'


def is_valid(schema: dict[str, Any], output: str) -> bool:
    """Whether `output` is JSON and an instance of the schema."""
    try:
        jsonschema.validate(json.loads(output), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def matches(pattern: str, output: str) -> bool:
    return re.fullmatch(pattern, output) is not None


def is_bracketed(output: str) -> bool:
    inner = output.strip("()")
    depth = (len(output) - len(inner)) // 2
    return (
        depth > 0 and matches("[a-z]{1,2}", inner) and output == "(" * depth + inner + ")" * depth
    )


# What is asked for, the prompt, and an independent check.
CASES: dict[str, tuple[StructuredOutputsParams, str, Check]] = {
    **{
        name: (StructuredOutputsParams(json=schema), prompt, partial(is_valid, schema))
        for name, schema, prompt in (
            ("person", PERSON, "Invent a person, as JSON."),
            ("weather", WEATHER, "Report the weather of a city, as JSON."),
            ("order", ORDER, "Write an order of office supplies, as JSON."),
            ("tree", TREE, "Write a small tree of numbers, as JSON."),
        )
    },
    "json_object": (
        StructuredOutputsParams(json_object=True),
        "Answer with a very small JSON object.",
        partial(is_valid, {"type": "object"}),
    ),
    "date": (StructuredOutputsParams(regex=DATE), "When was it?", partial(matches, DATE)),
    "mail": (StructuredOutputsParams(regex=MAIL), "Your address?", partial(matches, MAIL)),
    "choice": (
        StructuredOutputsParams(choice=COLOURS),
        "Which colour?",
        COLOURS.__contains__,
    ),
    "lark": (StructuredOutputsParams(grammar=SUM), "Write a sum.", partial(matches, SUM_PATTERN)),
    "gbnf": (StructuredOutputsParams(grammar=BRACKETS), "Brackets, please.", is_bracketed),
}


def generate(model: str, num_outputs: int) -> dict[str, list[list[int]]]:
    """Sample, check, print; returns the token ids of each case's outputs."""
    llm = LLM(model, max_model_len=1024, max_num_seqs=64)
    chosen = list(islice(cycle(CASES), num_outputs))
    params = [
        SamplingParams(
            temperature=1.0, seed=seed, max_tokens=400, structured_outputs=CASES[name][0]
        )
        for seed, name in enumerate(chosen)
    ]
    conversations = [[{"role": "user", "content": CASES[name][1]}] for name in chosen]
    start = time.perf_counter()
    outputs = [output.outputs[0] for output in llm.chat(conversations, params)]
    seconds = time.perf_counter() - start
    llm.close()
    counts = {name: Counter[str]() for name in CASES}
    token_ids: dict[str, list[list[int]]] = {name: [] for name in CASES}
    for name, output in zip(chosen, outputs, strict=True):
        token_ids[name].append(output.token_ids)
        if output.finish_reason != "stop":
            counts[name]["cut"] += 1
        elif CASES[name][2](output.text):
            counts[name]["valid"] += 1
        else:
            counts[name]["invalid"] += 1
            print(f"INVALID {name}: {output.text!r}")
    for name, counted in counts.items():
        print(f"{name:12} {dict(counted)}")
    total = sum(counts.values(), Counter[str]())
    num_tokens = sum(len(output.token_ids) for output in outputs)
    print(f"\n{num_outputs} outputs, {num_tokens} tokens in {seconds:.1f} s: {dict(total)}")
    return token_ids


def make_compiler(model: str) -> GrammarCompiler:
    """With the model's vocabulary; prints how long it took."""
    tokenizer = Tokenizer.load(model)
    eos = tokenizer.eos_token_id
    info = WorkerInfo(
        device="none",
        dtype="none",
        attention_backend="none",
        architecture="none",
        num_blocks=0,
        max_model_len=0,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=[] if eos is None else [eos],
    )
    compiler = GrammarCompiler(tokenizer.to_json, info)
    start = time.perf_counter()
    compiler.load()
    seconds = time.perf_counter() - start
    print(f"\nvocabulary of {tokenizer.vocab_size} tokens loaded in {seconds:.2f} s")
    return compiler


def measure(compiler: GrammarCompiler, token_ids: dict[str, list[list[int]]]) -> None:
    """CPU time per constrained token, by kind of work, with a batch of 32 rows."""
    print(
        f"{'case':12} {'compile ms':>10} {'mask µs':>9} {'plan µs':>9} {'accept µs':>9} {'sum':>7}"
    )
    for name in CASES:
        start = time.perf_counter()
        compiler.compile(CASES[name][0])
        compile_ms = (time.perf_counter() - start) * 1e3
        batches = partial(make_batches, compiler, {name: token_ids[name]})
        print(f"{name:12} {compile_ms:10.1f} {columns(best(compiler, batches))}")
    batches = partial(make_batches, compiler, token_ids)
    print(f"{'all mixed':23} {columns(best(compiler, batches))}")


def make_batches(
    compiler: GrammarCompiler, token_ids: dict[str, list[list[int]]]
) -> list[list[Row]]:
    """32 rows of each case, with a lexer that nothing has warmed up; each batch has all cases."""
    rows: list[Row] = []
    for name, outputs in token_ids.items():
        first = compiler.compile(CASES[name][0])
        rows += [(first.matcher(), ids) for ids in islice(cycle(outputs), BATCH)]
    count = len(rows) // BATCH
    return [rows[start::count] for start in range(count)]


def best(
    compiler: GrammarCompiler, make: Callable[[], list[list[Row]]], num_runs: int = 5
) -> list[float]:
    """`replay` of all batches one after the other; the run with the smallest sum."""
    runs = []
    for _ in range(num_runs):
        times = [replay(compiler, batch) for batch in make()]
        runs.append([sum(one) / len(times) for one in zip(*times, strict=True)])
    return min(runs, key=sum)


def columns(times: list[float]) -> str:
    return " ".join(f"{one:9.1f}" for one in times) + f" {sum(times):7.1f}"


def replay(compiler: GrammarCompiler, rows: list[Row]) -> list[float]:
    """CPU microseconds per token to make masks, to send them, and to accept tokens."""
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(StepMasks)
    sent = SentMasks(vocab_size=len(compiler.vocabulary.spelling))
    seconds = [0.0, 0.0, 0.0]
    num_tokens = 0
    for step in range(max(len(ids) for _, ids in rows)):
        rows = [(matcher, ids) for matcher, ids in rows if step < len(ids)]
        times = [time.process_time()]
        lines, _, vocabulary = compiler.begin_masks([matcher for matcher, _ in rows]).result()
        times.append(time.process_time())
        masks = sent.pack(list(range(len(rows))), lines, vocabulary)
        decoder.decode(encoder.encode(masks))
        times.append(time.process_time())
        for matcher, ids in rows:
            matcher.accept(ids[step])
        times.append(time.process_time())
        seconds = [
            total + end - start
            for total, start, end in zip(seconds, times[:-1], times[1:], strict=True)
        ]
        num_tokens += len(rows)
    return [total / num_tokens * 1e6 for total in seconds]


def report_batches(compiler: GrammarCompiler) -> None:
    """Microseconds per row, by the clock, of the masks of a batch; medians over its steps.

    direct: the loop calls and waits. thread: another thread is asked and waited for at once, which
    is the least that computing them beside the loop costs more.
    """
    print(f"\n{'masks of':24} {'direct µs/row':>14} {'thread µs/row':>14} {'step ms':>8}")
    with ThreadPoolExecutor(1) as pool:
        for names in (["order"], list(CASES)):
            grammars = [compiler.compile(CASES[name][0]) for name in names]
            for num_rows in (1, 8, 64):
                times = batch_times(compiler, grammars, num_rows, pool)
                direct, thread = (statistics.median(each) / num_rows * 1e6 for each in times)
                what = f"{num_rows} rows, {len(names)} grammar{'s' * (len(names) > 1)}"
                print(f"{what:24} {direct:14.1f} {thread:14.1f} {direct * num_rows / 1e3:8.2f}")


def batch_times(
    compiler: GrammarCompiler, grammars: list[Grammar], num_rows: int, pool: ThreadPoolExecutor
) -> tuple[list[float], list[float]]:
    """Seconds per batch, of both ways in turn, while outputs of random tokens go on."""
    rng = np.random.default_rng(0)
    times: tuple[list[float], list[float]] = ([], [])

    def begin(row: int) -> Matcher:
        grammar = grammars[row % len(grammars)]
        if grammar.is_spent:
            grammar = grammars[row % len(grammars)] = grammar.renewed()
        if grammar.wants_lexer():
            grammar.add_lexer()
        return grammar.matcher()

    matchers = [begin(row) for row in range(num_rows)]
    for _ in range(120):
        for way in (0, 1):
            start = time.perf_counter()
            if way == 0:
                words = compiler.compute_masks(matchers)
            else:
                words = pool.submit(compiler.compute_masks, matchers).result()
            times[way].append(time.perf_counter() - start)
            bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
            for row, matcher in enumerate(matchers):
                if not matcher.accept(int(rng.choice(np.flatnonzero(bits[row])))):
                    matchers[row] = begin(row)
    return times[0][20:], times[1][20:]  # the first ones build the lexers


def main() -> None:
    """All parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--num-outputs", type=int, default=240)
    arguments = parser.parse_args()
    compiler = make_compiler(arguments.model)
    if arguments.num_outputs:
        measure(compiler, generate(arguments.model, arguments.num_outputs))
    report_batches(compiler)


if __name__ == "__main__":
    main()
