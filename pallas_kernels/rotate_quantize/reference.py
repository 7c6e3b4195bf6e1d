"""The definition of `rotate_quantize`, in NumPy. Every implementation returns these bytes.

What is rounded, and in which order, is part of the definition: operations written on float32 arrays are float32
operations, each rounded to nearest even; comparisons and choices are made on exact values in float64. A compiler that
fuses multiply and add changes nothing, since no product that rounds is added to anything (in four over six a minimum
stands between), and sums of squares are integers.

Only the rotation leaves freedom, and only to kernels that add in another order (a tensor core does): such a kernel says
how far it is from the rotation below, and the rest of the definition then holds, to the bit, for what it rotated to.
"""

import numpy as np

from pallas_kernels.common.formats import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MAX_FOUR_OVER_SIX,
    E4M3_NAN,
    FLUSH_BELOW,
    INT8_MAX,
    MAX_CODE_UNITS,
    MIN_SCALE,
    CarriedArray,
    Int8Array,
    NVFP4Array,
)
from pallas_kernels.common.reference import E2M1_TABLE, decode_e4m3, encode_e4m3_scale, nearest, pack
from pallas_kernels.rotate_quantize.types import RowStatistics

F32 = np.float32
_infinities_allowed = np.errstate(over="ignore", invalid="ignore")
ROTATION_BOUND = 9 * 2.0**-24
"""Largest |rotated - exact| over the 2-norm of the block, to first order: seven rounded sums, a rounded product and a
rounded constant, each worth at most 2^-24 of the block's 1-norm over sqrt(128), which is no more than its 2-norm."""


