"""Adaptive layer norm, block Hadamard rotation and quantisation in one operation."""

from pallas_kernels.adaln_quantize.api import adaln_quantize

__all__ = ["adaln_quantize"]
