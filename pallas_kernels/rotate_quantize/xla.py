"""`rotate_quantize` in plain JAX, equal to `reference.py` in every byte.

Reciprocals of constants are written as constants to multiply by: XLA turns a division by a constant into that anyway,
and the result would depend on whether it did.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

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
from pallas_kernels.common.xla import (
    decode_e2m1,
    decode_e4m3,
    encode_e2m1_magnitude,
    encode_e4m3_scale,
    expand_to,
    pack,
    reciprocal,
)
from pallas_kernels.rotate_quantize.types import RowStatistics

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@functools.partial(jax.jit, static_argnames=("format", "hadamard", "scale_dims", "four_over_six", "carrier"))
def rotate_quantize(
    x: Float[Array, "*rows k"],
    *,
    format: str,
    hadamard: int,
    tensor_scale: Float32[Array, "*leading"] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.rotate_quantize`; `hadamard` is a block size or 0."""
    from pallas_kernels.nvfp4_cast.xla import cast  # it imports this module

    x = prepare(x)
    magnitude = jnp.abs(x)
    statistics = RowStatistics(sum_abs=magnitude.sum(-1), max_abs=magnitude.max(-1))
    rotated = rotate(x, hadamard)
    if format == "int8":
        return quantize_int8(rotated, hadamard=hadamard), statistics
    array = quantize_nvfp4(
        rotated, tensor_scale=tensor_scale, scale_dims=scale_dims, four_over_six=four_over_six, hadamard=hadamard
    )
    return (array if carrier is None else cast(array, to=carrier)), statistics


def prepare(x: Float[Array, "*rows k"]) -> Float32[Array, "*rows k"]:
    """To float32, with magnitudes under 2^-96 replaced by zero."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < FLUSH_BELOW, 0.0, x)


def rotate(x: Float32[Array, "*rows k"], hadamard: int) -> Float32[Array, "*rows k"]:
    """x times the orthonormal block Hadamard matrix, in the order of additions of the reference."""
    if hadamard == 0:
        return x
    y = x.reshape(*x.shape[:-1], -1, hadamard) * (1 / hadamard)
    stride = 1
    while stride < hadamard:
        pairs = y.reshape(*y.shape[:-1], -1, 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([a + b, a - b], -2).reshape(y.shape)
        stride *= 2
    return (y * float(np.sqrt(hadamard))).reshape(x.shape)


def quantize_int8(x: Float32[Array, "*rows k"], *, hadamard: int = 0) -> Int8Array:
    """Symmetric INT8 of float32 rows."""
    finite, magnitude = _finite_magnitude(x)
    scale = jnp.maximum(magnitude.max(-1) * (1 / INT8_MAX), MIN_SCALE)
    codes = jnp.round(jnp.where(finite, x, 0.0) * reciprocal(scale)[..., None])
    bad = ~finite.all(-1)
    codes = jnp.where(bad[..., None], 0.0, jnp.clip(codes, -INT8_MAX, INT8_MAX)).astype(jnp.int8)
    return Int8Array(codes=codes, scale=jnp.where(bad, jnp.nan, scale), hadamard=hadamard)


def quantize_nvfp4(
    x: Float32[Array, "*rows k"],
    *,
    tensor_scale: Float32[Array, "*leading"] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    hadamard: int = 0,
) -> NVFP4Array:
    """NVFP4 of float32 rows; the reference has the steps."""
    finite, magnitude = _finite_magnitude(x)
    if tensor_scale is None:
        largest = E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX
        tensor_scale = magnitude.max(tuple(range(scale_dims, x.ndim))) * (1 / (E2M1_MAX * largest))
    tensor_scale = jnp.maximum(tensor_scale, MIN_SCALE)
    units = jnp.minimum(magnitude * expand_to(reciprocal(tensor_scale), x.ndim), MAX_CODE_UNITS)

    blocks = units.reshape(*x.shape[:-1], -1, BLOCK)
    amax = blocks.max(-1)
    scales, codes = _encode(blocks, amax * (1 / 6))
    if four_over_six:
        scales_4, codes_4 = _encode(blocks, amax * (1 / 4))
        fixed_point = _reciprocal_power_of_two(scales) * 2.0**11
        take_4 = _squared_error(blocks, codes_4, scales_4, fixed_point) < _squared_error(
            blocks, codes, scales, fixed_point
        )
        scales = jnp.where(take_4, scales_4, scales)
        codes = jnp.where(take_4[..., None], codes_4, codes)

    bad = ~finite.reshape(blocks.shape).all(-1)
    codes = codes | jnp.where(x.reshape(blocks.shape) < 0, 8, 0)
    codes = jnp.where(bad[..., None], 0, codes).astype(jnp.uint8)
    scales = jnp.where(bad, jnp.uint8(E4M3_NAN), scales)
    return NVFP4Array(codes=pack(codes.reshape(x.shape)), scales=scales, tensor_scale=tensor_scale, hadamard=hadamard)


def _finite_magnitude(x: Float32[Array, "*n"]) -> tuple[Bool[Array, "*n"], Float32[Array, "*n"]]:
    """Which values are finite, and |x| with the others replaced by zero."""
    magnitude = jnp.abs(x)
    finite = magnitude <= _FLOAT32_MAX
    return finite, jnp.where(finite, magnitude, 0.0)


def _encode(
    blocks: Float32[Array, "*rows blocks 16"], wanted: Float32[Array, "*rows blocks"]
) -> tuple[UInt8[Array, "*rows blocks"], Int32[Array, "*rows blocks 16"]]:
    scales = encode_e4m3_scale(wanted)
    return scales, encode_e2m1_magnitude(blocks, decode_e4m3(scales)[..., None])


def _reciprocal_power_of_two(scales: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """One over the largest power of two that is no more than a positive E4M3 value."""
    bits = jax.lax.bitcast_convert_type(decode_e4m3(scales), jnp.int32)
    return jax.lax.bitcast_convert_type((2 * 127 - (bits >> 23)) << 23, jnp.float32)


def _squared_error(
    blocks: Float32[Array, "*rows blocks 16"],
    codes: Int32[Array, "*rows blocks 16"],
    scales: UInt8[Array, "*rows blocks"],
    fixed_point: Float32[Array, "*rows blocks"],
) -> Int32[Array, "*rows blocks"]:
    """At most 16 * 2^26, so int32 is enough."""
    error = jnp.abs(blocks - decode_e2m1(codes) * decode_e4m3(scales)[..., None])
    steps = jnp.minimum(jnp.round(error * fixed_point[..., None]), 2.0**13).astype(jnp.int32)
    return (steps * steps).sum(-1)
