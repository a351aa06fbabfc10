"""Models that tests share: small random ones of every architecture, and SmolLM2 where it is.

Also how test processes share the machine (`pytest -n 2`, or `-n auto`).
"""

import fcntl
import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanovllm.checkpoint.locate import locate
from tests.dense_models import OLD_SPELLING, TINY_DENSE
from tests.moe_models import TINY_MOE

TESTS = Path(__file__).parent
# Head sizes that do not follow from the hidden size, grouped queries, windows shorter than prompts.
SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
TINY: dict[str, tuple[type[PreTrainedModel], Callable[..., Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama_linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 16, "sliding_window": 20}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "qwen2_windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"rms_norm_eps": 1e-5}),
    **TINY_DENSE,
    **TINY_MOE,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: two processes per core that this one may use, since much of the time a test
    waits for a process, a clock or a browser; each takes up to 2 GiB."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(2 * len(os.sched_getaffinity(0)), memory_bytes >> 31))


# Rooms and files whose tests start processes, run kernels in an interpreter, or draw at random.
SLOW = (
    "e2e/",
    "bench/",
    "executor/",
    "replay/",
    "watch/",
    "worker/kernels/",
    "worker/quant/",
    "worker/warmup/",
    "worker/attention/test_triton",
    "worker/attention/test_flash",
    "worker/attention/test_long_kernel",
    "worker/sampling/test_device",
    "worker/sampling/test_distribution",
    "worker/test_pipeline",
    "worker/models/test_parallel",
    "worker/models/test_gguf_families",
    "worker/models/test_native",
    "worker/models/test_decoder",
    "checkpoint/test_against_llama_cpp",
    "checkpoint/test_fetch",
    "core/test_property",
    "core/test_drain",
    "core/test_fuzz",
    "core/test_json_place",
    "core/test_grammar_sandbox",
    "frontend/test_core_life",
    "frontend/server/test_connections",
    "frontend/server/test_habits",
    "frontend/server/test_lesson",
    "frontend/server/test_screenshots",
    "frontend/server/test_serve",
    "frontend/server/test_page",
    "frontend/server/test_foreign_page",
    "frontend/server/test_openapi",
    "frontend/server/test_fuzz",
    "frontend/server/test_dashboard",
    "test_docs",
    "test_wheel",
)


# Files whose tests compute for long: each test process begins with some, and none ends with one.
# What starts engines and looks at when they answer is not among them: that is better spread.
LONG = (
    "worker/warmup/test_precompile",
    "worker/attention/test_triton",
    "worker/models/test_decoder",
    "e2e/test_parity",
    "core/test_property",
)


def share() -> tuple[int, int]:
    """Which of how many test processes this is; the first of one without xdist."""
    name = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    return int(name.removeprefix("gw")), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))


def pytest_collection(session: pytest.Session) -> None:
    """Test processes import tests in orders of their own, each from another place of the list on:
    where tests have never been run each compiles a part of them, and finds the rest compiled."""
    index, num_processes = share()
    if num_processes == 1:
        return
    roots = [Path(argument.partition("::")[0]) for argument in session.config.args]
    files = sorted({path.resolve() for root in roots for path in root.rglob("test_*.py")})
    first = len(files) * index // num_processes
    for path in files[first:] + files[:first]:
        # Whatever goes wrong with it is told when it is collected.
        with suppress(Exception, pytest.skip.Exception):
            import_module(".".join(path.relative_to(TESTS.parent).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What reads a real model is slow, too."""
    for item in items:
        if place_of(item).startswith(SLOW) or item.get_closest_marker("model"):
            item.add_marker("slow")
    items[:] = dealt(items, share()[1])


def place_of(item: pytest.Item) -> str:
    return str(item.path.relative_to(TESTS))


def dealt(items: list[pytest.Item], num_processes: int) -> list[pytest.Item]:
    """In an order of which xdist gives each process an equal part, one after the other: each begins
    with long ones. A process that has nothing left takes some from the end of another's part. Tests
    of one file stay together, save where a part ends."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(place_of(item), []).append(item)
    long = [place for start in LONG for place in files if place.startswith(start)]
    parts: list[list[pytest.Item]] = [[] for _ in range(num_processes)]
    for index, place in enumerate(long):
        parts[index % num_processes] += files.pop(place)
    rest = list(chain.from_iterable(files.values()))
    for index, part in enumerate(parts):
        num_left = sum(map(len, parts[index:])) + len(rest)
        num_more = max(0, num_left // (num_processes - index) - len(part))
        part += rest[:num_more]
        del rest[:num_more]
    return list(chain.from_iterable(parts))


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection has to look through its million objects again,
    and there are many, at the end of every engine above all."""
    gc.collect()
    gc.freeze()


# Locked, not read: files that all test processes of this tree have in common.
ROOM, GATE = (
    os.open(path, os.O_RDONLY) for path in (__file__, Path(__file__).with_name("__init__.py"))
)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test marked `alone` runs while no test of another process does, set-up included: it sees
    how long something takes. All others share the room; whoever comes next waits at the gate, so
    that a lone one gets its turn."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    is_alone = item.get_closest_marker("alone") is not None
    fcntl.flock(GATE, fcntl.LOCK_EX)
    fcntl.flock(ROOM, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
    fcntl.flock(GATE, fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        fcntl.flock(ROOM, fcntl.LOCK_UN)


def save_tiny(name: str, path: Path, **more: Any) -> Path:
    """Save a random model of a key of `TINY` in fp32; returns `path`. more: other sizes."""
    model_class, config_class, changes = TINY[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | changes | more))
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            if parameter.dim() == 1:  # norms begin as ones, biases as zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(path)
    if name in OLD_SPELLING:
        fields = json.loads((path / "config.json").read_text())
        del fields["rope_parameters"]
        (path / "config.json").write_text(json.dumps(fields | OLD_SPELLING[name]))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture (a key of `TINY`) → directory of a small random model, saved in fp32."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(name: str) -> Path:
        path = root / name
        return path if path.exists() else save_tiny(name, path)

    return build


@contextmanager
def quick_gguf() -> Iterator[None]:
    """In here the `gguf` package, by which transformers reads, takes a fraction of the time. It
    slices arrays instead of `np.memmap`, whose slices take ten times as long; a vocabulary takes a
    million of them. And it reads a file once, where transformers wants it three times, and makes a
    table of names once, where transformers wants one for each module of a model."""
    mapped = np.memmap

    def plain(path: Path, **how: Any) -> np.ndarray:
        return mapped(path, **how).view(np.ndarray)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", plain)
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return locate("smollm2").path


@pytest.fixture(scope="session")
def hf_smollm2(smollm2_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """transformers' own reading of the same GGUF file, in fp32."""
    files: dict[str, Any] = {"gguf_file": smollm2_path.name}
    with warnings.catch_warnings(), quick_gguf():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, **files)
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_path.parent, dtype=torch.float32, **files
        )
    return model.eval(), tokenizer
