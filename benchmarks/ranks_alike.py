"""Do ranks end with the same ids, and with those of one rank, whatever becomes of requests?

    python benchmarks/ranks_alike.py --layouts 2,1x2 --lives 1000 --models synthetic,qwen3
    python benchmarks/ranks_alike.py --layouts 2x2 --lives 4 --models families,files
    python benchmarks/ranks_alike.py --layouts 2e --lives 8 --models mixtures   # spreads experts

Lives are those of the core's property test (requests that share beginnings, fork, are aborted,
paused, preempted, resumed and constrained by grammars; limits of every size), with every kind of
sampling. Each is lived once with a small random model on one rank and once on real ranks over gloo:
those of one stage, or times stages; "e" spreads experts. At every step all ranks compare what they
computed with and what they sampled. `families`: every architecture that tests know. `files`: packed
and fused layouts of weights. `synthetic` computes nothing: its ids hash the tokens before them, as
each rank has them, and it knows no grammars.
Targets: no step differs between ranks, and no id from one rank's.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for what tests have: small models, and lives

from nanovllm.protocol.plan import DeviceLostError  # noqa: E402
from tests.conftest import TINY, save_tiny  # noqa: E402
from tests.core.fake_executor import VOCAB_SIZE  # noqa: E402
from tests.core.test_property import Simulation  # noqa: E402
from tests.executor.lives import ALONE, OWN_EOS, SYNTHETIC, Layout, Life, Model  # noqa: E402
from tests.moe_models import TINY_MOE  # noqa: E402
from tests.worker.models.test_parallel import WIDE  # noqa: E402
from tests.worker.quant.layouts import FORMATS, write  # noqa: E402

TELL_EVERY = 50  # lives
MANY = 50  # lives, of which it pays to start executors with blocks of other sizes, too
FILES = ("awq 16", "gptq 4 ordered", "gptq 8 16", "compressed 4 16 zeros", "fp8 blocks 16")
FILES += ("compressed fp8 channel, plain tokens",)


@dataclass
class Found:
    """What lives of one model and layout have shown."""

    num_lives: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    differ: list[str] = field(default_factory=list)  # of which life what
    seconds: float = 0.0


def compare(alone: Model, ranks: Model, num_lives: int, until: float) -> Found:
    """Live all of them, or as many as begin in time, on both."""
    found, started = Found(), time.monotonic()
    num_stages = ranks.layout.stages  # on one rank, too: it decides how steps are planned
    block_sizes = Simulation.block_sizes if num_lives >= MANY else (4,)
    for seed in range(num_lives):
        if time.monotonic() > until:
            break
        expected = Life(seed, alone, num_stages, block_sizes)
        expected.run()
        try:
            several = Life(seed, ranks, num_stages, block_sizes)
            several.run()
        except DeviceLostError as error:  # also of ranks that differ among themselves
            found.differ.append(f"life {seed}: {error}")
            ranks.end()
            continue
        found.num_lives += 1
        found.num_tokens += sum(map(len, several.got.values()))
        found.num_preemptions += several.num_preemptions
        if (several.got, several.finished) != (expected.got, expected.finished):
            first = next(n for n, ids in expected.got.items() if several.got.get(n) != ids)
            found.differ.append(f"life {seed}: of output {first} other ids than one rank's")
        if found.num_lives % TELL_EVERY == 0:
            print(f"{found.num_lives} lives, {len(found.differ)} differ", file=sys.stderr)
    found.seconds = time.monotonic() - started
    return found


def models_of(names: str, place: Path) -> Iterator[tuple[str, str | Path, dict[str, Any]]]:
    """Name, directory and settings of what --models asks for, one after the other."""
    for name in names.split(","):
        if name == SYNTHETIC:
            yield name, name, {"load_format": name, "step_ms": 0.0, "vocab_size": VOCAB_SIZE}
            continue
        groups = {"families": list(TINY), "mixtures": [*TINY_MOE, "gemma4_moe"]}
        for one in groups.get(name, [name] if name != "files" else []):
            sizes = {name: VOCAB_SIZE for name in TINY[one][2] if name.startswith("vocab_size")}
            more = {"vocab_size": VOCAB_SIZE, **sizes, **OWN_EOS}
            yield one, save_tiny(one, place / one, **more), {}
        for one in ("llama", "phi3") if name == "files" else ():  # phi3's are fused, too
            plain = save_tiny(one, place / f"wide-{one}", vocab_size=VOCAB_SIZE, **OWN_EOS, **WIDE)
            for file in FILES:
                path = place / f"{one}-{file}".replace(" ", "-").replace(",", "")
                path.mkdir()
                write(plain, path, *FORMATS[file])
                yield f"{one}, {file}", path, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layouts", default="2,1x2", help="2, 1x2, 2x2, 2e, with commas")
    parser.add_argument("--models", default="qwen3", help="families, mixtures, files, or names")
    parser.add_argument("--lives", type=int, default=1000, help="of each model")
    parser.add_argument("--seconds", type=float, default=1e6, help="when no life begins any more")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    until, num_wrong = time.monotonic() + arguments.seconds, 0
    print("| model | ranks | lives | tokens | preemptions | differ | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="alike-") as place:
        for name, path, settings in models_of(arguments.models, Path(place)):
            for layout in map(Layout.of, arguments.layouts.split(",")):
                ones = {**settings, "compare_ranks": False}
                alone = Model(str(path), ALONE, ones)
                ranks = Model(str(path), layout, settings)
                try:
                    found = compare(alone, ranks, arguments.lives, until)
                except ValueError as error:  # cannot be shared so
                    print(f"| {name} | {layout} | refused: {str(error)[:150]} |", flush=True)
                    continue
                finally:
                    alone.end()
                    ranks.end()
                print(
                    f"| {name} | {layout} | {found.num_lives} | {found.num_tokens} | "
                    f"{found.num_preemptions} | {len(found.differ)} | {found.seconds:.0f} |",
                    *found.differ[:3],
                    sep="\n    ",
                    flush=True,
                )
                num_wrong += len(found.differ)
    assert not num_wrong, "a target is missed"


if __name__ == "__main__":
    main()
