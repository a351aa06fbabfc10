"""From `generate` to the first output, also beside another checkout of nanovllm.

    python benchmarks/first_output.py [--beside DIR] [--lives 6] [--rounds 40]

DIR is a work tree of another commit (`git worktree add DIR d7860ff`). An engine is an `AsyncLLM`
with a core that has no device (`load_format="synthetic"`), in a process of its own that is told
over a pipe what to ask for next. Engines take turns at every single request, each idle when it
begins, so that all meet the same machine. Where the kernel happens to put their threads makes more
difference than most commits do, so they are started anew for each life; and a second engine of this
checkout takes part, the control: what it differs by from the first means nothing.

Printed are milliseconds, the tenth and the median of all requests, and ratios: of the tenths and of
the medians, and of the processor time that engine and core took for a request, each the median of
the lives.

A synthetic model ignores grammars: it draws by a hash of the prompt. So each kind's prompt is one
of which it draws a token that the grammar allows.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from nanovllm.executor.synthetic import hash_tokens, scramble
from nanovllm.frontend.tokenizer import Tokenizer

VOCAB_SIZE = 49_152  # of SmolLM2
PAUSE_S = 0.003  # lets an engine fall asleep before it is asked
NUM_UNTIMED = 5  # rounds: they load what grammars need


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


def person(name: str) -> dict[str, Any]:
    """A schema of ordinary size, of which each name makes another one."""
    line = record(article=text(15), count={"type": "integer"})
    age = {"type": "integer", "minimum": 0, "maximum": 120}
    unit = {"enum": ["celsius", "fahrenheit"]}
    lines = {"type": "array", "items": line, "minItems": 1, "maxItems": 3}
    return record(**{name: text(30), "age": age, "unit": unit, "lines": lines})


def by_pydantic(name: str) -> dict[str, Any]:
    """As pydantic writes it for a model with a list of another one and an optional field."""
    line = {
        "title": "Line",
        "type": "object",
        "properties": {
            "article": {"title": "Article", "type": "string"},
            "count": {"title": "Count", "type": "integer"},
        },
        "required": ["article", "count"],
    }
    note = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Note"}
    return {
        "$defs": {"Line": line},
        "title": "Order",
        "type": "object",
        "properties": {
            name: {"title": "Name", "type": "string"},
            "lines": {"title": "Lines", "type": "array", "items": {"$ref": "#/$defs/Line"}},
            "note": note,
        },
        "required": [name, "lines"],
    }


def tree(name: str) -> dict[str, Any]:
    """Its definition refers to itself."""
    left = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    node = record(**{name: {"type": "integer"}, "left": left})
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


class Kind(NamedTuple):
    """first: the token that its outputs begin with. wanted: fields of `StructuredOutputsParams`
    for a number. is_text: the prompt has to be encoded."""

    name: str
    first: str
    wanted: Callable[[int], dict[str, Any]] | None = None
    is_text: bool = False


KINDS = [
    Kind("no grammar", "{"),
    Kind("no grammar, a text", "{", is_text=True),
    Kind("a schema seen before", "{", lambda n: {"json": person("name")}),
    Kind("a new schema", "{", lambda n: {"json": person(f"name{n}")}),
    Kind("a new schema by pydantic", "{", lambda n: {"json": by_pydantic(f"name{n}")}),
    Kind("a new recursive schema", "{", lambda n: {"json": tree(f"value{n}")}),
    Kind("a choice seen before", "red", lambda n: {"choice": ["red", "green", "blue"]}),
    Kind("a new choice", "red", lambda n: {"choice": ["red", "green", f"blue{n}"]}),
    Kind("a new regex", "x", lambda n: {"regex": f"x{n}-[a-z]{{2,15}}@[a-z]{{3,12}}\\.(com|org)"}),
]
TEXT = "The prompt of an ordinary request, which has to be encoded before it can be sent."


@cache
def prompt_of(token: str) -> dict[str, list[int]]:
    """A prompt after which the synthetic model draws this token, if it is greedy."""
    token_id = Tokenizer.load("smollm2").encode(token, add_special_tokens=False)[0]
    for first in itertools.count(1):
        begun = hash_tokens(np.array([first, 0], np.uint64))
        states = begun + np.arange(VOCAB_SIZE, dtype=np.uint64)
        drawn = scramble(states ^ scramble(np.zeros(1, np.uint64)))
        if len(found := np.flatnonzero(drawn % np.uint64(VOCAB_SIZE) == token_id)):
            return {"prompt_token_ids": [first, int(found[0])]}
    raise AssertionError("unreachable")


# ---- an engine of some checkpoint, which has its modules from PYTHONPATH


async def serve() -> None:
    """Answer each line {"prompt", "wanted"} by the seconds that its first output took."""
    from nanovllm import AsyncLLM, SamplingParams, StructuredOutputsParams

    commands = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    synthetic = {"load_format": "synthetic", "step_ms": 0, "vocab_size": VOCAB_SIZE}
    async with AsyncLLM("smollm2", tokenizer="smollm2", **synthetic) as llm:
        print("ready", flush=True)
        while line := await commands.readline():
            command = json.loads(line)
            wanted = command["wanted"] and StructuredOutputsParams(**command["wanted"])
            params = SamplingParams(temperature=0, max_tokens=1, structured_outputs=wanted)
            prompt = command["prompt"]
            await asyncio.sleep(PAUSE_S)
            started = time.perf_counter()
            async for _output in llm.generate(prompt, params):
                seconds = time.perf_counter() - started
            print(seconds, flush=True)


class Engine:
    """One of them, in a process of its own."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).resolve(), "--serve"],
            cwd=tree,  # its core looks for modules there first
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"
        self._pids: list[int] = []

    def ask(self, prompt: object, wanted: dict[str, Any] | None) -> tuple[float, float]:
        """Seconds from `generate` to the first output, and of processor time."""
        before = self._cpu_s()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "wanted": wanted}) + "\n")
        self._process.stdin.flush()
        return float(self._read()), self._cpu_s() - before

    def note_processes(self) -> None:
        """Which they are now: frontend, core and, after the first new grammar, its sandbox."""
        here = psutil.Process(self._process.pid)
        self._pids = [here.pid, *(one.pid for one in here.children(recursive=True))]

    def close(self) -> None:
        self._process.communicate("")

    def _cpu_s(self) -> float:
        # Linux: the number of another process's clock is made of its id.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self._pids)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"the engine has ended with {self._process.wait()}"
        return line


