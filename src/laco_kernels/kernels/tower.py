"""``impl="triton"``: the operators inside a vision encoder."""

from laco_kernels.kernels.elementwise import activate_backward, activate_forward, gated_silu_backward, gated_silu_forward
from laco_kernels.kernels.norm import add_norm_backward, add_norm_forward

__all__ = [
    "activate_backward",
    "activate_forward",
    "add_norm_backward",
    "add_norm_forward",
    "gated_silu_backward",
    "gated_silu_forward",
]
