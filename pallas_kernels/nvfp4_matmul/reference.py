"""The definition of `nvfp4_matmul`, in NumPy: casts, and the product of what they give."""

import numpy as np

from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.nvfp4_cast.reference import carried
from pallas_kernels.scaled_matmul.reference import scaled_matmul


def nvfp4_matmul(a: NVFP4Array, b: NVFP4Array, *, carrier: str, epilogue: Epilogue) -> np.ndarray:
    """Float64 [..., N] before the one rounding to the type of the result; "native" is what "exact" is."""
    carrier = "exact" if carrier == "native" else carrier
    return scaled_matmul(carried(a, carrier), carried(b, carrier), epilogue=epilogue)
