"""GGUF files of one small model for `quality.py`: as it is, and as llama.cpp rounds it.

    python benchmarks/quality_files.py DIRECTORY --llama-python PYTHON [--types Q8_0 Q4_K_M …]
    python benchmarks/quality.py --model DIRECTORY/F32.gguf --files DIRECTORY/Q*.gguf \
        --llama-python PYTHON

SmolLM2 comes as a file of Q4_1, and its rows of 576 hold no whole blocks of 256. F32.gguf is the
same function with neither in the way. Hidden dimensions, those of MLPs and those of values are
shuffled: inputs that shared a scale in the source share one no more, so a format that could hold
the source's groups has no advantage. Then zeros are put around what is there: dimensions to a
multiple of 256, and heads as many as that takes. The other files are llama.cpp's roundings of that
one (`llama_part.py` says what PYTHON has).
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from nanovllm.checkpoint.locate import locate

UNIT = 256  # inputs of a block of K-quants
ATTENTION = "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"
MLP = "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
SEED = 0
Matrices = dict[str, NDArray[np.float32]]


def ask_llama(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What `llama_part.py` answers in that interpreter. Raises `SystemExit` with its last words."""
    command = [python, str(Path(__file__).with_name("llama_part.py"))]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


class Shuffled:
    """The same model of architecture llama, its dimensions in another order and with zeros around.

    Numbers of heads grow together, so a query head has the key head that it had.
    """

    def __init__(self, source: Path) -> None:
        self._reader = GGUFReader(source)
        self._random = np.random.default_rng(SEED)
        if self._of("general.architecture") != "llama":
            raise SystemExit(f"{source} is not of architecture llama")
        self._hidden = self._of("llama.embedding_length")
        self._inner = self._of("llama.feed_forward_length")
        self._heads, self._kv_heads = (
            self._of(f"llama.attention.head_count{kind}") for kind in ("", "_kv")
        )
        self._head_dim = self._hidden // self._heads
        self._order = self._random.permutation(self._hidden)
        self._wide, self._wide_inner = (size + -size % UNIT for size in (self._hidden, self._inner))
        ratio = self._heads // self._kv_heads
        if self._wide % (self._head_dim * ratio):
            raise SystemExit(f"no whole heads fill a width of {self._wide}")
        self._growth = math.sqrt(self._hidden / self._wide)  # of norms: zeros count in their means

    def write(self, target: Path) -> None:
        """In float32."""
        heads = self._wide // self._head_dim
        changed = {
            "llama.embedding_length": self._wide,
            "llama.feed_forward_length": self._wide_inner,
            "llama.attention.head_count": heads,
            "llama.attention.head_count_kv": heads * self._kv_heads // self._heads,
            "llama.attention.layer_norm_rms_epsilon": self._growth**2
            * self._of("llama.attention.layer_norm_rms_epsilon"),
            "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        }
        writer = GGUFWriter(target, "llama")
        for name, field in self._reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            kinds = field.types
            inner = kinds[1] if kinds[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, changed.get(name, field.contents()), kinds[0], inner)
        for name, values in self._tensors():
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _of(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def _tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        left = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in self._reader.tensors
        }
        for name in ("token_embd.weight", "output.weight"):
            if name in left:
                yield name, _padded(left.pop(name)[:, self._order], self._wide)
        yield "output_norm.weight", self._norm(left.pop("output_norm.weight"))
        for layer in range(self._of("llama.block_count")):
            part = {name: left.pop(f"blk.{layer}.{name}.weight") for name in (*ATTENTION, *MLP)}
            for name, each in (self._attention(part) | self._mlp(part)).items():
                yield f"blk.{layer}.{name}.weight", each
        if left:
            raise SystemExit(f"unknown tensors: {', '.join(left)}")

    def _attention(self, part: Mapping[str, NDArray[np.float32]]) -> Matrices:
        order, wide, ratio = self._order, self._wide, self._heads // self._kv_heads
        within = [self._random.permutation(self._head_dim) for _ in range(self._kv_heads)]
        values, attended = (
            np.concatenate(
                [within[head // shared] + head * self._head_dim for head in range(count)]
            )
            for count, shared in ((self._kv_heads, 1), (self._heads, ratio))
        )
        return {
            "attn_norm": self._norm(part["attn_norm"]),
            "attn_q": _padded(part["attn_q"][:, order], wide, wide),
            "attn_k": _padded(part["attn_k"][:, order], wide, wide // ratio),
            "attn_v": _padded(part["attn_v"][values][:, order], wide, wide // ratio),
            "attn_output": _padded(part["attn_output"][order][:, attended], wide, wide),
        }

    def _mlp(self, part: Mapping[str, NDArray[np.float32]]) -> Matrices:
        order, wide, inner = self._order, self._wide, self._random.permutation(self._inner)
        return {
            "ffn_norm": self._norm(part["ffn_norm"]),
            "ffn_gate": _padded(part["ffn_gate"][inner][:, order], wide, self._wide_inner),
            "ffn_up": _padded(part["ffn_up"][inner][:, order], wide, self._wide_inner),
            "ffn_down": _padded(part["ffn_down"][order][:, inner], self._wide_inner, wide),
        }

    def _norm(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.pad(weight[self._order] * self._growth, (0, self._wide - self._hidden))


def _padded(
    matrix: NDArray[np.float32], columns: int, rows: int | None = None
) -> NDArray[np.float32]:
    """With zeros to so many columns and rows."""
    more = 0 if rows is None else rows - len(matrix)
    return np.pad(matrix, ((0, more), (0, columns - matrix.shape[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="smollm2", help="a GGUF file of architecture llama")
    parser.add_argument("--llama-python", required=True, metavar="PYTHON")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"])
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    whole = arguments.directory / "F32.gguf"
    Shuffled(Path(locate(arguments.model).path)).write(whole)
    made = [(str(arguments.directory / f"{name}.gguf"), name) for name in arguments.types]
    asked = [(str(whole), target, name) for target, name in made]
    version = ask_llama(arguments.llama_python, {"quantize": asked})["version"]
    for file in (str(whole), *(target for target, _ in made)):
        print(f"{file}: {os.path.getsize(file) / 2**20:.1f} MiB", flush=True)
    print(f"by llama-cpp-python {version}", file=sys.stderr)


if __name__ == "__main__":
    main()
