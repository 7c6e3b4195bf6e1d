"""A stored NVFP4 weight, cast for an INT8 matmul."""

from pallas_kernels.weight_to_int8.api import weight_to_int8

__all__ = ["weight_to_int8"]
