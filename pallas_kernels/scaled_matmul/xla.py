"""`scaled_matmul` in plain JAX: one dot, and an epilogue that XLA fuses as it likes."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.epilogue import Epilogue, apply
from pallas_kernels.common.formats import CarriedArray, Int8Array


@functools.partial(jax.jit, static_argnames="out_dtype")
def scaled_matmul(
    a: Int8Array | CarriedArray, b: Int8Array | CarriedArray, *, epilogue: Epilogue, out_dtype: DTypeLike
) -> Float[Array, "*rows n"] | Int32[Array, "*rows n"]:
    """See `api.scaled_matmul`."""
    wide = jnp.int32 if isinstance(a, Int8Array) else jnp.float32
    accumulators = jax.lax.dot_general(
        a.codes,
        b.codes,
        (((a.codes.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=wide,
    )
    if out_dtype == jnp.int32:
        return accumulators
    y = accumulators.astype(jnp.float32) * a.scale[..., None] * b.scale
    return apply(epilogue, y).astype(out_dtype)
