"""The deltas that skipped blocks reuse: one for each block and group, in 16, 8 or 4 bits.

A cache is one pytree whose leaves start with the axes [blocks, groups]. It lives in the carry of the scan over blocks;
`pallas_kernels.delta_cache` has what is done with an entry.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.common.formats import BLOCK, Int8Array, NVFP4Array
from sixbit_jax.errors import ArgumentError

FORMATS = ("16bit", "int8", "nvfp4")
Cache = jax.Array | Int8Array | NVFP4Array


def init(format: str, blocks: int, groups: int, shape: tuple[int, ...], dtype: Any) -> Cache:
    """An empty cache.

    Args:
        format: "16bit", "int8" or "nvfp4".
        blocks: of the model.
        groups: videos that are decided on together.
        shape: of a delta, [rows, tokens, dim].
        dtype: of "16bit"; not read by the others.

    Raises:
        ArgumentError: on an unknown format, or a dim that NVFP4's blocks do not divide.
    """
    rows, dim = (blocks, groups, *shape[:-1]), shape[-1]
    if format == "16bit":
        return jnp.zeros((*rows, dim), dtype)
    if format == "int8":
        return Int8Array(codes=jnp.zeros((*rows, dim), jnp.int8), scale=jnp.zeros(rows, jnp.float32))
    if format == "nvfp4":
        if dim % BLOCK:
            raise ArgumentError(f"a delta cache in NVFP4 needs a width that {BLOCK} divides, not {dim}")
        return NVFP4Array(
            codes=jnp.zeros((*rows, dim // 2), jnp.uint8),
            scales=jnp.zeros((*rows, dim // BLOCK), jnp.uint8),
            tensor_scale=jnp.zeros(rows, jnp.float32),
        )
    raise ArgumentError(f"unknown format {format!r} of the delta cache; formats are {', '.join(FORMATS)}")


def entry(cache: Cache, block: Int32[Array, ""], group: Int32[Array, ""]) -> Cache:
    """One stored delta, [rows, tokens, dim].

    Args:
        cache: from `init` or `replace`.
        block: its position.
        group: its position.
    """
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, block, keepdims=False)[group], cache)


def replace(cache: Cache, block: Int32[Array, ""], group: Int32[Array, ""], entry: Cache) -> Cache:
    """The cache with one entry replaced, in place under jit.

    Args:
        cache: from `init` or `replace`.
        block: position of the entry.
        group: likewise.
        entry: as `entry` gives it, in the format of the cache.
    """

    def replaced(leaf: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(leaf, value[None, None], (block, group, *[0] * value.ndim))

    return jax.tree.map(replaced, cache, entry)


def nbytes(cache: Cache) -> int:
    """Bytes of a cache, or of one of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
