"""Full softmax attention in 16 bit."""

from pallas_kernels.attention.api import attention, packed_attention

__all__ = ["attention", "packed_attention"]
