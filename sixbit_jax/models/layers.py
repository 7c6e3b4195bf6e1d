"""Layers that more than one model uses."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

logger = logging.getLogger(__name__)


@functools.cache
def _attention_implementation(dtype: jnp.dtype) -> str:
    chosen = "cudnn" if jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16) else "xla"
    logger.info("attention in %s runs on %s", dtype, chosen)
    return chosen


def attention(
    query: Float[Array, "batch tokens heads head"],
    key: Float[Array, "batch tokens heads head"],
    value: Float[Array, "batch tokens heads head"],
) -> Float[Array, "batch tokens heads head"]:
    """Full softmax attention scaled by head ** -0.5: cuDNN for 16-bit inputs on a GPU, XLA otherwise (logged once)."""
    implementation = _attention_implementation(query.dtype)
    with jax.numpy_dtype_promotion("standard"):  # its XLA path promotes 16-bit logits to float32 implicitly
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, all of it in float32 with two-pass variance, rounded once to `dtype`.

    flax's own computes E[x^2] - E[x]^2 and multiplies in the compute dtype; torch, whose results are the reference,
    does what is done here.
    """

    def __init__(self, dim: int, *, epsilon: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


def stack(make, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules made by `make(rngs)` as one module whose parameters have a leading axis [count]."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))
