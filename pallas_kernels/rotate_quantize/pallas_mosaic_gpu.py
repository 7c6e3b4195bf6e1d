"""`rotate_quantize` of bfloat16 to INT8 as one Pallas Mosaic GPU kernel: Hopper.

A tile is eight rows of x, whole if a row has at most `MOST_BLOCKS` blocks of the rotation, else eight equal parts of
rows, those of one row next to each other. In shared memory it is a matrix [blocks * 8, 128], block by block, so that a
warpgroup rotates all of it with one wgmma by the Hadamard matrix, whose result it keeps in registers until the largest
magnitude of each row is known: x is read once. Each of two warpgroups has every second tile; a third one loads them and
stores their codes, through TMA.

Pallas would put a barrier of the warpgroup before and after each store to shared memory; a `commit_smem` instead stands
where one warp reads what another wrote, or writes what another read.

Row i % 8 of the matrix belongs to row i % 8 of the tile. What is found for 64 of its rows at a time is therefore known
of a row after a sum (or maximum) over places that are 8 apart, through shared memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int32

from pallas_kernels.common import device
from pallas_kernels.common.formats import FLUSH_BELOW, INT8_MAX, MIN_SCALE, Int8Array, sylvester
from pallas_kernels.common.quantize_tile import FLOAT32_MAX, ROUNDER
from pallas_kernels.common.shared_memory import swizzled
from pallas_kernels.rotate_quantize.types import RowStatistics

HADAMARD = 128
ROWS = 8
"""Of a tile: as many as an atom of the swizzled layout has."""
PIECE = 64
"""Rows of the matrix that a warpgroup has in registers at a time, besides the product."""
MOST_BLOCKS = 24
"""Of a tile's row: a product of 24 * 8 rows fills the registers."""
PARTS = (1, 2, 4, 8)
WARPGROUPS = 2
SLOTS = 3
"""Tiles in shared memory."""
MAYBE_FLUSHED = 2.0**-60
"""Beside larger values, those that the definition flushes to zero are lost in rounding."""
KeepScale = Callable[[Float32[Array, " piece"]], None]


def refusal(
    x: Float[Array, "*rows k"],
    *,
    format: str,
    hadamard: int,
    **options,
) -> str | None:
    """See `common.choice.Implementation`."""
    *rows, k = x.shape
    if (reason := format_refusal(x, format=format, hadamard=hadamard)) is not None:
        return reason
    plan = plan_of(math.prod(rows), k)
    if plan is None:
        return f"a row of {k} does not come to equal parts of at most {MOST_BLOCKS} blocks"
    if plan.rows % ROWS:
        return f"its tiles have {ROWS} rows, or parts of rows, which do not divide {plan.rows}"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def format_refusal(x: Float[Array, "..."], *, format: str, hadamard: int) -> str | None:
    """Why x is not rotated and quantised so by this kernel."""
    if format != "int8" or x.dtype != jnp.bfloat16 or hadamard != HADAMARD:
        return f"it makes INT8 of bfloat16 rotated by blocks of {HADAMARD}, here {format} of {x.dtype} by {hadamard}"
    return None


