"""`weight_only_matmul` in plain JAX: the weight cast to bfloat16, and XLA's own dot."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.common.epilogue import Epilogue, apply
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.nvfp4_cast import xla as nvfp4_cast


def weight_only_matmul(
    x: Float[Array, "*rows k"], weight: NVFP4Array, *, epilogue: Epilogue, out_dtype: DTypeLike
) -> Float[Array, "*rows n"]:
    """See `api.weight_only_matmul`. Within 2^-8 of the sum of |x| |w| of the definition, and the final rounding."""
    return matmul(x, nvfp4_cast.cast(weight, to="bfloat16"), epilogue=epilogue, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnames="out_dtype")
def matmul(
    x: Float[Array, "*rows k"], weight: BFloat16[Array, "n k"], *, epilogue: Epilogue, out_dtype: DTypeLike
) -> Float[Array, "*rows n"]:
    """The linear layer of a weight in bfloat16; x is rounded to bfloat16, sums are float32."""
    y = jax.lax.dot_general(
        x.astype(jnp.bfloat16),
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    return apply(epilogue, y).astype(out_dtype)
