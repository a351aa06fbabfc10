"""What gates become in gated MLPs, for every kernel that gates.

Kernels take the name of the activation (`checkpoint.spec.Activation`) as a constant, those that may
also leave a product as it is None.
"""
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """silu(x) = x * sigmoid(x), or gelu by its tanh, which is x * sigmoid of what is below: twice
    the argument of tanh. gate: fp32."""
    if ACTIVATION == "silu":
        argument = gate
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        argument = tl.maximum(argument, -80.0)  # as good as any below, and its exp is finite
    return gate / (1 + tl.exp(-argument))