class Took(NamedTuple):
    """Requests of one kind, by one engine in one life: seconds and processor seconds of each."""

    seconds: list[float]
    cpu_s: list[float]

    @property
    def figures(self) -> tuple[float, float, float]:
        return (*tenths(self.seconds), statistics.median(self.cpu_s))


def tenths(values: list[float]) -> tuple[float, float]:
    """The first of them, and the fifth."""
    return sorted(values)[len(values) // 10], statistics.median(values)


def live(trees: list[Path], num_rounds: int) -> dict[str, list[Took]]:
    """Start an engine of each, ask all of them in turns. Returns what they took, by kind."""
    begin = random.randrange(10**6) * 10**3  # so that no schema is one of another run
    took = {kind.name: [Took([], []) for _ in trees] for kind in KINDS}
    with ExitStack() as stack:
        engines = [Engine(tree) for tree in trees]
        for engine in engines:
            stack.callback(engine.close)
        for number, kind in itertools.product(range(-NUM_UNTIMED, num_rounds), KINDS):
            wanted = None if kind.wanted is None else kind.wanted(begin + number)
            prompt = TEXT if kind.is_text else prompt_of(kind.first)
            for index in random.sample(range(len(engines)), len(engines)):
                seconds, cpu_s = engines[index].ask(prompt, wanted)
                if number < 0:
                    engines[index].note_processes()
                else:
                    took[kind.name][index].seconds.append(seconds)
                    took[kind.name][index].cpu_s.append(cpu_s)
    return took


def report(lives: list[dict[str, list[Took]]], *, is_beside: bool) -> None:
    print(
        " " * 26 + "this, ms  " + is_beside * "   other, ms   ratios: tenth, half, cpu    control"
    )
    for kind in KINDS:
        by_life = [took[kind.name] for took in lives]
        line = f"{kind.name:>24}"
        for index in (0, 1) if is_beside else (0,):
            all_of = [second for took in by_life for second in took[index].seconds]
            line += "  " + " ".join(f"{second * 1e3:6.2f}" for second in tenths(all_of))
        for one, other in ((0, 1), (2, 0)) if is_beside else ():
            ratios = (
                [a / b for a, b in zip(took[one].figures, took[other].figures, strict=True)]
                for took in by_life
            )
            line += "   "
            line += " ".join(
                f"{statistics.median(each):5.2f}" for each in zip(*ratios, strict=True)
            )
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--lives", type=int, default=6, help="how often all are started anew")
    parser.add_argument("--rounds", type=int, default=40, help="of requests of all kinds, per life")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    here, other = Path(__file__).resolve().parents[1], arguments.beside
    trees = [here] if other is None else [here, other.resolve(), here]
    lives = [live(trees, arguments.rounds) for _ in range(arguments.lives)]
    report(lives, is_beside=other is not None)


if __name__ == "__main__":
    main()
