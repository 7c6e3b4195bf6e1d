"""The delta cache's operations in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.common.xla import dequantize, rounded
from pallas_kernels.delta_cache.types import DeltaSums
from pallas_kernels.rotate_quantize import xla as rotation

Stored = Array | Int8Array | NVFP4Array


def store_delta(
    before: Float[Array, "batch tokens dim"], after: Float[Array, "batch tokens dim"], stored: Stored, *, compare: bool
) -> tuple[Stored, DeltaSums]:
    """See `api.store_delta`."""
    delta = rounded(after.astype(jnp.float32) - before.astype(jnp.float32), before.dtype)
    options = {"hadamard": 0, "tensor_scale": None, "four_over_six": False, "carrier": None}
    if isinstance(stored, Int8Array):
        entry, _ = rotation.rotate_quantize(delta, format="int8", scale_dims=0, **options)
    elif isinstance(stored, NVFP4Array):
        entry, _ = rotation.rotate_quantize(delta, format="nvfp4", scale_dims=delta.ndim - 1, **options)
    else:
        entry = delta.astype(stored.dtype)
    wide = delta.astype(jnp.float32)
    change = old = None
    if compare:
        values = _values(stored)
        change, old = _sum(wide - values), _sum(values)
    return entry, DeltaSums(before=_sum(before.astype(jnp.float32)), delta=_sum(wide), change=change, stored=old)


def apply_delta(x: Float[Array, "batch tokens dim"], stored: Stored) -> Float[Array, "batch tokens dim"]:
    """See `api.apply_delta`."""
    return (x.astype(jnp.float32) + _values(stored)).astype(x.dtype)


def _sum(values: Float32[Array, "batch tokens dim"]) -> Float32[Array, "batch tokens"]:
    return jnp.abs(values).sum(-1)


def _values(stored: Stored) -> Float32[Array, "batch tokens dim"]:
    return dequantize(stored) if isinstance(stored, Int8Array | NVFP4Array) else stored.astype(jnp.float32)
