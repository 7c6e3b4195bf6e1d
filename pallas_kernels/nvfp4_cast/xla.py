"""`cast` in plain JAX, equal to `reference.py` in every byte."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, UInt8

from pallas_kernels.common.formats import (
    CARRIERS,
    E4M3_MIN,
    E4M3_NAN,
    FP8_CARRIER_SHIFT,
    CarriedArray,
    Int8Array,
    NVFP4Array,
)
from pallas_kernels.common.xla import expand_to, in_code_units
from pallas_kernels.rotate_quantize.xla import quantize_int8, rotate


@functools.partial(jax.jit, static_argnames="to")
def cast(array: NVFP4Array, *, to: str) -> Int8Array | CarriedArray | BFloat16[Array, "*rows k"]:
    """See `api.cast`."""
    match to:
        case "int8":
            return to_int8(array)
        case "bfloat16":
            return to_bfloat16(array)
        case _:
            return carry(in_code_units(array), scale_a_row(array), carrier=to, hadamard=array.hadamard)


def to_int8(array: NVFP4Array) -> Int8Array:
    """INT8, one scale a row."""
    units = quantize_int8(in_code_units(array), hadamard=array.hadamard)
    return dataclasses.replace(units, scale=jnp.maximum(units.scale * scale_a_row(array), 2.0**-126))


def carry(
    units: Float32[Array, "*rows k"], tensor_scale: Float32[Array, "*rows"], *, carrier: str, hadamard: int
) -> CarriedArray:
    """Values in code units, E2M1(code) * E4M3(block scale), and the tensor scale of each row, in a carrier."""
    if carrier == "exact":
        return CarriedArray(codes=units.astype(CARRIERS[carrier]), scale=tensor_scale, hadamard=hadamard)
    codes = jax.lax.bitcast_convert_type(encode_e4m3(units * FP8_CARRIER_SHIFT), CARRIERS[carrier])
    return CarriedArray(codes=codes, scale=tensor_scale * (1 / FP8_CARRIER_SHIFT), hadamard=hadamard)


def encode_e4m3(values: Float32[Array, "*n"]) -> UInt8[Array, "*n"]:
    """E4M3 byte of values of magnitude at most 448, nearest, ties to even, with the sign of zero; NaN is 0x7F."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    magnitude = jnp.abs(values)
    # Keep 3 of 23 mantissa bits: add just under half of what is dropped, and one more if the kept part is odd.
    kept = bits & 0x7FFFFFFF
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = jnp.round(magnitude * (1 / E4M3_MIN)).astype(jnp.int32)
    code = jnp.where(magnitude < 2.0**-6, subnormal, normal) | ((bits >> 24) & 0x80)
    return jnp.where(magnitude <= 448.0, code, E4M3_NAN).astype(jnp.uint8)


def to_bfloat16(array: NVFP4Array) -> BFloat16[Array, "*rows k"]:
    """The weight itself, rotated back."""
    return (rotate(in_code_units(array), array.hadamard) * scale_a_row(array)[..., None]).astype(jnp.bfloat16)


def scale_a_row(array: NVFP4Array) -> Float32[Array, "*rows"]:
    """Tensor scale of each row."""
    rows = array.shape[:-1]
    return jnp.broadcast_to(expand_to(array.tensor_scale, len(rows)), rows)
