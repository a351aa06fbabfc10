"""Kernels are compiled ahead into Triton's cache, by a program that needs no GPU."""

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
    Job,
    Precompiler,
    is_likely,
    stamp_of,
)
from nanovllm.worker.warmup.triton_precompile import Children, typical
from tests.worker.warmup.compiling import run_compiling

TIMEOUT_S = 200.0
SHORTER_S = TIMEOUT_S / 2  # than the wait for a program that does not answer
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
LIMITS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64).limits("cuda")
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
# The program gives way to whatever else runs: beside other tests it would hardly get on.
POLITE = pytest.mark.alone
STUCK = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's, for this test and the programs it starts."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def seconds_waited(precompiler: Precompiler) -> float:
    started = time.monotonic()
    precompiler.wait(lambda progress: None)
    return time.monotonic() - started


@contextmanager
def started(*args: Any, **options: Any) -> Iterator[Precompiler]:
    """One that has begun; it is ended whatever a test finds."""
    precompiler = Precompiler(*args, **options)
    precompiler.begin()
    try:
        yield precompiler
    finally:
        precompiler.end()


def kernels_of(cache: Path) -> dict[Path, int]:
    """Compiled ones, by their paths in the cache, and when."""
    return {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.glob("*/*.cubin")}


def compile_all(job: Job, *, is_first: bool) -> None:
    """What an engine's start has compiled, to the end."""
    with started(most_wait_s=TIMEOUT_S) as precompiler:
        precompiler.ask(job)
        waited_s = seconds_waited(precompiler)
        if is_first:  # the profile run comes now, while the rest is compiled
            profiled = run_compiling("compile_profile_run.py", msgspec.json.encode(job).decode())
            assert len(profiled) > 10
            assert all(profiled.values()), profiled
            assert stamp_of(job).exists()
        else:
            assert waited_s < SHORTER_S
        assert precompiler._program is not None
        assert precompiler._program.wait(TIMEOUT_S) == 0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as the first start with `JOB` leaves it: half a minute of a processor's time."""
    path = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(path))
        compile_all(JOB, is_first=True)
    return path


@POLITE
@pytest.mark.parametrize("job", [JOB, FP8_JOB], ids=["bf16", "fp8"])
def test_what_steps_launch_is_compiled_once(
    cache: Path, job: Job, request: pytest.FixtureRequest
) -> None:
    if job is JOB:
        shutil.copytree(request.getfixturevalue("compiled"), cache, dirs_exist_ok=True)
    else:
        compile_all(job, is_first=True)
    found = kernels_of(cache)
    compile_all(job, is_first=False)
    names = {path.stem for path in found}
    assert {"decode_kernel", "prefill_kernel", "_matrix_kernel", "_vector_kernel"} <= names
    assert {"_expand_kernel", "plan_kernel", "segments_kernel", "_choose_kernel"} <= names
    assert found == kernels_of(cache)


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


@POLITE
def test_what_launches_kernels_is_compiled_too(
    cache: Path,
    compiled: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a C compiler, where there is the driver's library; an empty one will do to link to. The
    kernels are there already."""
    shutil.copytree(compiled, cache, dirs_exist_ok=True)
    stamp_of(JOB).unlink()
    assert not list(cache.glob("*/*.so"))
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which Triton needs for this on any machine")
    driver = tmp_path_factory.mktemp("driver")
    (driver / "empty.c").touch()
    library, source = str(driver / "libcuda.so.1"), str(driver / "empty.c")
    subprocess.run([compiler, "-shared", "-o", library, source], check=True)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(driver))
    with started(most_wait_s=TIMEOUT_S) as precompiler:
        precompiler.ask(JOB)
        precompiler.wait(lambda progress: None)
        assert list(cache.glob("*/cuda_utils*.so"))
        assert len(list(cache.glob("*/__triton_launcher*.so"))) > 5


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


@POLITE
@pytest.mark.parametrize("told", [b"", msgspec.json.encode(JOB) + b"\n"])
def test_the_program_ends_with_whoever_started_it(told: bytes, cache: Path) -> None:
    """The system closes a dead process' end of a pipe."""
    with started() as precompiler:
        program = precompiler._program
        assert program is not None and program.stdin is not None
        program.stdin.write(told)
        program.stdin.close()
        assert program.wait(TIMEOUT_S) == 0
        assert not list(cache.iterdir())


def test_a_stuck_program_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()  # of a clock that goes on by a second with each
    precompiler, told = Precompiler(STUCK, most_wait_s=4.0), []
    precompiler.ask(JOB)
    clock = SimpleNamespace(monotonic=lambda: float(next(readings)))
    monkeypatch.setattr(precompile, "time", clock)
    precompiler.wait(told.append)
    assert told == [0.25, 0.5, 0.75]
    precompiler.end()
    precompiler.end()


@pytest.mark.parametrize("command", [[sys.executable, "-c", "1 / 0"], ["no such program"]])
def test_a_program_that_fails_is_not_waited_for(command: list[str]) -> None:
    precompiler = Precompiler(command, most_wait_s=TIMEOUT_S)
    precompiler.begin()
    precompiler.ask(JOB)
    assert seconds_waited(precompiler) < SHORTER_S
    precompiler.end()


def test_a_program_that_does_not_listen_is_ended() -> None:
    precompiler = Precompiler(STUCK, most_wait_s=TIMEOUT_S)
    longer = msgspec.structs.replace(SPEC, architecture="x" * 2**20)  # than a pipe holds
    precompiler.ask(msgspec.structs.replace(JOB, spec=longer))
    assert precompiler._program is None
    assert seconds_waited(precompiler) < SHORTER_S


def test_nobody_waits_for_what_has_been_compiled() -> None:
    stamp_of(JOB).touch()
    precompiler = Precompiler(STUCK, most_wait_s=TIMEOUT_S)
    precompiler.ask(JOB)
    assert seconds_waited(precompiler) < SHORTER_S
    precompiler.end()


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
