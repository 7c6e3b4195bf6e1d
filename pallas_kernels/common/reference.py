"""What the codecs mean, in NumPy: tables, and rounding to the nearest entry of a table."""

import numpy as np

from pallas_kernels.common.formats import BLOCK, E2M1_VALUES, E4M3_MAX, E4M3_MIN, CarriedArray, Int8Array, NVFP4Array

E2M1_TABLE = np.array(E2M1_VALUES)


def _e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * E4M3_MIN


E4M3_TABLE = np.array([_e4m3_value(code) for code in range(0x7F)])
"""Values of the non-negative finite codes 0x00 to 0x7E, float64 and exact."""


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index (uint8) of the entry of an ascending table closest to each float64 value.

    A value halfway between two entries takes the one of even index, whose last mantissa bit is 0. Values outside the
    table saturate.
    """
    midpoints = (table[:-1] + table[1:]) / 2
    low, high = np.searchsorted(midpoints, values, "left"), np.searchsorted(midpoints, values, "right")
    return np.where(low % 2 == 0, low, high).astype(np.uint8)


def encode_e4m3_scale(values: np.ndarray) -> np.ndarray:
    """E4M3 byte of a block scale: clamped to [2^-9, 448], nearest, ties to even. NaN counts as 448."""
    values = np.nan_to_num(np.asarray(values, np.float64), nan=E4M3_MAX)
    return nearest(np.clip(values, E4M3_MIN, E4M3_MAX), E4M3_TABLE)


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Float64 value of each E4M3 byte, all 256 of them."""
    table = np.append(E4M3_TABLE, np.nan)
    return np.where(codes & 0x80, -1.0, 1.0) * table[codes & 0x7F]


def decode_e2m1(codes: np.ndarray) -> np.ndarray:
    """Float64 value of each E2M1 code, 0 to 15."""
    return np.where(codes & 8, -1.0, 1.0) * E2M1_TABLE[codes & 7]


def pack(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., K] of 4-bit codes to bytes [..., K/2]; the value of even index takes the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Bytes [..., K/2] to 4-bit codes, uint8 [..., K]."""
    return np.stack([packed & 0xF, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def in_code_units(array: NVFP4Array) -> np.ndarray:
    """Float64 [..., K], exact: E2M1(code) * E4M3(block scale), without the tensor scale."""
    codes = decode_e2m1(unpack(np.asarray(array.codes)))
    return codes * np.repeat(decode_e4m3(np.asarray(array.scales)), BLOCK, -1)


def dequantize(array: NVFP4Array | Int8Array | CarriedArray) -> np.ndarray:
    """Float32 [..., K]: the exact value, rounded once. A rotated array stays rotated."""
    if isinstance(array, Int8Array | CarriedArray):
        values, scale = np.asarray(array.codes, np.float64), np.asarray(array.scale)
    else:
        values, scale = in_code_units(array), np.asarray(array.tensor_scale)
    scale = scale.astype(np.float64).reshape(scale.shape + (1,) * (values.ndim - scale.ndim))
    return (values * scale).astype(np.float32)
