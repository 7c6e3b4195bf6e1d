"""The definition of `scaled_matmul`, in NumPy."""

import numpy as np

from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CarriedArray, Int8Array


def accumulators(a: Int8Array | CarriedArray, b: Int8Array | CarriedArray) -> np.ndarray:
    """[..., N], the products of codes: float64, or int32 for int8 codes, exact because float64 sums of them are."""
    products = np.asarray(a.codes).astype(np.float64) @ np.asarray(b.codes).astype(np.float64).T
    return products if isinstance(a, CarriedArray) else products.astype(np.int32)


def scaled_matmul(a: Int8Array | CarriedArray, b: Int8Array | CarriedArray, *, epilogue: Epilogue) -> np.ndarray:
    """Float64 [..., N], before the one rounding to the type of the result.

    Implementations work in float32, in this order: accumulator, times a's scale, times b's, plus bias, activation,
    residual plus gate times that. The accumulators of int8 codes are exact in all of them.
    """
    y = accumulators(a, b).astype(np.float64)
    y = y * np.asarray(a.scale, np.float64)[..., None] * np.asarray(b.scale, np.float64)
    if epilogue.bias is not None:
        y = y + np.asarray(epilogue.bias, np.float64)
    if epilogue.activation == "gelu_tanh":
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    if epilogue.gate is not None:
        gate = np.asarray(epilogue.gate, np.float64)
        text = np.arange(y.shape[-2]) < epilogue.text_length
        y = np.asarray(epilogue.residual, np.float64) + np.where(text[:, None], gate[:, :1], gate[:, 1:]) * y
    return y
