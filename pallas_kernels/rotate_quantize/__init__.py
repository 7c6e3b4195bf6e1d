"""Block Hadamard rotation and quantisation to NVFP4 or INT8."""

from pallas_kernels.rotate_quantize.api import RowStatistics, rotate_quantize

__all__ = ["RowStatistics", "rotate_quantize"]
