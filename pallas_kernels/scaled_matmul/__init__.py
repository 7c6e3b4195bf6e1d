"""The matmul of quantised operands, with the epilogue of a linear layer."""

from pallas_kernels.scaled_matmul.api import scaled_matmul

__all__ = ["scaled_matmul"]
