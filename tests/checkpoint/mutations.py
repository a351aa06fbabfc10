"""Damaged model files: what a header may claim, and bytes changed at random.

`test_hostile_files.py` reads some of them in every run; as a program
(`python -m tests.checkpoint.mutations 20000 [--headers]`) it reads as many as are wanted, of GGUF
and safetensors alone if so asked, and tells how it went.
"""

import collections
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nanovllm.checkpoint import tokenizer_files
from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import Checkpoint
from tests.checkpoint.gguf_writing import VOCAB_SIZE, rewrite, write_gguf
from tests.frontend.vocabulary import SPECIAL_TOKENS, fast_tokenizer
from tests.waiting import WAIT_S

ODD_INTS = (0, 1, 2, 7, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
ODD_JSON = (None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "x" * 1000, [], [None], {}, {"a": {}})
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": [2],
    "torch_dtype": "bfloat16",
}
Outcomes = collections.Counter[str]
Read = Callable[[Path], object]


def changed_bytes(original: bytes, rng: random.Random, *, header: int) -> bytes:
    """One to four changes to the first `header` bytes."""
    content = bytearray(original)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(header, len(content))))
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = rng.randbytes(1)
            case 1:
                content[at : at + 4] = struct.pack("<I", rng.choice(ODD_INTS) % 2**32)
            case 2:
                content[at : at + 8] = struct.pack("<Q", rng.choice(ODD_INTS))
            case 3:
                content[at:at] = rng.randbytes(rng.randint(1, 16))
            case 4:
                del content[at : at + rng.randint(1, 16)]
            case 5:
                del content[rng.randint(at, len(content)) :]
    return bytes(content)


def changed_json(original: object, rng: random.Random) -> object:
    """The same with one value, somewhere, made odd or left out."""
    if isinstance(original, dict) and original and rng.random() < 0.9:
        name = rng.choice(list(original))
        changed = dict(original)
        if rng.random() < 0.1:
            del changed[name]
        else:
            changed[name] = changed_json(original[name], rng)
        return changed
    if isinstance(original, list) and original and rng.random() < 0.9:
        place = rng.randrange(len(original))
        return [
            changed_json(value, rng) if place == index else value
            for index, value in enumerate(original)
        ]
    return rng.choice(ODD_JSON)


def read_gguf(path: Path) -> None:
    checkpoint = Checkpoint(path, "gguf")
    spec_from_config(checkpoint.config())
    checkpoint.eos_token_ids()
    for tensor in list(checkpoint.gguf.tensors.values())[:4]:
        if tensor.raw.size < 1 << 20:
            tensor.dequantize()
    tokenizer_files.from_gguf(path)


def read_directory(path: Path) -> None:
    checkpoint = Checkpoint(path.parent, "safetensors")
    spec_from_config(checkpoint.config())
    checkpoint.eos_token_ids()
    tokenizer_files.from_directory(path.parent)


def read_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def attempt(read: Read, path: Path, outcomes: Outcomes) -> None:
    """Read a damaged file. It is good after all, or refused; it takes neither for ever nor all
    memory."""
    began = time.monotonic()
    try:
        read(path)
        outcomes["good"] += 1
    except ValueError:
        outcomes["refused"] += 1
    assert time.monotonic() - began < WAIT_S, path


def run(
    count: int, directory: Path, *, seed: int = 0, headers_only: bool = False
) -> dict[str, Outcomes]:
    """Read `count` damaged files, a quarter of each kind, or half of each that has a header.
    Whatever else is raised gets out, with the file left in `directory`."""
    import transformers  # noqa: F401 - odd tokenizers need it, and it takes seconds by itself

    rng = random.Random(seed)
    found: dict[str, Outcomes] = collections.defaultdict(collections.Counter)
    gguf_facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*"abc", "ab", "abc", *(f"t{i}" for i in range(VOCAB_SIZE - 5))],
        "tokenizer.ggml.token_type": [1] * VOCAB_SIZE,
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    gguf = write_gguf(directory / "good.gguf", facts=gguf_facts).read_bytes()
    header = gguf.find(b"token_embd.weight") + 64
    tensors = {"a": np.zeros((4, 4), np.float32), "b": np.zeros(8, np.float16)}
    safetensors = save(tensors)
    tokenizer = json.loads(fast_tokenizer().to_str())
    settings = {"chat_template": "{{ messages }}", "add_bos_token": True, **SPECIAL_TOKENS}
    whole = {
        "config.json": CONFIG,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
    }
    for name, content in whole.items():
        (directory / name).write_text(json.dumps(content))
    for _ in range(count // (2 if headers_only else 4)):
        path = directory / "bad.gguf"
        rewrite(path, changed_bytes(gguf, rng, header=header))
        attempt(read_gguf, path, found["gguf"])
        path = directory / "bad.safetensors"
        rewrite(path, changed_bytes(safetensors, rng, header=256))
        attempt(read_safetensors, path, found["safetensors"])
        others = ("config.json", rng.choice(["tokenizer.json", "tokenizer_config.json"]))
        for name in () if headers_only else others:
            path = directory / name
            good = path.read_bytes()
            if rng.random() < 0.3:
                rewrite(path, changed_bytes(good, rng, header=len(good)))
            else:
                rewrite(path, json.dumps(changed_json(whole[name], rng)).encode())
            attempt(read_directory, path, found[name])
            rewrite(path, good)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        headers_only = "--headers" in sys.argv
        found = run(int(sys.argv[1]), Path(name), headers_only=headers_only)
        for kind, outcomes in found.items():
            print(kind, dict(outcomes))
    print("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
