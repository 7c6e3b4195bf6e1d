"""Statistics of the rows of a tile in shared memory, and what of it must be cleared: Mosaic GPU.

A tile is [rows, 128], of which a warpgroup loads parts in a layout that the caller chooses.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float32, UInt16

from pallas_kernels.common.formats import FLUSH_BELOW

COLUMNS = 128
MAYBE_FLUSHED = 2.0**-60
"""Beside larger values, those that the definition flushes to zero are lost in rounding to INT8."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """Of |values| so far, by place in a row.

    Attributes:
        total: sum.
        most: bits of the largest bfloat16; NaN is larger than all.
        least: bits of the smallest that is not zero, less one; None if not asked for.
    """

    total: Float32[Array, "rows 128"]
    most: UInt16[Array, "rows 128"]
    least: UInt16[Array, "rows 128"] | None

    def and_of(self, values: BFloat16[Array, "rows 128"], wide: Float32[Array, "rows 128"]) -> "Found":
        """With these values, given in both types."""
        bits = jax.lax.bitcast_convert_type(values, jnp.uint16) & jnp.uint16(0x7FFF)
        return Found(
            total=self.total + jnp.abs(wide),
            most=jnp.maximum(self.most, bits),
            least=None if self.least is None else jnp.minimum(self.least, bits - jnp.uint16(1)),
        )


def nothing_found(target: str, *, rows: int, layout) -> Found:
    """For a result in INT8 ("int8"), or in a carrier, for which the smallest is asked for too."""

    def full(value, dtype):
        return plgpu.layout_cast(jnp.full((rows, COLUMNS), value, dtype), layout)

    return Found(
        total=full(0, jnp.float32),
        most=full(0, jnp.uint16),
        least=None if target == "int8" else full(0xFFFF, jnp.uint16),
    )


def magnitudes(found: Found, tile, *, rows: int, count: int, layout) -> Found:
    """With the values of all parts of a tile that have the same rows.

    Args:
        found: before.
        tile: reference [rows * count, 128].
        rows, count: of a part, and of parts.
        layout: to load them in.
    """

    def add(index, found):
        values = plgpu.load(tile.at[pl.ds(index * rows, rows), :], layout=layout)
        return found.and_of(values, values.astype(jnp.float32))

    return jax.lax.fori_loop(0, count, add, found)


def reduced(found: Found) -> list[Float32[Array, " rows"]]:
    """Of each row: the sum, the largest, and the smallest that is not zero, infinity if all are."""

    def as_float(bits: UInt16[Array, "rows 128"]) -> Float32[Array, "rows 128"]:
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)

    total, most = found.total.sum(axis=1), as_float(found.most).max(axis=1)
    if found.least is None:
        return [total, most]
    least = as_float(found.least + jnp.uint16(1))
    return [total, most, -jnp.where(least == 0, -jnp.inf, -least).max(axis=1)]


def clean(tile, finite: Bool[Array, " rows"], target: str, *, rows: int, count: int, layout) -> None:
    """Values that the definition flushes become zero; for INT8 also rows that are not finite.

    Args:
        tile: reference [rows * count, 128].
        finite: whether each row of a part is.
        target: what is made of it.
        rows, count: of a part, and of parts.
        layout: to load them in, of which `finite` has the rows.
    """

    @pl.loop(0, count)
    def _(index):
        part = tile.at[pl.ds(index * rows, rows), :]
        values = plgpu.load(part, layout=layout).astype(jnp.float32)
        lost = jnp.abs(values) < FLUSH_BELOW
        if target == "int8":
            lost = lost | plgpu.layout_cast(jax.lax.broadcast_in_dim(~finite, values.shape, (0,)), layout)
        part[...] = jnp.where(lost, 0.0, values).astype(jnp.bfloat16)

    plgpu.commit_smem()


def kept_maximum(total: Float32[Array, " rows"], most: Float32[Array, " rows"]) -> Float32[Array, " rows"]:
    """The statistic, of the sum and the maximum of magnitudes before any is flushed."""
    # A maximum may lose NaN.
    return jnp.where(jnp.isnan(total), jnp.nan, jnp.where(most < FLUSH_BELOW, 0.0, most))


def needs_cleaning(finite: Bool[Array, " rows"], most, least=None) -> Bool[Array, " rows"]:
    """Which rows `clean` may change more in than what is lost in rounding."""
    if least is None:
        return ~finite | ((most > 0) & (most < MAYBE_FLUSHED))
    return ~finite | (least < FLUSH_BELOW)
