"""What ranks hold that have whole experts, beside what one rank has."""

import torch

from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.checkpoint.quantization import Scheme
from nanovllm.worker.layers.moe import Experts
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.parallel import TensorParallel
from tests.worker.attention.decoding import Driver


def assert_experts_are_those_of_one_rank(
    checkpoint: Checkpoint, scheme: Scheme | None, *, size: int = 2
) -> None:
    """Bit for bit, however they are kept; none is missing, and none is held twice."""
    whole = mixtures(Driver.load(checkpoint, scheme=scheme).model)
    found: list[list[int]] = [[] for _ in whole]
    for rank in range(size):
        parallel = TensorParallel(rank, size, spreads_experts=True)
        own = mixtures(Driver.load(checkpoint, scheme=scheme, parallel=parallel).model)
        for numbers, one, many in zip(found, own, whole, strict=True):
            for number, pair in enumerate(one.each, one.first):
                numbers.append(number)
                for linear, expected in zip(pair, many.each[number], strict=True):
                    assert linear.method.kind == expected.method.kind
                    tensors = expected.method.tensors(expected)
                    for tensor in linear.method.tensors(linear):
                        assert torch.equal(tensor.float(), next(tensors).float())
                    assert next(tensors, None) is None
                    if expected.bias is not None:
                        assert linear.bias is not None
                        assert torch.equal(linear.bias, expected.bias)
    assert found == [list(range(experts.spec.num_experts)) for experts in whole]


def mixtures(model: Decoder) -> list[Experts]:
    return [layer.mlp.experts for layer in model.layers if hasattr(layer.mlp, "experts")]
