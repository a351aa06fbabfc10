"""Kernels are compiled ahead into Triton's cache, by a program that needs no GPU."""

import io
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.quantization import Scheme
from nanovllm.config import EngineConfig, SchedulerConfig
from nanovllm.worker.cuda_graph import StepShape, Variant
from nanovllm.worker.warmup import precompile, triton_precompile
from nanovllm.worker.warmup.precompile import (
    NUM_LAYERS,
    PROGRAM,
    Job,
    Precompiler,
    is_likely,
    stamp_of,
)
from nanovllm.worker.warmup.triton_precompile import Children, typical
from tests.worker.warmup.compiling import run_compiling

TIMEOUT_S = 600.0  # compiling takes a minute of a processor that may have much else to do
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LIMITS = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=32).limits("cuda")
SPEC = msgspec.structs.replace(spec_from_config(CONFIG), max_position_embeddings=128)
JOB = Job(  # of a model that takes few sizes of steps
    SPEC.shortened(NUM_LAYERS),
    block_size=16,
    dtype="bfloat16",
    kv_dtype=None,
    scheme=None,
    limits=LIMITS,
    gpu=((9, 0), 132),
)
FP8_JOB = msgspec.structs.replace(JOB, kv_dtype="float8_e4m3fn", scheme=Scheme.at_load("fp8"))
# As `PROGRAM`, but it does not give way to others: beside other tests it would hardly get on.
EAGER = [
    sys.executable,
    "-c",
    "from nanovllm.worker.warmup import triton_precompile as program\n"
    "program.POLITENESS = 0\n"
    "program.main()",
]
STUCK = [sys.executable, "-c", f"import time; time.sleep({TIMEOUT_S})"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's, for this test and the programs it starts."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@contextmanager
def started(job: Job) -> Iterator[Precompiler]:
    """One that has been asked and waited for; it is ended whatever a test finds."""
    precompiler = Precompiler(EAGER, most_wait_s=TIMEOUT_S)
    try:
        precompiler.ask(job)
        precompiler.wait(lambda progress: None)
        yield precompiler
    finally:
        precompiler.end()


def assert_first_steps_are_compiled(job: Job) -> None:
    """The profile run, which comes now, finds all it launches."""
    profiled = run_compiling("compile_profile_run.py", msgspec.json.encode(job).decode())
    assert len(profiled) > 10
    assert all(profiled.values()), profiled


def kernels_of(cache: Path) -> dict[Path, int]:
    """Compiled ones, by their paths in the cache, and when."""
    return {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.glob("*/*.cubin")}


@pytest.mark.timeout(4 * TIMEOUT_S)
def test_what_steps_launch_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts with one cache, since compiling costs most of a minute of a processor's time."""
    for is_later in (False, True):
        found = kernels_of(cache)
        with started(JOB) as precompiler:
            assert precompiler.has_found_all == is_later
            if not is_later:  # while the rest is compiled
                assert_first_steps_are_compiled(JOB)
                assert stamp_of(JOB).exists()
            assert precompiler._program is not None
            assert precompiler._program.wait(TIMEOUT_S) == 0
    names = {path.stem for path in found}
    assert {"decode_kernel", "prefill_kernel", "_matrix_kernel", "_vector_kernel"} <= names
    assert {"_expand_kernel", "plan_kernel", "segments_kernel", "_choose_kernel"} <= names
    assert found == kernels_of(cache)

    # In FP8, what the first steps launch; and where there is the driver's library, to which an
    # empty one is good enough to link, a C compiler makes what launches it.
    assert triton_precompile.has_driver() or not list(cache.glob("*/*.so"))
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is not None:
        library, source = cache / "driver" / "libcuda.so.1", cache / "empty.c"
        library.parent.mkdir()
        source.touch()
        subprocess.run([compiler, "-shared", "-o", library, source], check=True)
        monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(library.parent))
    with started(FP8_JOB) as precompiler:
        assert not precompiler.has_found_all
    assert_first_steps_are_compiled(FP8_JOB)
    assert len(kernels_of(cache)) > len(found)
    if compiler is None:
        pytest.skip("no C compiler, which Triton needs for launchers on any machine")
    assert list(cache.glob("*/cuda_utils*.so"))
    assert len(list(cache.glob("*/__triton_launcher*.so"))) > 5


def test_it_tells_whether_an_earlier_start_has_compiled(cache: Path) -> None:
    for is_there in (False, True):
        precompiler = Precompiler(STUCK)
        assert not precompiler.has_found_all
        precompiler.ask(JOB)
        assert precompiler.has_found_all == is_there
        precompiler.end()
        stamp_of(JOB).touch()


def test_one_step_stands_for_those_that_launch_the_same() -> None:
    shapes = [StepShape(size, size) for size in (1, 2, 4, 8, 16, 24, 32, 40)]
    shapes += [StepShape(tokens, 16) for tokens in (32, 48, 64)]
    kept = [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (24, 24), (40, 40), (32, 16), (48, 16)]
    assert list(typical(shapes)) == kept


