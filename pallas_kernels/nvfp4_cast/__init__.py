"""A packed NVFP4 array, decoded to what a matmul takes."""

from pallas_kernels.nvfp4_cast.api import cast

__all__ = ["cast"]
