"""What quantized weights cost in quality: next-token distributions over real text, against bf16's.

    python benchmarks/quality.py [--model smollm2] [--texts 8] [--tokens 256] [--tokens-per-step N]
        [--variants int4 q4_k …] [--files GGUF …] [--llama-python PYTHON]

The text is Python's own language reference, which comes with every Python. Prints, per variant, the
bytes per weight of the layers' matrices, the mean, median, 99th percentile and largest
KL(reference ‖ variant) per token in nats, how often both think the same token likeliest, and the
variant's perplexity. The weights of each variant are rounded from the reference's: Q4_K and Q8_0 as
llama.cpp lays them out, each group from its least to its greatest number; MXFP4 as its
specification has it, which engines else serve for experts alone. float32 shows how far bf16 itself
is from exact arithmetic, and "tokens as they are" what the kernel for one token does on a GPU: FP8
weights times activations that are not quantized. "Calibrated" caches have scales as checkpoints
bring them: each layer's largest key and value over as many other chapters, by e4m3's largest
number. On a CPU the variants "native" are steps of the C++ kernels: of the weights as a GGUF file
stores them, widened to bfloat16, or rounded at load (`--dtype float32` compares them with exact
arithmetic). `--files` are GGUF files of the same model, each as stored, natively
(`quality_files.py` makes some); with `--llama-python`, an interpreter that has llama-cpp-python,
llama.cpp's perplexity stands beside theirs and, if it is a GGUF file, the reference's.
"""

import argparse
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F  # noqa: N812
from msgspec.structs import replace
from quality_files import ask_llama
from torch import Tensor

from nanovllm.checkpoint.facts import spec_from_config
from nanovllm.checkpoint.locate import locate
from nanovllm.checkpoint.quantization import (
    AT_LOAD,
    GGUF_FORMATS,
    MXFP4,
    SUPER_GROUP,
    Rule,
    Scheme,
    WeightFormat,
)
from nanovllm.config import KVCacheDType
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.device import DTYPES, choose_device, choose_kv_dtype, num_usable_cores
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.select import select_kernels
from nanovllm.worker.kv_cache import allocate
from nanovllm.worker.layers.linear import Linear, WeightSlot
from nanovllm.worker.model_runner import Model
from nanovllm.worker.models.blocks import CacheScales
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.models.native import NativeDecoder, take_as_stored
from nanovllm.worker.parallel import Cut
from nanovllm.worker.quant.fp8 import Fp8
from nanovllm.worker.quant.packed import Packed
from nanovllm.worker.quant.rounding import E4M3_MAX
from nanovllm.worker.weights import load_weights

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Variant:
    """A way to run the model: the configuration fields that tell it from another."""

    name: str
    dtype: str
    kept: WeightFormat | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    is_calibrated: bool = False  # of an FP8 cache
    quantizes_tokens: bool = True
    is_native: bool = False
    as_stored: bool = False  # of a GGUF file, by native steps


class Widened(Fp8):
    """FP8 weights, widened, times tokens as they are."""

    kind = "widened"

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        assert linear.scale is not None
        product = F.linear(x, linear.weight.to(x.dtype)).float().mul_(linear.scale)
        return (product if linear.bias is None else product.add_(linear.bias)).to(x.dtype)