def rotate_quantize(
    x: Float[Array, "*rows k"], *, format: str, hadamard: int, **options
) -> tuple[Int8Array, RowStatistics]:
    """See `api.rotate_quantize`; the rotation is within `quantize_tile.ROTATION_BOUND`."""
    interpret = device.interpreting()
    return _rotate_quantize(x, cores=WARPGROUPS if interpret else device.core_count(), interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one call.

    Attributes:
        rows: of tiles: rows of x, or parts of them.
        parts: of a row of x.
        blocks: of the rotation, in each of `rows`.
    """

    rows: int
    parts: int
    blocks: int

    @property
    def tiles(self) -> int:
        return self.rows // ROWS

    @property
    def pieces(self) -> int:
        """Of the matrix of a tile, the last of which may end in zeros."""
        return pl.cdiv(self.blocks * ROWS, PIECE)


def plan_of(rows: int, k: int) -> Plan | None:
    blocks = k // HADAMARD
    for parts in PARTS:
        if blocks % parts == 0 and blocks // parts <= MOST_BLOCKS:
            return Plan(rows=rows * parts, parts=parts, blocks=blocks // parts)
    return None


@functools.partial(jax.jit, static_argnames=("cores", "interpret"))
def _rotate_quantize(x: Float[Array, "*rows k"], *, cores: int, interpret: bool) -> tuple[Int8Array, RowStatistics]:
    *rows, k = x.shape
    plan = plan_of(math.prod(rows), k)
    assert plan is not None
    split = (plan.rows, plan.blocks, HADAMARD)
    a_row = jax.ShapeDtypeStruct((plan.rows,), jnp.float32)
    codes, *found = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(jax.ShapeDtypeStruct(split, jnp.int8), a_row, a_row, a_row),
        scratch_types=scratch_types(plan, constants=1),
        grid=(min(cores, plan.tiles),),
        grid_names=("core",),
        **launch(interpret=interpret),
    )(x.reshape(split), rotation())
    scale, sums, largest = (values[:: plan.parts].reshape(rows) for values in found)
    array = Int8Array(codes=codes.reshape(x.shape), scale=scale, hadamard=HADAMARD)
    return array, RowStatistics(sum_abs=sums, max_abs=largest)


def rotation() -> BFloat16[Array, "128 128"]:
    """What a tile is multiplied by; over its size, so that sums overflow only where results do."""
    return jnp.asarray(sylvester(HADAMARD) / HADAMARD, jnp.bfloat16)


def scratch_types(plan: Plan, *, constants: int) -> dict[str, Any]:
    """Shared memory and barriers that `run` takes.

    Args:
        plan: sizes.
        constants: arrays that are copied there before all tiles.
    """
    return {
        # Once a tile is rotated, its codes take its place, of which they need a half.
        "tiles": plgpu.RefUnion(
            swizzled((SLOTS, plan.pieces * PIECE, HADAMARD), jnp.bfloat16),
            swizzled((SLOTS, 2 * plan.pieces, PIECE, HADAMARD), jnp.int8),
        ),
        "matrix": swizzled((HADAMARD, HADAMARD), jnp.bfloat16),
        "rings": plgpu.SMEM((WARPGROUPS, 3, 2 * PIECE), jnp.float32),
        "of_rows": plgpu.SMEM((SLOTS, 3, PIECE), jnp.float32),
        "constants_loaded": plgpu.Barrier(num_arrivals=constants),
        # A warpgroup counts what it waits for, so a slot has a barrier for each.
        "loaded": plgpu.Barrier(num_arrivals=plan.blocks, num_barriers=SLOTS * WARPGROUPS),
        "quantized": plgpu.Barrier(num_barriers=SLOTS),
    }


def launch(*, interpret: bool) -> dict[str, Any]:
    """How `plgpu.kernel` starts a kernel that is a `run`."""
    return {
        "num_threads": WARPGROUPS + 1,
        "thread_name": "warpgroup",
        "interpret": plgpu.InterpretGPUParams() if interpret else None,
        "compiler_params": plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    }


def _kernel(x, hadamard, codes, scale, sums, largest, *, plan: Plan, **scratch):
    core, cores = jax.lax.axis_index("core"), jax.lax.axis_size("core")

    def measure(tile, row, ring, out) -> KeepScale:
        total, most = _statistics(tile, ring, plan)
        finite = total <= FLOAT32_MAX  # comparisons with NaN are false
        out[1], out[2] = total, kept_maximum(total, most)

        @pl.when(any_row(needs_cleaning(finite, most), ring))
        def _():
            clean(tile, finite, rows=PIECE, count=plan.pieces, layout=plgpu.Layout.WGMMA)
            flushed, _ = _statistics(tile, ring, plan)
            out[1] = jnp.where(finite, flushed, total)
            plgpu.commit_smem()

        def keep_scale(row_scale: Float32[Array, " piece"]) -> None:
            out[0] = jnp.where(finite, row_scale, jnp.nan)

        return keep_scale

    run(
        x,
        codes,
        (scale, sums, largest),
        plan=plan,
        own=lambda: pl.cdiv(plan.tiles - core, cores),
        first_row=lambda turn: (core + turn * cores) * ROWS,
        constants=lambda: [(hadamard, scratch["matrix"])],
        measure=measure,
        **scratch,
    )


def run(
    x,
    codes,
    of_each_row: Sequence,
    *,
    plan: Plan,
    own: Callable[[], Int32[Array, ""]],
    first_row: Callable[[Int32[Array, ""]], Int32[Array, ""]],
    constants: Callable[[], Sequence[tuple]],
    measure: Callable[..., KeepScale],
    tiles,
    matrix,
    rings,
    of_rows,
    constants_loaded,
    loaded,
    quantized,
) -> None:
    """Loads, rotates and quantises the tiles of a core, inside a kernel.

    Functions give what depends on the core where it is used: values that all warpgroups are given are operations beside
    theirs, and an interpreter that runs both on the same few threads can wait for ever.

    Args:
        x: [rows, blocks, 128].
        codes: as x.
        of_each_row: scales and statistics, [rows] each.
        plan: sizes.
        own: how many tiles.
        first_row: of the tile that has this place among them.
        constants: (source, place in shared memory) of what is copied before all tiles.
        measure: what to do with (tile, its first row, ring, out) before it is rotated; it may change the tile. It puts
            the statistics of its rows into the beginnings of out[1] and out[2], in shared memory. What it returns puts
            the scales into that of out[0].
        tiles, matrix, rings, of_rows, constants_loaded, loaded, quantized: `scratch_types`.
    """
    warpgroup = jax.lax.axis_index("warpgroup")
    tiles, staged = tiles

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        if plan.blocks * ROWS % PIECE:
            for slot in range(SLOTS):
                last = tiles.at[slot, pl.ds((plan.pieces - 1) * PIECE, PIECE), :]
                last[...] = plgpu.layout_cast(jnp.zeros(last.shape, jnp.bfloat16), plgpu.Layout.WGMMA)
            plgpu.commit_smem()
        for source, place in constants():
            plgpu.copy_gmem_to_smem(source, place, constants_loaded)

        def store(turn):
            slot, row = jax.lax.rem(turn, SLOTS), first_row(turn)
            plgpu.barrier_wait(quantized.at[slot])
            for index, values in enumerate(of_each_row):
                source = of_rows.at[slot, index, pl.ds(0, ROWS)]
                plgpu.copy_smem_to_gmem(source, values.at[pl.ds(row, ROWS)], commit_group=False)

            @pl.loop(0, plan.blocks)
            def _(block):
                piece, place = jax.lax.div(block, PIECE // ROWS), jax.lax.rem(block, PIECE // ROWS)
                source = staged.at[slot, piece, pl.ds(place * ROWS, ROWS), :]
                plgpu.copy_smem_to_gmem(source, codes.at[pl.ds(row, ROWS), block, :], commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.loop(0, own())
        def _(turn):
            slot = jax.lax.rem(turn, SLOTS)

            @pl.when(turn >= SLOTS)
            def _():
                store(turn - SLOTS)

            @pl.loop(0, plan.blocks)
            def _(block):
                place = tiles.at[slot, pl.ds(block * ROWS, ROWS), :]
                source = x.at[pl.ds(first_row(turn), ROWS), block, :]
                plgpu.copy_gmem_to_smem(source, place, loaded.at[jax.lax.rem(turn, SLOTS * WARPGROUPS)])

        @pl.loop(jnp.maximum(own() - SLOTS, 0), own())
        def _(turn):
            store(turn)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        ring = rings.at[warpgroup]
        plgpu.barrier_wait(constants_loaded)

        @pl.loop(0, pl.cdiv(own() - warpgroup, WARPGROUPS))
        def _(own_turn):
            turn = own_turn * WARPGROUPS + warpgroup
            row = first_row(turn)
            slot = jax.lax.rem(turn, SLOTS)
            tile = tiles.at[slot]
            plgpu.barrier_wait(loaded.at[jax.lax.rem(turn, SLOTS * WARPGROUPS)])
            out = of_rows.at[slot]
            keep_scale = measure(tile, row, ring, out)

            def product(accumulator):
                plgpu.wgmma(accumulator, tile, matrix)
                plgpu.wgmma_wait(0)
                return accumulator[...]

            rotated = pl.run_scoped(product, plgpu.ACC((plan.pieces * PIECE, HADAMARD), jnp.float32))
            root = float(np.sqrt(np.float32(HADAMARD)))
            amax = _of_rows([_largest(rotated, plan) * root], [jnp.maximum], ring, plan)[0]
            row_scale = jnp.maximum(amax * (1 / INT8_MAX), MIN_SCALE)
            keep_scale(row_scale)
            inverse = jax.lax.broadcast_in_dim(rounded_inverse(row_scale, 1.0 / row_scale), (PIECE, HADAMARD), (0,))
            # Added first, so that the product and the sum that rounds it do not become one instruction, rounded once.
            zero = jax.lax.broadcast_in_dim(row_scale * 0.0, (PIECE, HADAMARD), (0,))
            for piece in range(plan.pieces):
                units = rotated[piece * PIECE : (piece + 1) * PIECE] * root * inverse
                rounded = units + zero + ROUNDER
                staged.at[slot, piece][...] = jax.lax.bitcast_convert_type(rounded, jnp.int32).astype(jnp.int8)
            plgpu.commit_smem()
            plgpu.barrier_arrive(quantized.at[slot])


def kept_maximum(total: Float32[Array, " rows"], most: Float32[Array, " rows"]) -> Float32[Array, " rows"]:
    """The statistic, of the sum and the maximum of magnitudes before any is flushed."""
    # A maximum may lose NaN.
    return jnp.where(jnp.isnan(total), jnp.nan, jnp.where(most < FLUSH_BELOW, 0.0, most))


def needs_cleaning(finite: Bool[Array, " rows"], most: Float32[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which rows `clean` may change more in than what is lost in rounding."""
    return ~finite | ((most > 0) & (most < MAYBE_FLUSHED))


def _statistics(tile, ring, plan: Plan) -> list[Float32[Array, " piece"]]:
    """The sum and the maximum of the magnitudes of each row, as `_of_rows` gives them."""
    found = magnitudes(tile, rows=PIECE, count=plan.pieces, unroll=1, layout=plgpu.Layout.WGMMA)
    return _of_rows(found, [jnp.add, jnp.maximum], ring, plan)


def magnitudes(tile, *, rows: int, count: int, unroll: int, layout) -> list[Float32[Array, " rows"]]:
    """The sum and the maximum of |values| of each row, over parts of a tile that have the same rows.

    Args:
        tile: reference [rows * count, 128].
        rows, count: of a part, and of parts.
        unroll: parts in one turn of the loop. A kernel that is longer than the instruction cache waits for its code.
        layout: to load them in.
    """

    def add(turn, found):
        total, most = found
        for ahead in range(unroll):
            part = tile.at[pl.ds((turn * unroll + ahead) * rows, rows), :]
            values = jnp.abs(plgpu.load(part, layout=layout).astype(jnp.float32))
            total, most = total + values, jnp.maximum(most, values)
        return total, most

    none = plgpu.layout_cast(jnp.zeros((rows, HADAMARD), jnp.float32), layout)
    total, most = jax.lax.fori_loop(0, count // unroll, add, (none, none))
    return [total.sum(axis=1), most.max(axis=1)]


def clean(tile, finite: Bool[Array, " rows"], *, rows: int, count: int, layout) -> None:
    """Rows that are not finite become zero, as do values that the definition flushes.

    Args:
        tile: reference [rows * count, 128].
        finite: whether each row of a part is.
        rows, count: of a part, and of parts.
        layout: to load them in, of which `finite` has the rows.
    """

    @pl.loop(0, count)
    def _(index):
        part = tile.at[pl.ds(index * rows, rows), :]
        values = plgpu.load(part, layout=layout).astype(jnp.float32)
        finite_values = plgpu.layout_cast(jax.lax.broadcast_in_dim(finite, values.shape, (0,)), layout)
        part[...] = jnp.where((jnp.abs(values) >= FLUSH_BELOW) & finite_values, values, 0.0).astype(jnp.bfloat16)

    plgpu.commit_smem()


def _largest(rotated: Float32[Array, "m 128"], plan: Plan) -> Float32[Array, " piece"]:
    """Maxima of magnitudes over all pieces and columns."""
    pieces = (jnp.abs(rotated[piece * PIECE : (piece + 1) * PIECE]) for piece in range(plan.pieces))
    return functools.reduce(jnp.maximum, pieces).max(axis=1)


def rounded_inverse(scale: Float32[Array, " rows"], near: Float32[Array, " rows"]) -> Float32[Array, " rows"]:
    """1 / scale of one that is off by an ulp, as Mosaic GPU's division may be, correctly rounded.

    One step of Newton's method, between 1 and 2; its error decides where 1 / scale is within 2^-21 ulp of the middle of
    two values. The residual is exact: factors are taken in halves whose products are float32, so that it does not
    matter which of these and of the sums become one instruction.

    Args:
        scale: positive, up to 2^126, or infinite, or NaN.
        near: about 1 / scale.
    """

    def as_float(bits: Int32[Array, " rows"]) -> Float32[Array, " rows"]:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halves(value: Float32[Array, " rows"]) -> list[Float32[Array, " rows"]]:
        high = as_float((jax.lax.bitcast_convert_type(value, jnp.int32) + (1 << 11)) & -(1 << 12))
        return [high, value - high]

    exponent = jax.lax.bitcast_convert_type(scale, jnp.int32) & (255 << 23)
    power, inverse_power = as_float(exponent), as_float((254 << 23) - exponent)
    unit = near * power
    (high, low), (unit_high, unit_low) = halves(scale * inverse_power), halves(unit)
    residual = 1.0 - high * unit_high - high * unit_low - low * unit_high - low * unit_low
    # Not where one of them is infinite, or NaN.
    return jnp.where(jnp.abs(residual) < 1, (unit + unit * residual) * inverse_power, near)


def _of_rows(
    found: list[Float32[Array, " piece"]], combine: list[Callable], ring, plan: Plan
) -> list[Float32[Array, " piece"]]:
    """What was found for each row of a piece, combined over all that belong to the same row of x; at most two.

    A ring holds the values twice, so that those of any distance ahead are in one slice of it.
    """

    def load(index: int, ahead: int) -> Float32[Array, " piece"]:
        return plgpu.load(ring.at[index, pl.ds(ahead, PIECE)], layout=plgpu.Layout.WGMMA.reduce(1))

    def put() -> None:
        for index, values in enumerate(found):
            for copy in (0, PIECE):
                ring.at[index, pl.ds(copy, PIECE)][...] = values
        plgpu.commit_smem()

    put()
    found = [
        functools.reduce(of, (load(index, ahead) for ahead in range(ROWS, PIECE, ROWS)), values)
        for index, (values, of) in enumerate(zip(found, combine, strict=True))
    ]
    if plan.parts > 1:
        plgpu.commit_smem()
        put()
        place = jax.lax.rem(
            plgpu.broadcasted_iota(jnp.int32, (PIECE,), 0, layout=plgpu.Layout.WGMMA.reduce(1)), plan.parts
        )
        for index, of in enumerate(combine):
            values = found[index]
            for ahead in range(1, plan.parts):
                behind = PIECE + ahead - plan.parts  # the ring is a whole number of rows of x long
                values = of(values, jnp.where(place + ahead < plan.parts, load(index, ahead), load(index, behind)))
            found[index] = values
    return found


def any_row(flags: Bool[Array, " rows"], ring) -> Bool[Array, ""]:
    """Whether any of the flags of a tile's rows is set, alike in all threads."""
    ring.at[2, pl.ds(0, flags.size)][...] = jnp.where(flags, 1.0, 0.0)
    plgpu.commit_smem()
    return functools.reduce(jnp.add, [ring[2, row] for row in range(ROWS)]) > 0
