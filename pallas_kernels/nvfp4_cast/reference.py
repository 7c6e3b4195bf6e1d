"""The definition of `cast`, in NumPy.

`E2M1(code) * E4M3(block scale)`, the value in code units, is exact in bfloat16: a multiple of 2^-10 of at most 6
significant bits. Every target is made from it, row by row, and the tensor scale multiplies the result: so codes do not
depend on the tensor scale.
"""

import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels.common.formats import CARRIERS, E4M3_NAN, FP8_CARRIER_SHIFT, CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.common.reference import in_code_units
from pallas_kernels.rotate_quantize.reference import quantize_int8, rotate

SMALLEST_NORMAL = np.float32(2.0**-126)
TARGETS = ("int8", *CARRIERS, "bfloat16")


def cast(array: NVFP4Array, *, to: str) -> Int8Array | CarriedArray | np.ndarray:
    """See `api.cast`."""
    match to:
        case "int8":
            return to_int8(array)
        case "bfloat16":
            return to_bfloat16(array)
        case _:
            return carried(array, to)


def to_int8(array: NVFP4Array) -> Int8Array:
    """INT8 of the values in code units; then row scale times tensor scale, one float32 product, at least 2^-126."""
    units = quantize_int8(in_code_units(array).astype(np.float32), hadamard=array.hadamard)
    with np.errstate(under="ignore"):
        scale = np.asarray(units.scale) * _a_row(array)
    return dataclasses.replace(units, scale=np.maximum(scale, SMALLEST_NORMAL))


def carried(array: NVFP4Array, carrier: str) -> CarriedArray:
    """The array in a carrier."""
    return carry(in_code_units(array).astype(np.float32), _a_row(array), carrier=carrier, hadamard=array.hadamard)


def carry(units: np.ndarray, tensor_scale: np.ndarray, *, carrier: str, hadamard: int) -> CarriedArray:
    """Values in code units, float32 [..., K], and tensor scales, float32 [...], in a carrier; NaN is the byte 0x7F."""
    if carrier == "exact":
        return CarriedArray(codes=units.astype(CARRIERS[carrier]), scale=tensor_scale, hadamard=hadamard)
    codes = (units * np.float32(FP8_CARRIER_SHIFT)).astype(CARRIERS[carrier])
    codes = np.where(np.isnan(units), np.uint8(E4M3_NAN), codes.view(np.uint8)).view(CARRIERS[carrier])
    return CarriedArray(codes=codes, scale=tensor_scale * np.float32(1 / FP8_CARRIER_SHIFT), hadamard=hadamard)


def to_bfloat16(array: NVFP4Array) -> np.ndarray:
    """Values in code units, rotated in the order of `rotate_quantize.reference.rotate`, times the tensor scale in
    float32, then rounded to bfloat16."""
    units = rotate(in_code_units(array).astype(np.float32), array.hadamard)
    return (units * _a_row(array)[..., None]).astype(ml_dtypes.bfloat16)


def _a_row(array: NVFP4Array) -> np.ndarray:
    """Tensor scale, float32 [...], of each row."""
    scale = np.asarray(array.tensor_scale)
    rows = array.shape[:-1]
    return np.broadcast_to(scale.reshape(scale.shape + (1,) * (len(rows) - scale.ndim)), rows)