def test_a_first_request_comes_before_many_at_once() -> None:
    plain, sharing = Variant(shares_prefix=False), Variant(shares_prefix=True)
    shapes = [StepShape(*sizes) for sizes in ((1, 1), (24, 24), (128, 16), (128, 64))]
    steps = [(shape, variant) for variant in (sharing, plain) for shape in shapes]
    first = [(128, 16), (1, 1), (24, 24), (128, 64)]
    ordered = sorted(steps, key=triton_precompile._lateness)
    assert ordered == [(shape, variant) for variant in (plain, sharing) for shape in first]


def test_children_compile_and_say_how_it_went(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_precompile, "is_awaited", lambda: True)
    children = Children(2)
    futures = [children.submit(lambda name=name: (cache / name).touch()) for name in "abc"]
    assert children.wait()
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b", "c"]
    assert all(future.done() for future in futures)
    children.submit((cache / "a" / "file").touch)  # which is no directory
    assert not children.wait()


def test_nothing_more_is_compiled_once_nobody_waits(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_precompile, "is_awaited", lambda: False)
    with pytest.raises(SystemExit):
        Children(1).submit((cache / "late").touch)
    assert not list(cache.iterdir())


def test_the_program_ends_with_whoever_started_it(cache: Path) -> None:
    """The system closes a dead process' end of a pipe."""
    precompiler = Precompiler(EAGER)
    precompiler.ask(JOB)
    program = precompiler._program
    assert program is not None and program.stdin is not None
    program.stdin.close()
    assert program.wait(TIMEOUT_S) == 0
    assert not list(cache.iterdir())
    precompiler.end()


@pytest.mark.parametrize("jobs", [[], [JOB]])
def test_the_program_gives_way_and_does_what_it_is_told(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, if whoever started it has ended without a word."""
    done: list[Any] = []
    told = b"".join(msgspec.json.encode(job) + b"\n" for job in jobs)
    monkeypatch.setattr("os.nice", done.append)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(told)))
    monkeypatch.setattr(triton_precompile, "load_ahead", lambda: done.append("loaded"))
    monkeypatch.setattr(triton_precompile, "compile_all", done.append)
    triton_precompile.main()
    assert done == [10, "loaded", *jobs]
    assert (sys.executable, "-m", triton_precompile.__name__) == PROGRAM


def test_a_stuck_program_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()  # of a clock that goes on by a second with each
    precompiler = Precompiler(STUCK, most_wait_s=4.0)
    told: list[float] = []
    precompiler.ask(JOB)
    clock = SimpleNamespace(monotonic=lambda: float(next(readings)))
    monkeypatch.setattr(precompile, "time", clock)
    precompiler.wait(told.append)
    assert told == [0.25, 0.5, 0.75]
    precompiler.end()
    precompiler.end()


@pytest.mark.parametrize("command", [[sys.executable, "-c", "1 / 0"], ["no such program"]])
def test_a_program_that_fails_is_not_waited_for(command: list[str]) -> None:
    precompiler, began = Precompiler(command, most_wait_s=TIMEOUT_S), time.monotonic()
    precompiler.ask(JOB)
    precompiler.wait(lambda progress: None)
    assert time.monotonic() - began < TIMEOUT_S / 2
    precompiler.end()


def test_a_program_that_does_not_listen_is_ended() -> None:
    precompiler = Precompiler(STUCK, most_wait_s=TIMEOUT_S)
    told: list[float] = []
    longer = msgspec.structs.replace(SPEC, architecture="x" * 2**20)  # than a pipe holds
    precompiler.ask(msgspec.structs.replace(JOB, spec=longer))
    assert precompiler._program is None
    precompiler.wait(told.append)
    assert not told


def test_nobody_waits_for_what_has_been_compiled() -> None:
    stamp_of(JOB).touch()
    precompiler = Precompiler(STUCK, most_wait_s=TIMEOUT_S)
    told: list[float] = []
    precompiler.ask(JOB)
    precompiler.wait(told.append)
    precompiler.end()
    assert not told


def test_a_job_is_likely_where_triton_may_compile() -> None:
    assert is_likely(EngineConfig.from_kwargs(model="m"))
    assert is_likely(EngineConfig.from_kwargs(model="m", quantization="fp8"))
    assert not is_likely(EngineConfig.from_kwargs(model="m", attention_backend="torch"))


def test_what_stands_in_for_torchs_tracing_gives_way_to_it() -> None:
    lines = (
        "import sys, torch",
        "from nanovllm.worker.warmup.triton_precompile import NotTracing, load_ahead",
        "load_ahead()",
        "held = sys.modules['torch._dynamo']",
        "assert isinstance(held, NotTracing), held",
        "compiled = torch.compile(lambda x: x + 1, backend='eager')",
        "assert compiled(torch.zeros(1)) == 1 and held.config is torch._dynamo.config",
        "assert sys.modules['torch._dynamo'] is not held",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=TIMEOUT_S)