class NestedRounded:
    """As `rounding.Rounded`, into scales and mins of 6 bits: Q4_K (a `packed.Layout`)."""

    def slots(
        self, method: Packed, linear: Linear, part: str, cut: Cut, rows: slice
    ) -> Iterator[WeightSlot]:
        def put(values: Tensor, of: slice) -> None:
            first = rows.start + (of.start or 0)
            self._put(method, part, slice(first, first + len(values)), values)

        yield WeightSlot(part, "weight", linear.weight[rows], (cut, linear.inputs), put=put)

    def _put(self, method: Packed, part: str, rows: slice, values: Tensor) -> None:
        weight = method.weight
        padding = -values.shape[1] % SUPER_GROUP
        padded = F.pad(values.to(weight.codes.device).float(), (0, padding))
        groups = padded.view(len(values), -1, SUPER_GROUP // 32, 32)
        low = -groups.amin(-1).clamp(max=0.0)
        step = (groups.amax(-1).clamp(min=0.0) + low) / 15
        (whole, scale), (least, shift) = (self._six_bits(each) for each in (step, low))
        wide = (whole.float() * scale)[..., None].clamp(min=1e-12)
        codes = ((groups + (least.float() * shift)[..., None]) / wide).round().clamp(0, 15)
        count = weight.scale.shape[1]
        narrow = [each.flatten(1)[:, :count].to(torch.int8) for each in (scale, shift)]
        method.put_codes(part, rows, codes.flatten(1)[:, : weight.inputs])
        weight.set_nested(rows, *narrow)
        weight.set_super(rows, whole[..., 0], -least[..., 0])

    def _six_bits(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """The scale of each super group, float16, and what it is multiplied by."""
        whole = (each.amax(-1, keepdim=True) / 63).half()
        return whole, (each / whole.float().clamp(min=1e-12)).round().clamp(0, 63)


class Scorer:
    """A loaded model with room for one text."""

    def __init__(self, model: str, variant: Variant, *, num_tokens: int) -> None:
        checkpoint, self._device = locate(model), choose_device("auto")
        config = checkpoint.config()
        spec = replace(spec_from_config(config), max_position_embeddings=num_tokens)
        dtype = DTYPES[variant.dtype]
        specs = attention_specs(
            spec,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=self._device,
            kv_dtype=choose_kv_dtype(variant.kv_cache_dtype, self._device),
        )
        attention, _ = select_attention("auto", specs)
        kernels = select_kernels(self._device).layers
        self._model = Decoder(
            spec,
            kernels=kernels,
            attention=attention,
            dtype=dtype,
            device=self._device,
            scheme=None if variant.kept is None else Scheme((Rule(variant.kept),)),
        )
        for linear in self._model.linears():
            if isinstance(linear.method, Packed) and linear.method.kept.is_nested:
                linear.method.layout = NestedRounded()
        if variant.as_stored:
            take_as_stored(self._model)
        load_weights(
            self._model,
            checkpoint,
            load_format="auto",
            seed=0,
            on_progress=lambda phase, progress: None,
            prepacks=not variant.is_native,
        )
        self._step: Model = self._model
        self.bytes_per_weight: float = dtype.itemsize
        if variant.kept is not None:
            self.bytes_per_weight = variant.kept.bytes_per_weight
        if variant.as_stored:
            tensors = checkpoint.gguf.tensors.items()
            stored = [one for name, one in tensors if "blk." in name and len(one.shape) == 2]
            num_weights = sum(math.prod(one.shape) for one in stored)
            self.bytes_per_weight = sum(one.raw.nbytes for one in stored) / num_weights
        if variant.is_native:
            native.use(native.choose_isa(), num_threads=num_usable_cores())
            self._step = NativeDecoder(self._model)
        if not variant.quantizes_tokens:
            for linear in self._model.linears():
                linear.method = linear.method if linear.scale is None else Widened()
        num_blocks = 1 + -(-num_tokens // BLOCK_SIZE)
        shape = attention.kv_shape(num_layers=spec.num_layers, num_blocks=num_blocks)
        self._cache = allocate(shape, dtype=attention.spec.cache_dtype, device=self._device)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], tokens_per_step: int) -> Tensor:
        """After each token, [num_tokens, vocab_size], in the model's precision and host memory."""
        results = []
        for start in range(0, len(token_ids), tokens_per_step):
            batch = self._batch(token_ids[start : start + tokens_per_step], start)
            self._model.attention.prepare(batch)
            residual = self._step.forward(batch, self._cache)
            results.append(self._step.raw_logits(residual).cpu())
        return torch.cat(results)

    def peaks(self) -> Tensor:
        """The largest magnitudes that the cache holds, [2, num_layers]: keys', then values'."""
        return self._cache.float().abs().flatten(2).amax(-1)

    def calibrate(self, peaks: Tensor) -> None:
        """Scale the FP8 cache by what `peaks` said of the reference's."""
        for index, layer in enumerate(self._model.layers):
            attention, scales = layer.attention, CacheScales()
            for slot, peak in zip(scales.slots(index), peaks[:, index], strict=True):
                assert slot.put is not None
                slot.put(peak[None] / E4M3_MAX, slice(0, 1))
            attention.scales = scales
            attention.settle()

    def _batch(self, token_ids: list[int], start: int) -> ForwardBatch:
        count, end = len(token_ids), start + len(token_ids)
        positions = torch.arange(start, end, device=self._device)
        blocks = torch.arange(1, self._cache.shape[2], dtype=torch.int32, device=self._device)
        return ForwardBatch(
            input_ids=torch.tensor(token_ids, device=self._device),
            positions=positions,
            slot_mapping=positions + BLOCK_SIZE,
            query_start_loc=torch.tensor([0, count], dtype=torch.int32, device=self._device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=self._device),
            block_tables=blocks[None],
            num_tokens=count,
            num_rows=1,
            num_decode_rows=int(count == 1),
            max_query_len=count,
            max_seq_len=end,
        )


def real_texts(
    model: str, *, num_texts: int, num_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The beginnings of long chapters of the language reference, from all over it, and of as many
    others to calibrate by."""
    tokenizer = Tokenizer.load(model)
    chapters = [topics[name] for name in sorted(topics) if len(topics[name]) > 6 * num_tokens]
    apart = max(1, len(chapters) // num_texts)
    chosen, others = (
        [tokenizer.encode(text)[:num_tokens] for text in chapters[first::apart][:num_texts]]
        for first in (0, apart // 2)
    )
    return chosen, others


def report(
    name: str,
    bytes_per_weight: float,
    found: list[Tensor],
    reference: list[Tensor],
    texts: list[list[int]],
    peer: float | None,
) -> None:
    """One line: `found` and `reference` are the logits of each text; peer: llama.cpp's
    perplexity."""
    divergences, agreements, losses = [], [], []
    for ours, theirs, token_ids in zip(found, reference, texts, strict=True):
        log_q = ours.float().log_softmax(-1)
        log_p = theirs.float().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreements.append(log_p.argmax(-1) == log_q.argmax(-1))
        losses.append(-log_q[:-1].gather(1, torch.tensor(token_ids)[1:, None])[:, 0])
    kl, agrees = torch.cat(divergences), torch.cat(agreements).double().mean()
    perplexity = torch.cat(losses).mean().exp()
    print(
        f"{name:24} {bytes_per_weight:6.3f} {kl.mean():9.5f} {kl.median():9.5f} "
        f"{kl.quantile(0.99):9.5f} {kl.max():9.5f} {agrees:9.2%} {perplexity:11.3f}"
        + ("" if peer is None else f" {peer:10.3f}"),
        flush=True,
    )


def peer_perplexity(python: str | None, model: str, texts: list[list[int]]) -> float | None:
    """llama.cpp's of the same file; None without an interpreter, or if the model is no GGUF."""
    checkpoint = locate(model)
    if python is None or checkpoint.format != "gguf":
        return None
    found = ask_llama(python, {"score": [str(checkpoint.path)], "texts": texts})
    return float(found["perplexities"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    parser.add_argument("--tokens-per-step", type=int, help="default: all at once")
    parser.add_argument("--variants", nargs="+", help="names of some; default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the reference")
    parser.add_argument("--files", nargs="+", default=[], help="of the same model, natively")
    parser.add_argument("--llama-python", metavar="PYTHON", help="one that has llama-cpp-python")
    arguments = parser.parse_args()
    sizes = {"num_texts": arguments.texts, "num_tokens": arguments.tokens}
    texts, others = real_texts(arguments.model, **sizes)
    step = arguments.tokens_per_step or arguments.tokens
    dtype = arguments.dtype
    fp8, small = AT_LOAD["fp8"], {"group": 32}
    variants = [
        Variant(dtype, dtype),
        Variant("float32", "float32"),
        Variant("int8", dtype, AT_LOAD["int8"]),
        Variant("q8_0", dtype, WeightFormat("packed", "group", bits=8, group=32)),
        Variant("fp8", dtype, fp8),
        Variant("fp8, tokens as they are", dtype, fp8, quantizes_tokens=False),
        Variant("int4", dtype, AT_LOAD["int4"]),
        Variant("int4, groups of 32", dtype, replace(AT_LOAD["int4"], **small)),
        Variant("q4_k", dtype, replace(GGUF_FORMATS["Q4_K"], layout=None, unit=1)),
        Variant("mxfp4", dtype, replace(MXFP4, layout=None)),
        Variant("fp8 KV", dtype, kv_cache_dtype="fp8"),
        Variant("fp8 KV, calibrated", dtype, kv_cache_dtype="fp8", is_calibrated=True),
        Variant("fp8 and fp8 KV", dtype, fp8, kv_cache_dtype="fp8"),
        Variant("the same, calibrated", dtype, fp8, kv_cache_dtype="fp8", is_calibrated=True),
    ]
    if native.unusable() is None and choose_device("auto").type == "cpu":
        half = partial(Variant, dtype="bfloat16", is_native=True)
        if locate(arguments.model).format == "gguf":
            variants.append(half("native, as stored", as_stored=True))
        variants += [
            half("native, bfloat16"),
            half("native, q8_0", kept=WeightFormat("packed", "group", bits=8, group=32)),
            half("native, int8", kept=AT_LOAD["int8"]),
            half("native, int4", kept=AT_LOAD["int4"]),
        ]
    if arguments.variants:
        variants = [one for one in variants if one.name in (dtype, *arguments.variants)]
    print(
        f"{arguments.model}: {sum(map(len, texts))} tokens of Python {platform.python_version()}'s "
        f"reference, {step} a step, {choose_device('auto').type}, torch {torch.__version__}"
    )
    print(
        f"{'':24} {'bytes':>6} {'mean KL':>9} {'median':>9} {'99 %':>9} {'max':>9} {'agree':>9} "
        "perplexity" + ("" if arguments.llama_python is None else "  llama.cpp")
    )
    reference: list[Tensor] = []
    peaks: Tensor | None = None
    runs = [(arguments.model, variant) for variant in variants]
    for file in arguments.files:
        name = os.path.basename(file)
        runs.append((file, Variant(name, "bfloat16", is_native=True, as_stored=True)))
    for model, variant in runs:
        scorer = Scorer(model, variant, num_tokens=arguments.tokens)
        if peaks is None:
            for token_ids in others:
                scorer.logits(token_ids, step)
                found = scorer.peaks()
                peaks = found if peaks is None else peaks.maximum(found)
        if variant.is_calibrated:
            scorer.calibrate(peaks)
        logits = [scorer.logits(token_ids, step) for token_ids in texts]
        peer = None
        if variant.as_stored or not reference:
            peer = peer_perplexity(arguments.llama_python, model, texts)
        reference = reference or logits
        report(variant.name, scorer.bytes_per_weight, logits, reference, texts, peer)


if __name__ == "__main__":
    main()
