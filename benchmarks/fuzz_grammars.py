"""Random and hostile grammars: whatever is asked for, it costs its sender alone, and is answered.

    python benchmarks/fuzz_grammars.py [--count 5000] [--seed 0] [--plain]

Each goes through the sandbox, as in the core; what passes is compiled in this process and followed
for some tokens, which must not harm it. Prints how many were refused, for which kinds of reasons,
and the slowest answers. --plain: schemas that the core compiles without a trial (`plain_schema`),
in a sandbox with much less than usual. `POISONS` are those that are known to crash, exhaust or
stall llguidance.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanovllm.core import grammar_sandbox, plain_schema
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.grammar_sandbox import CAUSES, GrammarSandbox
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.sampling_params import StructuredOutputsParams

NUM_FOLLOWED = 20  # tokens of an output of each that passes
Wanted = dict[str, Any]  # keywords of `StructuredOutputsParams`


def chain(keyword: str, length: int) -> Wanted:
    """Definitions that each refer to the next, by `allOf`, `anyOf` …"""
    definitions: dict[str, Any] = {
        f"d{index}": {keyword: [{"$ref": f"#/$defs/d{index + 1}"}]} for index in range(length)
    }
    definitions[f"d{length}"] = {"type": "integer"}
    return {"json": {"$defs": definitions, "$ref": "#/$defs/d0"}}


def rules(length: int, name: str = "r") -> Wanted:
    """Lark rules that each are the next."""
    lines = [f"{name}{index}: {name}{index + 1}" for index in range(length)]
    return {"grammar": "\n".join([f"start: {name}0", *lines, f'{name}{length}: "a"'])}


def cycle_of_rules(length: int) -> Wanted:
    """Left recursion through all of them, in two interleaved ways."""
    lines = [
        f'a{index}: a{(index + 1) % length} a{(index * 7 + 3) % length} | "x"'
        for index in range(length)
    ]
    return {"grammar": "\n".join(["start: a0", *lines])}


def products(count: int) -> Wanted:
    """An `allOf` of `anyOf`s: three to the power of `count` combinations."""
    branch = [
        [{"type": "object", "properties": {f"a{i}_{j}": {"type": "string"}}} for j in range(3)]
        for i in range(count)
    ]
    return {"json": {"allOf": [{"anyOf": one} for one in branch]}}


# All are refused or fail by themselves; the comment says what they did without a sandbox.
POISONS: dict[str, Wanted] = {
    "allOf chain": chain("allOf", 900),  # stack overflow …
    "anyOf chain": chain("anyOf", 900),
    "oneOf chain": chain("oneOf", 900),
    "rule chain": rules(3000),
    "terminal chain": rules(5000, "R"),
    "left recursion": cycle_of_rules(400),
    "optional groups": {"regex": "a?" * 8000},  # … minutes, gigabytes …
    "alternations": {"regex": "(a|a)*" * 2600},
    "repeated nothing": {"regex": "(a*)*" * 3200},
    "multiples": {"json": {"type": "integer", "multipleOf": 1_000_003}},
    "products": products(12),  # … refused by llguidance's own limits …
    "intersections": {"grammar": "start: R\nR: /(.*a.{50})/ & /(.*b.{60})/ & ~/(.*c.{40})/"},
    "nested groups": {"regex": "(" * 4000 + "a" + ")" * 4000},
    "nested parentheses": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "overlapping patternProperties": {
        "json": {"patternProperties": {f"^(a|b)*c.*{i}$": {"type": "null"} for i in range(300)}}
    },
    "wide numbers": {"json": {"type": "number", "minimum": 1e-300, "maximum": 1e300}},
}
# These compile, and cost too much or reach a limit only as an output grows.
SLOW_POISONS: dict[str, Wanted] = {
    "ambiguous": {"grammar": 'start: x\nx: x x | x x x | "a" | ""'},
    "ambiguous options": {"grammar": 'start: x\nx: (x? x? x? x? x? x? x? x?) | "a"'},
    "nested repetitions": {
        "grammar": 'start: (((x~1..100)~1..100)~1..100)~1..100\nx: "a" | "(" x ")"'
    },
    "repetitions of repetitions": {
        "regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}",
    },
}


# ---- random ones


def random_wanted(rng: random.Random) -> Wanted:
    """A schema, a regex or a grammar; most are sound, some are not."""
    kind = rng.random()
    if kind < 0.5:
        return {"json": random_schema(rng, rng.randrange(1, 6))}
    if kind < 0.75:
        return {"regex": random_regex(rng, rng.randrange(1, 6))}
    if kind < 0.9:
        return {"grammar": random_lark(rng)}
    return {"grammar": mangled(rng, random_lark(rng))} if kind < 0.95 else mangled_schema(rng)


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    definitions = {f"d{index}": _schema(rng, depth) for index in range(rng.randrange(4))}
    return {**_schema(rng, depth), "$defs": definitions}


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    names = list(LEAVES) if depth <= 0 else [*LEAVES, *BRANCHES, *BRANCHES]
    name = rng.choice(names)
    found = LEAVES[name](rng) if name in LEAVES else BRANCHES[name](rng, depth - 1)
    if rng.random() < 0.1:
        found |= {"description": "…", "title": "t", "default": None}
    return found


def _number(rng: random.Random) -> float:
    return rng.choice([0, 1, -1, 7, 99, 12.5, 1e9, -1e18, 0.001, rng.randrange(-1000, 1000)])


def _count(rng: random.Random) -> int:
    return rng.choice([0, 1, 2, 3, 10, 100, 10_000, 10_000_000])


def _bounds(rng: random.Random, low: str, high: str, draw: Callable[..., float]) -> dict[str, Any]:
    first, second = sorted((draw(rng), draw(rng)))
    return rng.choice([{}, {low: first}, {high: second}, {low: first, high: second}])


LEAVES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "integer": lambda rng: {"type": "integer", **_bounds(rng, "minimum", "maximum", _number)},
    "number": lambda rng: {"type": "number", **_bounds(rng, "minimum", "maximum", _number)},
    "multiple": lambda rng: {"type": "integer", "multipleOf": rng.randrange(1, 3000)},
    "string": lambda rng: {"type": "string", **_bounds(rng, "minLength", "maxLength", _count)},
    "pattern": lambda rng: {"type": "string", "pattern": random_regex(rng, 3)},
    "format": lambda rng: {"type": "string", "format": rng.choice(["date", "uuid", "ipv6", "x"])},
    "enum": lambda rng: {"enum": [rng.choice([1, "a", None, [], {"k": "v"}]) for _ in range(5)]},
    "const": lambda rng: {"const": "".join(rng.choices('ab"\\é\n', k=rng.randrange(9)))},
    "boolean": lambda rng: {"type": rng.choice(["boolean", "null", ["string", "null"]])},
    "anything": lambda rng: {},
    "ref": lambda rng: {"$ref": rng.choice(["#", "#/$defs/d0", "#/$defs/d1", "#/$defs/d2"])},
    "odd": lambda rng: rng.choice([{"type": 5}, {"not": {}}, {"uniqueItems": True}, {"enum": []}]),
}
BRANCHES: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "object": lambda rng, depth: {
        "type": "object",
        "properties": {f"p{i}": _schema(rng, depth) for i in range(rng.randrange(6))},
        "required": [f"p{i}" for i in range(rng.randrange(4))],
        **rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": True}]),
    },
    "map": lambda rng, depth: {
        "type": "object",
        "patternProperties": {
            f"^{random_regex(rng, 2)}$": _schema(rng, depth) for _ in range(rng.randrange(1, 4))
        },
    },
    "array": lambda rng, depth: {
        "type": "array",
        "items": _schema(rng, depth),
        **_bounds(rng, "minItems", "maxItems", _count),
    },
    "tuple": lambda rng, depth: {
        "type": "array",
        "prefixItems": [_schema(rng, depth) for _ in range(rng.randrange(1, 4))],
        "items": False,
    },
    **{
        keyword: lambda rng, depth, keyword=keyword: {
            keyword: [_schema(rng, depth) for _ in range(rng.randrange(1, 4))]
        }
        for keyword in ("anyOf", "oneOf", "allOf")
    },
}


def random_regex(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(["a", "[a-z]", "[^x]", r"\d", r"\w", ".", "é", r"\p{Lu}", r"\.", "", "$"])
    inner = [random_regex(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    text = "".join(inner) if rng.random() < 0.6 else "(" + "|".join(inner) + ")"
    if rng.random() < 0.5:
        repeats = ["*", "+", "?", "{3}", "{2,5}", "{0,300}", "{1,100000}", "*?"]
        text = f"({text}){rng.choice(repeats)}"
    return text


def random_lark(rng: random.Random) -> str:
    """Rules that use one another in every way; some are ambiguous, some have no end."""
    names = ["start", *(f"r{index}" for index in range(rng.randrange(1, 8)))]

    def item() -> str:
        kind = rng.random()
        if kind < 0.4:
            found = rng.choice(names[1:])
        elif kind < 0.7:
            found = json.dumps(rng.choice(["a", "b", "(", ")", "é", " ", "ab"]))
        elif kind < 0.85:
            found = "/" + random_regex(rng, 2).replace("/", r"\/") + "/"
        else:
            found = f"({sequence()} | {sequence()})"
        return found + rng.choice(["", "", "", "?", "*", "+", "~2", "~1..40"])

    def sequence() -> str:
        return " ".join(item() for _ in range(rng.randrange(1, 4)))

    return "\n".join(
        f"{name}: " + " | ".join(sequence() for _ in range(rng.randrange(1, 4))) for name in names
    )


def mangled(rng: random.Random, text: str) -> str:
    """With some characters lost, repeated or exchanged."""
    letters = list(text)
    for _ in range(rng.randrange(1, 6)):
        index = rng.randrange(len(letters))
        letters[index] = rng.choice(["", letters[index] * 2, rng.choice('()[]{}|"/\\:~\n ')])
    return "".join(letters) or "x"


def mangled_schema(rng: random.Random) -> Wanted:
    schema = random_schema(rng, 3)
    for key in rng.sample(sorted(schema), k=min(2, len(schema))):
        schema[key] = rng.choice([None, [], {}, 3, "x", -1.5, [[]], {"type": "string"}])
    return {"json": schema}


def random_plain(rng: random.Random) -> Wanted:
    """A schema that needs no trial, often one near its limits."""
    while True:
        whole = _plain(rng, rng.randrange(1, plain_schema.MAX_DEPTH))
        schema = rng.choice([whole, random_defined(rng)])
        if plain_schema.plain_source(StructuredOutputsParams(json=schema)):
            return {"json": schema}


def random_defined(rng: random.Random) -> dict[str, Any]:
    """With definitions that refer to one another in any order, and an allowance for chance."""
    names = [f"d{index}" for index in range(rng.randrange(1, 6))]
    defined: dict[str, Any] = {
        name: rng.choice(
            [
                _plain(rng, rng.randrange(2)),
                {"anyOf": [{"$ref": f"#/$defs/{rng.choice(names)}"}, {"type": "null"}]},
                {"properties": {p: {"$ref": f"#/$defs/{rng.choice(names)}"} for p in "ab"}},
                {"items": {"$ref": f"#/$defs/{rng.choice(names)}"}},
            ]
        )
        for name in names
    }
    return {"$defs": defined, "properties": {name: {"$ref": f"#/$defs/{name}"} for name in names}}


def _plain(rng: random.Random, depth: int) -> dict[str, Any]:
    text = {"type": "string", **_bounds(rng, "minLength", "maxLength", _length)}
    whole = {"type": "integer", **_bounds(rng, "minimum", "maximum", _whole)}
    real = {"type": "number", **_bounds(rng, "minimum", "maximum", _whole)}
    listed = {"enum": [rng.choice(["", "a", "é\n", 7, None, True, "a" * 50]) for _ in range(9)]}
    kinds = {"type": ["string", "null", "number"]}
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([text, whole, real, listed, kinds, {}, {"type": "boolean"}])
    width = rng.choice([1, 2, 3, 8, 40] if depth == 1 else [1, 2, 3])
    properties = {f"p{'q' * rng.randrange(20)}{i}": _plain(rng, depth - 1) for i in range(width)}
    required = rng.sample(sorted(properties), rng.choice([0, width // 2, width]))
    items = {"items": _plain(rng, depth - 1), **_bounds(rng, "minItems", "maxItems", _few)}
    return rng.choice(
        [
            {"type": "object", "properties": properties, "required": required},
            {"properties": properties, "additionalProperties": False},
            {"type": "array", **items},
            {"anyOf": [text, {"type": "array", **items}, {"type": "null"}]},
            {"anyOf": [whole, {"properties": properties, "type": "object"}, listed]},
        ]
    )


def _length(rng: random.Random) -> float:
    return rng.choice([0, 1, 10, 100, plain_schema.MAX_LENGTH])


def _few(rng: random.Random) -> float:
    return rng.choice([0, 1, 2, 10, plain_schema.MAX_ITEMS])


def _whole(rng: random.Random) -> float:
    most = plain_schema.MAX_NUMBER
    return rng.choice([0, 1, -1, 99, most, -most, rng.randrange(-most, most)])


# ---- trying them


@dataclass
class Tally:
    """What came of them, and the slowest."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def note(self, outcome: str, seconds: float, wanted: Wanted) -> None:
        self.outcomes[outcome] += 1
        self.slowest = sorted([*self.slowest, (seconds, json.dumps(wanted)[:100])])[-5:]


