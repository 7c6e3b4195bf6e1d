"""The matmul of two NVFP4 operands, with the epilogue of a linear layer."""

from pallas_kernels.nvfp4_matmul.api import nvfp4_matmul

__all__ = ["nvfp4_matmul"]
