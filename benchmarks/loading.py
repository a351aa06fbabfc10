"""Memory while a model loads: the peak beside what its weights take in the end.

    python benchmarks/loading.py [--model smollm2] [--device cpu] [--quantization int4]
    python benchmarks/loading.py --write int4 --sizes benchmarks/models/qwen3-8b --layers 4

Builds a model and loads its weights as a core does when it starts. On a GPU what torch's allocator
has given out is counted, on a CPU anonymous memory (pages of the file are apart: the system takes
them back). --write first makes a checkpoint of random numbers, with the widths of a config.json and
some of its layers: what a layer takes while it is loaded shows as well in a few as in all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import locate
from nanovllm.checkpoint.spec import linear_parts
from nanovllm.config import EngineConfig
from nanovllm.worker.startup import Startup
from nanovllm.worker.warmup.precompile import Precompiler

MIB = 2**20
GROUP = 128
# Anonymous memory of a process at its highest, in KiB: printed once standard input is closed.
WATCHER = """
import select, sys
highest = 0
while not select.select([0], [], [], 0.0005)[0]:
    with open(f"/proc/{sys.argv[1]}/status") as file:
        found = next(line for line in file if line.startswith("RssAnon"))
    highest = max(highest, int(found.split()[1]))
print(highest)
"""
WRITTEN = ("plain", "int4", "fp8")


def anonymous() -> int:
    """Bytes of this process now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Of a device's memory, above what was taken when it began."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._watcher: subprocess.Popen[str] | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            import os

            command = [sys.executable, "-c", WATCHER, str(os.getpid())]
            pipe = subprocess.PIPE
            self._watcher = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            self._before = anonymous()

    def end(self) -> int:
        """In bytes."""
        if self._watcher is None:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        found, _ = self._watcher.communicate()
        return int(found) * 1024 - self._before


def random_parts(name: str, outputs: int, inputs: int, form: str) -> dict[str, Tensor]:
    """What a checkpoint of a form holds of one matrix."""
    if form == "int4":
        codes = torch.randint(-(2**31), 2**31 - 1, (outputs, inputs // 8), dtype=torch.int32)
        scale = torch.full((outputs, inputs // GROUP), 0.01, dtype=torch.bfloat16)
        shape = torch.tensor([outputs, inputs])
        return {
            f"{name}.weight_packed": codes,
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": shape,
        }
    values = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    values.view(torch.int16).random_(0x3B00, 0x3D00)  # of 0.002 to 0.03
    if form == "plain":
        return {f"{name}.weight": values}
    scale = torch.full((outputs, 1), 0.01, dtype=torch.bfloat16)
    return {f"{name}.weight": values.to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def quantization_of(form: str) -> dict[str, object]:
    """What its config says, as llm-compressor writes it."""
    if form == "plain":
        return {}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
    if form == "int4":
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    else:
        group["input_activations"] = {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True
        }  # fmt: skip
    found = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if form == "int4" else "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return {"quantization_config": found}


def write(form: str, sizes: Path, num_layers: int, target: Path) -> None:
    """A file for each layer, and one for the rest."""
    config = json.loads((sizes / "config.json").read_text()) | {"num_hidden_layers": num_layers}
    config.pop("quantization_config", None)
    spec = spec_from_config(config)
    names, hidden = spec.names.safetensors, spec.hidden_size
    rest = random_parts(names["embedding"], spec.vocab_size, hidden, "plain")
    if not spec.tied_embeddings:
        rest |= random_parts(names["lm_head"], spec.vocab_size, hidden, "plain")
    rest[f"{names['final_norm']}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(rest, target / "model-rest.safetensors")
    files = dict.fromkeys(rest, "model-rest.safetensors")
    for index, layer in enumerate(spec.layers):
        tensors: dict[str, Tensor] = {}
        for part in linear_parts(layer, hidden):
            name = names[part.name].format(index)
            tensors |= random_parts(name, part.outputs, part.inputs, form)
        sizes_of_norms = dict.fromkeys(("attention_norm", "mlp_norm"), hidden)
        if layer.attention.qk_norm == "head":
            sizes_of_norms |= dict.fromkeys(("q_norm", "k_norm"), layer.attention.head_dim)
        for norm, size in sizes_of_norms.items():
            tensors[f"{names[norm].format(index)}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        save_file(tensors, target / f"model-{index}.safetensors")
        files |= dict.fromkeys(tensors, f"model-{index}.safetensors")
    index_of = json.dumps({"metadata": {}, "weight_map": files})
    (target / "model.safetensors.index.json").write_text(index_of)
    (target / "config.json").write_text(json.dumps(config | quantization_of(form)))


def measure(model: str, device: str, quantization: str | None, name: str) -> None:
    """Prints a line."""
    path = locate(model).path
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    fields = {"device": device, "quantization": quantization, "max_model_len": 512}
    config = EngineConfig.from_kwargs(model=model, **fields)
    startup = Startup(config, lambda *_: None, Precompiler())
    choice = startup._choose()
    peak = Peak(startup.device)
    loaded = startup._load(startup._build(choice), choice)
    highest, weights = peak.end(), startup._memory_bytes["weights"]
    assert loaded.model is not None
    print(
        f"{name:28} file {file_bytes / MIB:9.1f} MiB, weights {weights / MIB:9.1f}"
        f" ({weights / file_bytes:.2f} of it), peak {highest / MIB:9.1f}: "
        f"{highest / weights:.3f} of the weights, {(highest - weights) / MIB:+.1f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quantization", choices=["int4", "int8", "fp8"], help="at load")
    parser.add_argument("--write", choices=WRITTEN)
    parser.add_argument("--sizes", type=Path, default=Path("benchmarks/models/qwen3-8b"))
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    device, wish = arguments.device, arguments.quantization
    at_load = f", {wish} at load" if wish else ""
    if arguments.write is None:
        measure(arguments.model, device, wish, f"{arguments.model}{at_load}")
        return
    with tempfile.TemporaryDirectory() as directory:
        write(arguments.write, arguments.sizes, arguments.layers, Path(directory))
        name = f"{arguments.sizes.name}, {arguments.layers} layers, {arguments.write}{at_load}"
        measure(directory, device, wish, name)


if __name__ == "__main__":
    main()
