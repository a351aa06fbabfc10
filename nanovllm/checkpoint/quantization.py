"""Which weights of a checkpoint are kept quantized, and how: by the user's wish or its own config.

The memory plan and the worker ask. A format's arithmetic is a file in `worker/quant`; of a GGUF
file the embedding and the head are kept so, too, of others they stay as they are. No torch.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn

from msgspec import Struct
from msgspec.structs import replace

from nanovllm.checkpoint.damage import blaming
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.spec import DecoderSpec, WeightGroup, linear_parts
from nanovllm.config import Quantization

SUPPORTED = (
    "an unquantized checkpoint, a GGUF file, AWQ, GPTQ, FP8, MXFP4 experts, or compressed-tensors "
    "with weights of 4 or 8 bits"
)
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True}
KV_FLOAT8 = {**FLOAT8, "strategy": "tensor", "dynamic": False}
INT8 = {"type": "int", "num_bits": 8, "symmetric": True}
ANY_LINEAR = "Linear"
SCALE_BYTES = 2
SUPER_GROUP = 256
ENDS: dict[str, WeightGroup] = {"embedding": "embedding", "lm_head": "head"}
MOST_COPIED = 2**23  # FP8 weights of a layer: few are read in less time than kernels take to follow

Method = Literal["fp8", "int8", "packed", "mxfp4"]
Scales = Literal["tensor", "channel", "group", "block"]
Layout = Literal["compressed-tensors", "fp8", "awq", "gptq", "gptq_v2", "mxfp4", "gguf"]


class WeightFormat(Struct, frozen=True):
    """How the weights of a linear layer are kept.

    method: the file of `worker/quant` that multiplies by them. "fp8" and "int8" quantize tokens,
    too; "packed" weights have a scale for each group of inputs, and tokens stay as they are;
    "mxfp4" weights are floats of 4 bits with a power of two for each group, and tokens stay, too.
    scales: which weights share one: all of a matrix, of an output, `group` inputs of an output, or
    a block of `group` inputs and as many outputs. bits: of a weight. has_zeros: a group has a zero
    point, too, has_shifts: a number that is added. is_nested: both are integers, with a scale for
    each SUPER_GROUP inputs. is_float: packed weights of 8 bits are e4m3 and not integers. tokens:
    how the scales of tokens are found. is_reordered: inputs are grouped in an order of their own
    (GPTQ's `desc_act`). unit: inputs that a file stores as one. layout: whose files hold the
    weights so; None: they are quantized as they come.
    """

    method: Method
    scales: Scales = "channel"
    bits: int = 8
    group: int = 0
    has_zeros: bool = False
    has_shifts: bool = False
    is_nested: bool = False
    is_float: bool = False
    tokens: Literal["dynamic", "static"] = "dynamic"
    is_reordered: bool = False
    unit: int = 1
    layout: Layout | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the checkpoint holds them so, with their scales."""
        return self.layout is not None

    @property
    def bytes_per_weight(self) -> float:
        """With the scales of groups; those of whole outputs are not worth counting."""
        if not self.group:
            return self.bits / 8
        scale = 2 * SCALE_BYTES if self.scales == "block" else SCALE_BYTES
        scale = 1 if self.method == "mxfp4" else scale
        num_scales = 1 + self.has_shifts
        if self.is_nested:
            per_weight = num_scales * (1 / self.group + SCALE_BYTES / SUPER_GROUP)
        else:
            per_weight = (num_scales * scale + self.has_zeros) / self.group
        return self.bits / 8 + per_weight

    def __str__(self) -> str:
        if self.method == "mxfp4":
            return "MXFP4 weights"
        if self.method == "packed" and not self.is_float:
            groups = f" in groups of {self.group}" if self.group else ""
            return f"{self.bits}-bit integer weights{groups}"
        blocks = f" in blocks of {self.group}" if self.group else ""
        return f"{'INT8' if self.method == 'int8' else 'FP8'} weights{blocks}"


AT_LOAD: dict[Quantization, WeightFormat] = {
    "fp8": WeightFormat("fp8"),
    "int8": WeightFormat("packed", "group", bits=8, group=128),
    "int4": WeightFormat("packed", "group", bits=4, group=128, has_zeros=True),
}


MXFP4 = WeightFormat("mxfp4", "group", bits=4, group=32, layout="mxfp4")
MXFP4_OF_GGUF = WeightFormat("mxfp4", "group", bits=4, group=32, unit=32, layout="gguf")


class Rule(Struct, frozen=True):
    """A format, and the modules that have it: by name, by pattern after "re:", or all.

    format: None if they are not quantized.
    """

    format: WeightFormat | None
    targets: tuple[str, ...] = (ANY_LINEAR,)


class Scheme(Struct, frozen=True):
    """What of a model is quantized. Modules are named as in safetensors checkpoints.

    Rules that name a module go before those for any linear layer; `ignored` goes before all.
    has_kv_scales: it brings a scale for the keys of each layer and one for the values, to keep them
    in FP8.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    has_kv_scales: bool = False

    @classmethod
    def at_load(cls, method: Quantization) -> "Scheme":
        """For a checkpoint that is not quantized."""
        return cls((Rule(AT_LOAD[method]),))

    @property
    def is_stored(self) -> bool:
        """Whether the checkpoint holds its weights so."""
        return any(rule.format is not None and rule.format.is_stored for rule in self.rules)

    def quantizing(self) -> "Scheme":
        """The same for weights that come unquantized."""
        rules = [Rule(_at_load(rule.format), rule.targets) for rule in self.rules]
        return replace(self, rules=tuple(rules), has_kv_scales=False)

    def format_of(self, module: str) -> WeightFormat | None:
        """Of one linear layer; None: unquantized."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return None
        for rule in self.rules:
            if any(_matches(target, module) for target in rule.targets):
                return rule.format
        return next((rule.format for rule in self.rules if ANY_LINEAR in rule.targets), None)

    def format_of_end(self, module: str) -> WeightFormat | None:
        """Of the embedding or the head, which only a rule that names it quantizes."""
        named = (rule.format for rule in self.rules if module in rule.targets)
        return next(named, None)

    def format_of_all(self, modules: list[str]) -> WeightFormat | None:
        """Of the modules of one merged layer.

        Raises `ValueError` if it is not the same. Those of GGUF files may differ: the layer has one
        that loses nothing of any.
        """
        first, *others = modules
        found = self.format_of(first)
        formats = [self.format_of(module) for module in modules]
        if MXFP4_OF_GGUF in formats:  # experts: there is nothing between it and what it comes as
            return MXFP4_OF_GGUF if len(set(formats)) == 1 else None
        if any(one is not None and one.layout == "gguf" for one in formats):
            return _joined(formats)
        for other in others:
            if self.format_of(other) != found:
                raise ValueError(
                    f"config.json: quantization_config treats {first} otherwise than {other}, "
                    f"which are multiplied as one: use {SUPPORTED}"
                )
        return found


def choose_scheme(wanted: Quantization | None, config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a checkpoint's config tells of, else the user's, else None.

    Raises `ValueError` naming field and remedy if the checkpoint is quantized in another way.
    """
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None:
        return None if wanted is None else Scheme.at_load(wanted)
    with blaming("config.json"):
        method = found.get("quant_method")
        if method not in READERS:
            _refuse(f"quant_method {method}", OTHERS.get(str(method), SUPPORTED))
        return READERS[method](found)


def scheme_for(
    checkpoint: Checkpoint, spec: DecoderSpec, wanted: Quantization | None, *, is_gpu: bool
) -> Scheme | None:
    """`choose_scheme`, and on a GPU what a GGUF file holds, which is kept so. (CPUs have kernels of
    their own for that, but for experts.)"""
    scheme = choose_scheme(wanted, checkpoint.config())
    if scheme is None and checkpoint.format == "gguf":
        return _gguf(checkpoint, spec, experts_only=not is_gpu)
    return scheme


def is_copied(kept: WeightFormat | None, parts: Iterable[str], num_weights: int) -> bool:
    """Whether a GPU that multiplies FP8 also keeps a layer's weights unquantized, for few tokens.

    parts: of which the layer consists; num_weights: that one rank holds. Experts are many.
    """
    is_single = not any(part.startswith("expert_") for part in parts)
    return kept is not None and kept.method == "fp8" and is_single and num_weights < MOST_COPIED


def bytes_per_linear_weight(
    spec: DecoderSpec,
    scheme: Scheme | None,
    *,
    value_bytes: int,
    num_ranks: int = 1,
    copies: bool = False,
) -> float:
    """Average over the linear layers. value_bytes: of a number that is not quantized. copies:
    whether those are kept that `is_copied` tells of, by each of so many ranks."""
    if scheme is None:
        return value_bytes
    num_weights = num_bytes = 0.0
    for index, layer in enumerate(spec.layers):
        parts = list(linear_parts(layer, spec.hidden_size))
        for part in parts:
            kept = scheme.format_of(spec.names.safetensors[part.name].format(index, 0))
            each = value_bytes if kept is None else kept.bytes_per_weight
            merged = [other for other in parts if other.layer == part.layer]
            num_merged = sum(other.num_weights for other in merged)
            if copies and is_copied(kept, [part.name], num_merged // num_ranks):
                each += value_bytes
            num_weights += part.num_weights
            num_bytes += part.num_weights * each
    return num_bytes / num_weights


def bytes_per_end_weight(
    spec: DecoderSpec, scheme: Scheme | None, *, value_bytes: int
) -> dict[WeightGroup, float]:
    """Of the embedding and of the head. What a layer has of an embedding of its own is not
    quantized."""
    sizes: dict[WeightGroup, float] = dict.fromkeys(ENDS.values(), value_bytes)
    for part, group in ENDS.items():
        module = spec.names.safetensors[part]
        kept = None if scheme is None else scheme.format_of_end(module)
        if kept is not None:
            sizes[group] = kept.bytes_per_weight
    own, of_layers = spec.hidden_size, spec.num_layers * spec.input_size
    sizes["embedding"] = (own * sizes["embedding"] + of_layers * value_bytes) / (own + of_layers)
    return sizes


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors means it: a name, or a regular expression after "re:"."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _at_load(kept: WeightFormat | None) -> WeightFormat | None:
    if kept is None:
        return None
    if kept.method in ("fp8", "int8"):
        return WeightFormat(kept.method)
    zeros = kept.has_zeros or kept.has_shifts
    changes = dict.fromkeys(("is_reordered", "has_shifts", "is_nested"), False)
    return replace(kept, layout=None, unit=1, has_zeros=zeros, **changes)


def _refuse(what: str, remedy: str = SUPPORTED) -> NoReturn:
    raise ValueError(f"config.json: quantization_config ({what}) is not supported: use {remedy}")


# ---- compressed-tensors, as llm-compressor writes it

# format → what its weights may be
FORMATS = {
    "pack-quantized": "int",
    "int-quantized": "int",
    "float-quantized": "float",
    "naive-quantized": None,
    "mixed-precision": None,
}


def _compressed_tensors(found: Mapping[str, Any]) -> Scheme:
    named = found.get("format")
    if named not in FORMATS:
        known = str(named).removesuffix("-quantized").removesuffix("-pack")
        _refuse(f"compressed-tensors, format {named}", OTHERS.get(known, SUPPORTED))
    cached = found.get("kv_cache_scheme")
    if cached is not None and not KV_FLOAT8.items() <= {"dynamic": False, **cached}.items():
        _refuse(f"compressed-tensors, kv_cache_scheme {cached}", "one of FP8 with static scales")
    if (found.get("sparsity_config") or {}).get("format", "dense") != "dense":
        _refuse("compressed-tensors with sparse weights")
    groups = list((found.get("config_groups") or {}).values())
    if not groups:
        _refuse("compressed-tensors without config_groups")
    rules = tuple(
        Rule(_format_of_group(group, named), tuple(group.get("targets") or [ANY_LINEAR]))
        for group in groups
    )
    ignored = tuple(found.get("ignore") or ())
    return Scheme(rules, ignored=ignored, has_kv_scales=cached is not None)


def _format_of_group(group: Mapping[str, Any], named: str) -> WeightFormat:
    named = group.get("format") or named
    weights, tokens = group.get("weights") or {}, group.get("input_activations")
    if weights.get("dynamic") or group.get("output_activations") is not None:
        _refuse("compressed-tensors with quantized outputs or dynamic weights")
    if named == "pack-quantized" and tokens is None:
        return _packed_format(weights)
    kind: Literal["fp8", "int8"] = "fp8" if FLOAT8.items() <= weights.items() else "int8"
    if kind == "int8" and not INT8.items() <= weights.items():
        _refuse("compressed-tensors, weights other than integers of 4 or 8 bits, or FP8")
    if FORMATS.get(named, weights["type"]) not in (None, weights["type"]):
        _refuse(f"compressed-tensors, {weights['type']} weights in format {named}")
    scales = weights.get("strategy")
    if kind == "fp8" and scales == "block":
        return _block_format(weights.get("block_structure"), "compressed-tensors")
    if scales not in ("channel", "tensor"):
        _refuse(f"compressed-tensors, {kind} weights with scales per {scales}")
    if kind == "fp8" and tokens is None:
        return WeightFormat("packed", scales, is_float=True, layout="compressed-tensors")
    return WeightFormat(kind, scales, tokens=_tokens(tokens, kind), layout="compressed-tensors")


def _packed_format(weights: Mapping[str, Any]) -> WeightFormat:
    bits, scales, group = weights.get("num_bits"), weights.get("strategy"), 0
    if weights.get("type") != "int" or bits not in (4, 8):
        _refuse(f"compressed-tensors, packed {weights.get('type')} weights of {bits} bits")
    if scales == "group":
        group = _group_size(weights.get("group_size"))
    elif scales != "channel":
        _refuse(f"compressed-tensors, packed weights with scales per {scales}")
    return WeightFormat(
        "packed",
        scales,
        bits=bits,
        group=group,
        has_zeros=not weights.get("symmetric", True),
        is_reordered=weights.get("actorder") in ("group", "dynamic", True),
        layout="compressed-tensors",
    )


def _tokens(tokens: Mapping[str, Any] | None, kind: str) -> Literal["dynamic", "static"]:
    """How tokens that meet 8-bit weights are quantized."""
    meant = FLOAT8 if kind == "fp8" else INT8
    if tokens is not None and meant.items() <= tokens.items():
        if tokens.get("dynamic") is True and tokens.get("strategy") == "token":
            return "dynamic"
        if not tokens.get("dynamic") and tokens.get("strategy") == "tensor":
            return "static"
    _refuse(f"compressed-tensors, activations other than {kind} per token, or per tensor if static")


def _block_format(block: Any, layout: Layout) -> WeightFormat:
    if not (isinstance(block, list) and len(block) == 2 and block[0] == block[1]):
        _refuse(f"FP8 weights in blocks of {block}")
    group = _group_size(block[0])
    return WeightFormat("packed", "block", group=group, is_float=True, layout=layout)


def _group_size(size: Any) -> int:
    """0: all inputs of an output share a scale."""
    if size == -1:
        return 0
    if not isinstance(size, int) or size < 16 or size % 16:
        _refuse(f"groups of {size}")
    return size


# ---- others' layouts


def _fp8(found: Mapping[str, Any]) -> Scheme:
    """DeepSeek's and Qwen's own FP8 files, in blocks, and AutoFP8's, with a scale for a matrix."""
    dynamic = found.get("activation_scheme") == "dynamic"
    if found.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        _refuse(f"fp8, fmt {found.get('fmt')}")
    if found.get("scale_fmt") not in (None, "float"):
        _refuse(f"fp8, scale_fmt {found.get('scale_fmt')}")
    if found.get("weight_block_size") is not None:
        kept = _block_format(found["weight_block_size"], "fp8")
    else:
        kept = WeightFormat(
            "fp8", "tensor", tokens="dynamic" if dynamic else "static", layout="fp8"
        )
    return Scheme((Rule(kept),), ignored=_skipped(found, "modules_to_not_convert"))


def _awq(found: Mapping[str, Any]) -> Scheme:
    version = str(found.get("version", "gemm")).lower()
    if version != "gemm":
        _refuse(f"awq, version {version}", "a checkpoint of version gemm, or " + SUPPORTED)
    bits = found.get("bits", found.get("w_bit"))
    if bits != 4:
        _refuse(f"awq with {bits} bits")
    kept = WeightFormat(
        "packed",
        "group",
        bits=4,
        group=_group_size(found.get("group_size", found.get("q_group_size"))),
        has_zeros=True,  # stored even where they are all alike
        layout="awq",
    )
    return Scheme((Rule(kept),), ignored=_skipped(found, "modules_to_not_convert"))


def _gptq(found: Mapping[str, Any]) -> Scheme:
    """Also with GPTQModel's `dynamic`: patterns of modules that are kept otherwise."""
    layout = found.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        _refuse(f"gptq, checkpoint_format {layout}")
    if found.get("lm_head"):
        _refuse("gptq with a quantized lm_head")
    rules = [Rule(_gptq_format(found, layout))]
    for pattern, changes in (found.get("dynamic") or {}).items():
        target = f"re:{pattern.removeprefix('+:').removeprefix('-:')}"
        skipped = pattern.startswith("-:")
        kept = None if skipped else _gptq_format({**found, **changes}, layout)
        rules.insert(-1, Rule(kept, (target,)))
    return Scheme(tuple(rules), ignored=_skipped(found, "modules_in_block_to_not_quantize"))


def _gptq_format(found: Mapping[str, Any], layout: Literal["gptq", "gptq_v2"]) -> WeightFormat:
    if found.get("bits") not in (4, 8):
        _refuse(f"gptq with {found.get('bits')} bits")
    return WeightFormat(
        "packed",
        "group",
        bits=found["bits"],
        group=_group_size(found.get("group_size")),
        has_zeros=True,
        is_reordered=bool(found.get("desc_act")),
        layout=layout,
    )


def _mxfp4(found: Mapping[str, Any]) -> Scheme:
    """gpt-oss's: experts alone are quantized, whatever else the config lists."""
    return Scheme((Rule(MXFP4, (r"re:.*\.experts(\..*)?$",)),))


def _skipped(found: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Modules that are not quantized: each entry is one, or some modules' common part of a path."""
    names = found.get(field) or ()
    return tuple(rf"re:(.*\.)?{re.escape(name)}(\..*)?$" for name in names)


# ---- GGUF: a type for each tensor


def _of_gguf(
    bits: int,
    group: int = 32,
    unit: int = 32,
    *,
    has_shifts: bool = False,
    is_nested: bool = False,
) -> WeightFormat:
    return WeightFormat(
        "packed",
        "group",
        bits=bits,
        group=group,
        has_shifts=has_shifts,
        is_nested=is_nested,
        unit=unit,
        layout="gguf",
    )


# Codes of 5 and 6 bits are kept in 8, and so are the numbers that IQ4_NL's 4 bits stand for.
GGUF_FORMATS: dict[str, WeightFormat] = {
    "Q4_0": _of_gguf(4),
    "Q4_1": _of_gguf(4, has_shifts=True),
    "Q5_0": _of_gguf(8),
    "Q5_1": _of_gguf(8, has_shifts=True),
    "Q8_0": _of_gguf(8),
    "IQ4_NL": _of_gguf(8),
    "Q4_K": _of_gguf(4, 32, SUPER_GROUP, has_shifts=True, is_nested=True),
    "Q5_K": _of_gguf(8, 32, SUPER_GROUP, has_shifts=True, is_nested=True),
    "Q6_K": _of_gguf(8, 16, SUPER_GROUP, is_nested=True),
}
UNQUANTIZED_TYPES = ("F32", "F16", "BF16")
# What other types become: rounded to 8 bits, which are more than they have.
ROUNDED = WeightFormat("packed", "group", bits=8, group=32)


def _gguf(checkpoint: Checkpoint, spec: DecoderSpec, *, experts_only: bool) -> Scheme | None:
    """What the matrices of a file's layers, its embedding and its head are kept as; None if none is
    quantized. Experts come dequantized but for MXFP4, and so does what lies in one tensor with
    others."""
    tensors = checkpoint.gguf.tensors
    targets: dict[WeightFormat, list[str]] = {}
    for name, module, is_expert in _modules_of_gguf(spec):
        tensor = tensors.get(f"{name}.weight")
        if tensor is None:
            continue
        if is_expert:
            kept = MXFP4_OF_GGUF if tensor.type.name == "MXFP4" else None
        elif experts_only or tensor.type.name in UNQUANTIZED_TYPES:
            kept = None
        else:
            kept = GGUF_FORMATS.get(tensor.type.name, ROUNDED)
        if kept is not None:
            targets.setdefault(kept, []).append(module)
    rules = tuple(Rule(kept, tuple(modules)) for kept, modules in targets.items())
    return Scheme(rules) if rules else None


def _modules_of_gguf(spec: DecoderSpec) -> Iterator[tuple[str, str, bool]]:
    """Of what may be kept as stored: a file's name, the target of a rule, and whether these are a
    layer's experts."""
    names = spec.names
    for index, layer in enumerate(spec.layers):
        for part in linear_parts(layer, spec.hidden_size):
            name, module = names.gguf[part.name], names.safetensors[part.name]
            if part.name == "router" or list(names.gguf.values()).count(name) > 1:
                continue
            if part.copies > 1:
                each = re.escape(module.format(index, "EXPERT")).replace("EXPERT", r"\d+")
                yield name.format(index), f"re:{each}$", True
            else:
                yield name.format(index), module.format(index), False
    for end in ENDS:
        yield names.gguf[end], names.safetensors[end], False


def _joined(formats: list[WeightFormat | None]) -> WeightFormat | None:
    """The least format that holds all of these. None: one is not quantized."""
    kept = [one for one in formats if one is not None]
    if len(kept) < len(formats):
        return None
    if any(one.layout is None for one in kept):
        return ROUNDED
    return _of_gguf(
        max(one.bits for one in kept),
        min(one.group for one in kept),
        max(one.unit for one in kept),
        has_shifts=any(one.has_shifts for one in kept),
        is_nested=all(one.is_nested for one in kept),
    )


READERS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
FROM_ORIGINAL = "the original checkpoint with quantization="
# What would do instead of what is not supported, by the names that configs have for it.
OTHERS = {
    "aqlm": f"{FROM_ORIGINAL}'int4', or its GGUF",
    "bitsandbytes": f"{FROM_ORIGINAL}'int4' or 'int8', which quantizes as it loads, too",
    "eetq": f"{FROM_ORIGINAL}'int8'",
    "fbgemm_fp8": f"{FROM_ORIGINAL}'fp8', or its FP8 files in compressed-tensors format",
    "higgs": f"{FROM_ORIGINAL}'int4', or its GGUF",
    "hqq": f"{FROM_ORIGINAL}'int4'",
    "modelopt": f"{FROM_ORIGINAL}'fp8', or its files in compressed-tensors format",
    "mxfp6": f"{FROM_ORIGINAL}'int8' or 'fp8'",
    "mxfp8": f"{FROM_ORIGINAL}'fp8'",
    "nvfp4": f"{FROM_ORIGINAL}'int4', or its W4A16 or AWQ files",
    "quanto": f"{FROM_ORIGINAL}'int4' or 'int8'",
    "quark": f"{FROM_ORIGINAL}'fp8', or its files in compressed-tensors format",
    "torchao": f"{FROM_ORIGINAL}'int4', 'int8' or 'fp8'",
}
