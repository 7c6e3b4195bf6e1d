"""Layers that more than one model uses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, all of it in float32 with two-pass variance, rounded once to `dtype`.

    flax's own computes E[x^2] - E[x]^2 and multiplies in the compute dtype; torch, whose results are the reference,
    does what is done here.

    Args:
        dim: width of the last axis.
        epsilon: added to the variance.
        dtype: of the result.
        param_dtype: dtype of scale and bias, which start as ones and zeros.
        rngs: not read.
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


def stack[M: nnx.Module](make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """Equal modules as one, to be scanned over: its parameters have a leading axis [count].

    Args:
        make: rngs -> module.
        count: number of modules.
        rngs: split into one for each.
    """
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))
