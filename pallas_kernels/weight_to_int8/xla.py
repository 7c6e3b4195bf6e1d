"""`weight_to_int8` in plain JAX, equal to `reference.py` in every byte."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.common.xla import expand_to, in_code_units
from pallas_kernels.rotate_quantize.xla import quantize_int8


@jax.jit
def weight_to_int8(weight: NVFP4Array) -> Int8Array:
    """See `api.weight_to_int8`."""
    units = quantize_int8(in_code_units(weight), hadamard=weight.hadamard)
    scale = units.scale * expand_to(weight.tensor_scale, units.scale.ndim)
    return dataclasses.replace(units, scale=jnp.maximum(scale, 2.0**-126))
