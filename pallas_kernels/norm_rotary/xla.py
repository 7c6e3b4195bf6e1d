"""`norm_rotary` in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Norm = tuple[Float[Array, " head"], Float[Array, " head"]]
Rotary = tuple[Float32[Array, "tokens head"], Float32[Array, "tokens head"]]


def norm_rotary(
    qkv: Float[Array, "batch tokens heads head"], *, query: Norm, key: Norm, rotary: Rotary | None, epsilon: float
) -> Float[Array, "batch tokens heads head"]:
    """See `api.norm_rotary`."""
    q, k, v = jnp.split(qkv, 3, axis=2)
    q, k = (_normed(x, *norm, epsilon) for x, norm in ((q, query), (k, key)))
    if rotary is not None:
        q, k = (_rotated(x, *rotary) for x in (q, k))
    return jnp.concatenate([q, k, v], axis=2)


def _normed(
    x: Float[Array, "batch tokens heads head"],
    scale: Float[Array, " head"],
    bias: Float[Array, " head"],
    epsilon: float,
) -> Float[Array, "batch tokens heads head"]:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _rotated(
    x: Float[Array, "batch tokens heads head"], cos: Float32[Array, "tokens head"], sin: Float32[Array, "tokens head"]
) -> Float[Array, "batch tokens heads head"]:
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x.astype(jnp.float32) * cos[None, :, None, :] + turned * sin[None, :, None, :]).astype(x.dtype)
