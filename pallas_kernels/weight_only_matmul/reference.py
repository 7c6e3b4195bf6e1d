"""The definition of `weight_only_matmul`, in NumPy: the exact product, in float64."""

import numpy as np

from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CarriedArray, NVFP4Array, sylvester
from pallas_kernels.common.reference import in_code_units
from pallas_kernels.scaled_matmul.reference import scaled_matmul


def weight_only_matmul(x: np.ndarray, weight: NVFP4Array, *, epilogue: Epilogue) -> np.ndarray:
    """Float64 [..., N], before the one rounding to the type of the result.

    Implementations round the weight, or the weight and x, to bfloat16, or rotate x in float32 instead of the weight;
    each says how far it may be from this.
    """
    tensor_scale = np.broadcast_to(np.asarray(weight.tensor_scale, np.float64), weight.shape[:1])
    return scaled_matmul(
        CarriedArray(codes=np.asarray(x, np.float64), scale=np.ones(x.shape[:-1])),
        CarriedArray(codes=rotate(in_code_units(weight), weight.hadamard), scale=tensor_scale),
        epilogue=epilogue,
    )


def rotate(values: np.ndarray, hadamard: int) -> np.ndarray:
    """Float64 values [..., K] times the orthonormal block Hadamard matrix, which is its own inverse."""
    if hadamard == 0:
        return values
    blocks = values.reshape(*values.shape[:-1], -1, hadamard)
    return (blocks @ (sylvester(hadamard) / np.sqrt(hadamard))).reshape(values.shape)
