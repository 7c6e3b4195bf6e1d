"""Full softmax attention in 16 bit."""

from pallas_kernels.attention.api import attention

__all__ = ["attention"]
