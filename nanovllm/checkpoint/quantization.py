"""Which weights of a checkpoint are kept quantized, and how: by the user's wish or its own config.

The memory plan and the worker ask. A format's arithmetic is a file in `worker/quant`; embeddings
and the head stay as they are. No torch.
"""

import re
from typing import Any, Literal, NoReturn

from msgspec import Struct
from msgspec.structs import replace

from nanovllm.checkpoint.spec import DecoderSpec, linear_parts
from nanovllm.config import Quantization

SUPPORTED = "an unquantized checkpoint, a GGUF file, or FP8 in compressed-tensors format"
BYTES_PER_WEIGHT: dict[Quantization, float] = {"fp8": 1.0}  # scales are not worth counting
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True}
ANY_LINEAR = "Linear"


class WeightFormat(Struct, frozen=True):
    """How the weights of a linear layer are kept.

    scales: how many of them share one: all outputs of a matrix, or the inputs of each output.
    stored: the checkpoint holds them so, with their scales; else they are quantized as they come.
    """

    method: Quantization
    scales: Literal["tensor", "channel"] = "channel"
    stored: bool = False

    @property
    def bytes_per_weight(self) -> float:
        return BYTES_PER_WEIGHT[self.method]


class Rule(Struct, frozen=True):
    """A format, and the modules that have it: by name, by pattern after "re:", or all."""

    format: WeightFormat
    targets: tuple[str, ...] = (ANY_LINEAR,)


class Scheme(Struct, frozen=True):
    """What of a model is quantized. Modules are named as in safetensors checkpoints.

    Rules that name a module go before those for any linear layer; `ignored` goes before all.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def at_load(cls, method: Quantization) -> "Scheme":
        """For a checkpoint that is not quantized."""
        return cls((Rule(WeightFormat(method)),))

    def quantizing(self) -> "Scheme":
        """The same for weights that come unquantized."""
        rules = [Rule(replace(rule.format, stored=False), rule.targets) for rule in self.rules]
        return replace(self, rules=tuple(rules))

    def format_of(self, module: str) -> WeightFormat | None:
        """Of one linear layer; None: unquantized."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return None
        for rule in self.rules:
            if any(_matches(target, module) for target in rule.targets):
                return rule.format
        return next((rule.format for rule in self.rules if ANY_LINEAR in rule.targets), None)

    def format_of_all(self, modules: list[str]) -> WeightFormat | None:
        """Of the modules of one merged layer. Raises `ValueError` if it is not the same."""
        first, *others = modules
        found = self.format_of(first)
        for other in others:
            if self.format_of(other) != found:
                raise ValueError(
                    f"config.json: quantization_config treats {first} otherwise than {other}, "
                    f"which are multiplied as one: use {SUPPORTED}"
                )
        return found


def choose_scheme(wanted: Quantization | None, config: dict[str, Any]) -> Scheme | None:
    """The scheme that a checkpoint's config tells of, else the user's, else None.

    Raises `ValueError` naming field and remedy if the checkpoint is quantized in another way.
    """
    found = config.get("quantization_config")
    if found is None:
        return None if wanted is None else Scheme.at_load(wanted)
    if found.get("quant_method") != "compressed-tensors":
        _refuse(f"quant_method {found.get('quant_method')}")
    if found.get("format") != "float-quantized":
        _refuse(f"compressed-tensors, format {found.get('format')}")
    if found.get("kv_cache_scheme") is not None:
        _refuse("compressed-tensors with a kv_cache_scheme")
    groups = list((found.get("config_groups") or {}).values())
    if not groups:
        _refuse("compressed-tensors without config_groups")
    rules = tuple(
        Rule(_format_of_group(group), tuple(group.get("targets") or [ANY_LINEAR]))
        for group in groups
    )
    return Scheme(rules, ignored=tuple(found.get("ignore") or ()))


def bytes_per_linear_weight(spec: DecoderSpec, scheme: Scheme | None, *, value_bytes: int) -> float:
    """Average over the linear layers. value_bytes: of a number that is not quantized."""
    if scheme is None:
        return value_bytes
    num_weights = num_bytes = 0.0
    for index, layer in enumerate(spec.layers):
        for part in linear_parts(layer, spec.hidden_size):
            kept = scheme.format_of(spec.names.safetensors[part.name].format(index, 0))
            each = value_bytes if kept is None else kept.bytes_per_weight
            num_weights += part.num_weights
            num_bytes += part.num_weights * each
    return num_bytes / num_weights


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors means it: a name, or a regular expression after "re:"."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _format_of_group(group: dict[str, Any]) -> WeightFormat:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    scales = weights.get("strategy")
    if not (FLOAT8.items() <= weights.items() and scales in ("channel", "tensor")):
        _refuse("compressed-tensors, weights other than FP8 per channel or per tensor")
    if weights.get("dynamic") or group.get("output_activations") is not None:
        _refuse("compressed-tensors with quantized outputs or dynamic weights")
    dynamic_tokens = FLOAT8 | {"strategy": "token", "dynamic": True}
    if activations is None or not dynamic_tokens.items() <= activations.items():
        _refuse("compressed-tensors, activations other than FP8 per token, dynamic")
    return WeightFormat("fp8", scales, stored=True)


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"config.json: quantization_config ({what}) is not supported: use {SUPPORTED}")