@_infinities_allowed
def rotate_quantize(
    x: np.ndarray,
    *,
    format: str,
    hadamard: int,
    tensor_scale: np.ndarray | np.float32 | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.rotate_quantize`; `hadamard` is a block size or 0. A carrier is what `nvfp4_cast` makes of the array."""
    from pallas_kernels.nvfp4_cast.reference import carried  # it imports this module

    x = prepare(x)
    statistics = RowStatistics(sum_abs=np.abs(x).sum(-1, dtype=np.float64).astype(F32), max_abs=np.abs(x).max(-1))
    rotated = rotate(x, hadamard)
    if format == "int8":
        return quantize_int8(rotated, hadamard=hadamard), statistics
    array = quantize_nvfp4(
        rotated, tensor_scale=tensor_scale, scale_dims=scale_dims, four_over_six=four_over_six, hadamard=hadamard
    )
    return (array if carrier is None else carried(array, carrier)), statistics


def prepare(x: np.ndarray) -> np.ndarray:
    """To float32, with magnitudes under 2^-96 replaced by zero."""
    x = x.astype(F32)
    return np.where(np.abs(x) < FLUSH_BELOW, F32(0), x)


@_infinities_allowed
def rotate(x: np.ndarray, hadamard: int) -> np.ndarray:
    """x times the symmetric orthonormal Sylvester-Hadamard matrix, block by block along the last axis, in float32.

    Multiply by 1/n (exact, and keeps the sums finite), then for stride 1, 2, 4 ... n/2 replace each pair
    (a, b) = (x[i], x[i + stride]) by (a + b, a - b), then multiply by sqrt(n).
    """
    if hadamard == 0:
        return x
    y = x.reshape(*x.shape[:-1], -1, hadamard) * F32(1 / hadamard)
    stride = 1
    while stride < hadamard:
        pairs = y.reshape(*y.shape[:-1], -1, 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], -2).reshape(y.shape)
        stride *= 2
    return (y * F32(np.sqrt(hadamard))).reshape(x.shape)


def quantize_int8(x: np.ndarray, *, hadamard: int = 0) -> Int8Array:
    """Symmetric INT8 of float32 rows: scale = amax * (1/127), code = round(x * (1/scale)), half to even."""
    finite = np.isfinite(x)
    magnitude = np.where(finite, np.abs(x), F32(0))
    scale = np.maximum(magnitude.max(-1) * F32(1 / INT8_MAX), F32(MIN_SCALE))
    codes = np.rint(np.where(finite, x, F32(0)) * (F32(1) / scale)[..., None])
    bad = ~finite.all(-1)
    codes = np.where(bad[..., None], 0, np.clip(codes, -INT8_MAX, INT8_MAX)).astype(np.int8)
    return Int8Array(codes=codes, scale=np.where(bad, F32(np.nan), scale), hadamard=hadamard)


@_infinities_allowed
def quantize_nvfp4(
    x: np.ndarray,
    *,
    tensor_scale: np.ndarray | np.float32 | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    hadamard: int = 0,
) -> NVFP4Array:
    """NVFP4 of float32 rows.

    1. tensor scale = amax * (1/2688) over the finite values, unless given; at least 2^-100. 2688 is 6 * 448; under four
       over six it is 6 * 256.
    2. u = |x| * (1 / tensor scale), at most 2^16: values in units of the tensor scale.
    3. block scale s = E4M3(amax(u) * (1/6)), from 2^-9 to 448.
    4. code = E2M1 nearest to u / s, exactly, ties to even; the sign bit is x < 0.

    Under four over six step 3 and 4 are done with amax(u) * (1/4) as well, and the block takes that if the sum of its
    squared errors is smaller, each error |u - code * s| rounded to a multiple of 2^-11 of the power of two under the
    first block scale (so that the sums are integers, the same in any order), and at most 4 of that power of two.
    """
    finite = np.isfinite(x)
    magnitude = np.where(finite, np.abs(x), F32(0))
    if tensor_scale is None:
        largest = E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX
        tensor_scale = magnitude.max(tuple(range(scale_dims, x.ndim))) * F32(1 / (E2M1_MAX * largest))
    tensor_scale = np.maximum(np.asarray(tensor_scale, F32), F32(MIN_SCALE))
    inverse = (F32(1) / tensor_scale).reshape(tensor_scale.shape + (1,) * (x.ndim - tensor_scale.ndim))
    units = np.minimum(magnitude * inverse, F32(MAX_CODE_UNITS))

    blocks = units.reshape(*x.shape[:-1], -1, BLOCK)
    amax = blocks.max(-1)
    scales = encode_e4m3_scale(amax * F32(1 / 6))
    codes = _codes(blocks, scales)
    if four_over_six:
        scales_4 = encode_e4m3_scale(amax * F32(1 / 4))
        codes_4 = _codes(blocks, scales_4)
        unit = 2.0 ** np.floor(np.log2(decode_e4m3(scales)))
        take_4 = _squared_error(blocks, codes_4, scales_4, unit) < _squared_error(blocks, codes, scales, unit)
        scales = np.where(take_4, scales_4, scales)
        codes = np.where(take_4[..., None], codes_4, codes)

    bad = ~finite.reshape(blocks.shape).all(-1)
    codes = codes | np.where(x.reshape(blocks.shape) < 0, np.uint8(8), np.uint8(0))
    codes = np.where(bad[..., None], np.uint8(0), codes)
    scales = np.where(bad, np.uint8(E4M3_NAN), scales)
    return NVFP4Array(codes=pack(codes.reshape(x.shape)), scales=scales, tensor_scale=tensor_scale, hadamard=hadamard)


def _codes(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return nearest(blocks.astype(np.float64) / decode_e4m3(scales)[..., None], E2M1_TABLE)


def _squared_error(blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray, unit: np.ndarray) -> np.ndarray:
    error = np.abs(blocks - (E2M1_TABLE[codes] * decode_e4m3(scales)[..., None]).astype(F32))
    steps = np.minimum(np.rint(error / unit[..., None] * 2.0**11), 2.0**13)
    return (steps.astype(np.int64) ** 2).sum(-1)
