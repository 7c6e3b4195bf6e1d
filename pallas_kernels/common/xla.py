"""The codecs in plain JAX: integer and float32 arithmetic only, so any device and any kernel language can do the same.

No 4-bit or 8-bit float dtype is used: not every device converts them, and XLA may drop a conversion there and back.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.common.formats import BLOCK, E4M3_MAX, E4M3_MIN, E4M3_NAN, CarriedArray, Int8Array, NVFP4Array

_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Halfway points between neighbouring E2M1 values, and whether the tie goes up, to the even code."""


def _bits(values: Float32[Array, "*n"]) -> Int32[Array, "*n"]:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _from_bits(bits: Int32[Array, "*n"]) -> Float32[Array, "*n"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def encode_e4m3_scale(values: Float32[Array, "*n"]) -> UInt8[Array, "*n"]:
    """E4M3 byte of a block scale: clamped to [2^-9, 448], nearest, ties to even. NaN counts as 448."""
    values = jnp.maximum(jnp.where(values < E4M3_MAX, values, E4M3_MAX), E4M3_MIN)
    bits = _bits(values)
    # Keep 3 of 23 mantissa bits: add just under half of what is dropped, and one more if the kept part is odd.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = jnp.round(values * (1 / E4M3_MIN)).astype(jnp.int32)
    return jnp.where(values < 2.0**-6, subnormal, normal).astype(jnp.uint8)


def decode_e4m3(codes: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """Float32 value of each E4M3 byte, exact, all 256 of them."""
    codes = codes.astype(jnp.int32)
    magnitude = codes & 0x7F
    normal = _from_bits((magnitude + ((127 - 7) << 3)) << 20)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * E4M3_MIN, normal)
    value = jnp.where(magnitude == E4M3_NAN, jnp.nan, value)
    # A product, because Triton negates by subtracting from zero, which loses the sign of one.
    return value * jnp.where(codes >= 0x80, -1.0, 1.0)


def encode_e2m1_magnitude(values: Float32[Array, "*n"], scale: Float32[Array, "*m"]) -> Int32[Array, "*n"]:
    """E2M1 code, 0 to 7, of non-negative values / scale, rounded once: nearest, ties to even, saturating.

    No quotient is formed. Each value is compared with the seven midpoints times the scale, and those products are exact
    because the scale is an E4M3 value. `scale` broadcasts against `values`.
    """
    code = jnp.zeros(jnp.broadcast_shapes(values.shape, scale.shape), jnp.int32)
    for midpoint, ties_up in _MIDPOINTS:
        threshold = midpoint * scale
        code += (values >= threshold if ties_up else values > threshold).astype(jnp.int32)
    return code


def decode_e2m1(codes: UInt8[Array, "*n"] | Int32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Float32 value of each E2M1 code, 0 to 15, exact."""
    codes = codes.astype(jnp.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    halves = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    value = halves.astype(jnp.float32) * 0.5
    return jnp.where(codes >= 8, -value, value)


def pack(codes: UInt8[Array, "*rows k"]) -> UInt8[Array, "*rows half"]:
    """4-bit codes [..., K] to bytes [..., K/2]; the value of even index takes the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Array, "*rows half"]) -> UInt8[Array, "*rows k"]:
    """Bytes [..., K/2] to 4-bit codes [..., K]."""
    return jnp.stack([packed & 0xF, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def in_code_units(array: NVFP4Array) -> Float32[Array, "*rows k"]:
    """[..., K], exact: E2M1(code) * E4M3(block scale), without the tensor scale. Fits in bfloat16."""
    codes = decode_e2m1(unpack(jnp.asarray(array.codes)))
    return codes * jnp.repeat(decode_e4m3(jnp.asarray(array.scales)), BLOCK, -1)


def dequantize(array: NVFP4Array | Int8Array | CarriedArray, dtype: DTypeLike = jnp.float32) -> Float[Array, "*rows k"]:
    """Values [..., K]: exact product, rounded once to float32, then to `dtype`. A rotated array stays rotated."""
    if isinstance(array, Int8Array | CarriedArray):
        values, scale = jnp.asarray(array.codes).astype(jnp.float32), array.scale
    else:
        values, scale = in_code_units(array), array.tensor_scale
    return (values * expand_to(scale, values.ndim)).astype(dtype)


def rounded(values: Float32[Array, "*n"], dtype: DTypeLike) -> Float[Array, "*n"]:
    """Values in a dtype, rounded to nearest even; to bfloat16 for certain, where XLA may leave out a conversion that is
    followed by the opposite one."""
    if dtype == jnp.bfloat16:
        values = jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype)


def reciprocal(values: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """1 / values, correctly rounded, for normal positive values below 2^127.

    A GPU's own division is an ulp off here and there, and codes that depend on it would differ from the definition.
    """
    bits = _bits(values)
    mantissa = _from_bits((bits & 0x7FFFFF) | (127 << 23))
    exponent = _from_bits((2 * 127 << 23) - (bits & (0xFF << 23)))
    return nearest_reciprocal(mantissa, 1 / mantissa) * exponent


def nearest_reciprocal(x: Float32[Array, "*n"], guess: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """The float32 closest to 1 / x for x in [1, 2), from a guess that is at most 2 ulp off.

    Halves of 12 bits make every product exact, so that what 1 - x * r leaves is nearly so, whether or not a compiler
    fuses; one Newton step then leaves the nearest value or a neighbour of it.
    """

    def split(x: Float32[Array, "*n"]) -> tuple[Float32[Array, "*n"], Float32[Array, "*n"]]:
        high = _from_bits(_bits(x) & ~0xFFF)
        return high, x - high

    x_high, x_low = split(x)

    def left(r: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
        r_high, r_low = split(r)
        return ((1 - x_high * r_high) - x_high * r_low - x_low * r_high) - x_low * r_low

    best = guess + guess * left(guess)
    for step in (-1, 1):
        other = _from_bits(_bits(best) + step)
        best = jnp.where(jnp.abs(left(other)) < jnp.abs(left(best)), other, best)
    return best


def expand_to(scale: Float32[Array | np.ndarray, "*leading"], ndim: int) -> Float32[Array, "*expanded"]:
    """A scale of leading axes, given trailing axes of one so that it broadcasts against an array of `ndim` axes."""
    return jnp.reshape(scale, scale.shape + (1,) * (ndim - scale.ndim))