def try_all(compiler: GrammarCompiler, count: int, seed: int) -> Tally:
    """Compile `count` random grammars, as the core does, and follow an output of each."""
    tally = Tally()
    rng = random.Random(seed)
    for _ in range(count):
        wanted = random_wanted(rng)
        start = time.perf_counter()
        try:
            outcome = follow(compiler, StructuredOutputsParams(**wanted), rng)
        except ValueError as error:
            outcome = refusal(str(error))
        tally.note(outcome, time.perf_counter() - start, wanted)
    return tally


def try_plain(sandbox: GrammarSandbox, count: int, seed: int) -> Tally:
    """Try `count` schemas that the core would not; none may need more than this sandbox has."""
    tally, rng = Tally(), random.Random(seed)
    for _ in range(count):
        wanted, start = random_plain(rng), time.perf_counter()
        try:
            sandbox.try_out(StructuredOutputsParams(**wanted))
            outcome = "passed"
        except ValueError as error:
            outcome = refusal(str(error))
            assert "sandbox" not in outcome, json.dumps(wanted)
        tally.note(outcome, time.perf_counter() - start, wanted)
    return tally


def refusal(cause: str) -> str:
    """By whom: the sandbox's bounds, or llguidance (or the checks before it) with an error."""
    bounds = [number.name for number, text in CAUSES.items() if text in cause]
    if bounds or "processor time" in cause:
        return "refused by the sandbox: " + (bounds[0] if bounds else "slow steps")
    assert "was killed" not in cause, cause
    return "refused: " + cause.split()[0].rstrip(":")


