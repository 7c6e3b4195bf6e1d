"""A 16-bit activation times a stored NVFP4 weight."""

from pallas_kernels.weight_only_matmul.api import weight_only_matmul

__all__ = ["weight_only_matmul"]