def follow(compiler: GrammarCompiler, wanted: StructuredOutputsParams, rng: random.Random) -> str:
    """Returns how an output of random tokens ended. Raises `ValueError`: refused."""
    matcher = compiler.compile(wanted).matcher()
    for _ in range(NUM_FOLLOWED):
        (words,) = compiler.compute_masks([matcher])
        if matcher.error is not None:
            return "an error on the way"
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        if not matcher.accept(int(rng.choice(np.flatnonzero(bits).tolist()))):
            return "whole" if matcher.error is None else "an error on the way"
    return "goes on"


def main() -> None:
    """Random ones, then a table."""
    from nanovllm.frontend.tokenizer import Tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.model)
    info = WorkerInfo(
        device="none",
        dtype="none",
        attention_backend="none",
        architecture="none",
        num_blocks=0,
        max_model_len=0,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=[0],
    )
    if arguments.plain:
        grammar_sandbox.STACK_BYTES //= 4
        grammar_sandbox.MEMORY_BYTES //= 4
    with GrammarSandbox(timeout_s=2.0) as sandbox:
        compiler = GrammarCompiler(tokenizer.to_json, info, sandbox=sandbox)
        compiler.load()
        start = time.perf_counter()
        if arguments.plain:
            tally = try_plain(sandbox, arguments.count, arguments.seed)
        else:
            tally = try_all(compiler, arguments.count, arguments.seed)
        seconds = time.perf_counter() - start
    for outcome, count in tally.outcomes.most_common():
        print(f"{count:6} {outcome}")
    for slow_s, text in reversed(tally.slowest):
        print(f"{slow_s:6.2f} s {text}")
    print(f"{arguments.count} grammars in {seconds:.0f} s; seed {arguments.seed}")


if __name__ == "__main__":
    main()
