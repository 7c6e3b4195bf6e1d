"""`rotate_quantize` of bfloat16 to INT8 as one Pallas Mosaic GPU kernel: Hopper.

A tile is eight rows of x, whole if a row has at most `MOST_BLOCKS` blocks of the rotation, else eight equal parts of
rows, those of one row next to each other. In shared memory it is a matrix [blocks * 8, 128], block by block, so that a
warpgroup rotates all of it with one wgmma by the Hadamard matrix, whose result it keeps in registers until the largest
magnitude of each row is known: x is read once. Each of two warpgroups has every second tile, and a third one loads them
through TMA.

Row i % 8 of the matrix belongs to row i % 8 of the tile. What is found for 64 of its rows at a time is therefore known
of a row after a sum (or maximum) over places that are 8 apart, through shared memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32

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
STAGED = 2
"""Pieces of codes there, of each warpgroup."""
MAYBE_FLUSHED = 2.0**-60
"""Beside larger values, those that the definition flushes to zero are lost in rounding."""


def refusal(
    x: Float[Array, "*rows k"],
    *,
    format: str,
    hadamard: int,
    **options,
) -> str | None:
    """See `common.choice.Implementation`."""
    *rows, k = x.shape
    if format != "int8" or x.dtype != jnp.bfloat16 or hadamard != HADAMARD:
        return f"it makes INT8 of bfloat16 rotated by blocks of {HADAMARD}, here {format} of {x.dtype} by {hadamard}"
    plan = _plan(math.prod(rows), k)
    if plan is None:
        return f"a row of {k} does not come to equal parts of at most {MOST_BLOCKS} blocks"
    if plan.rows % ROWS:
        return f"its tiles have {ROWS} rows, or parts of rows, which do not divide {plan.rows}"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def rotate_quantize(
    x: Float[Array, "*rows k"], *, format: str, hadamard: int, **options
) -> tuple[Int8Array, RowStatistics]:
    """See `api.rotate_quantize`; the rotation is within `quantize_tile.ROTATION_BOUND`."""
    interpret = device.interpreting()
    return _rotate_quantize(x, cores=WARPGROUPS if interpret else device.core_count(), interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
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


def _plan(rows: int, k: int) -> _Plan | None:
    blocks = k // HADAMARD
    for parts in PARTS:
        if blocks % parts == 0 and blocks // parts <= MOST_BLOCKS:
            return _Plan(rows=rows * parts, parts=parts, blocks=blocks // parts)
    return None


@functools.partial(jax.jit, static_argnames=("cores", "interpret"))
def _rotate_quantize(x: Float[Array, "*rows k"], *, cores: int, interpret: bool) -> tuple[Int8Array, RowStatistics]:
    *rows, k = x.shape
    plan = _plan(math.prod(rows), k)
    assert plan is not None
    split = (plan.rows, plan.blocks, HADAMARD)
    a_row = jax.ShapeDtypeStruct((plan.rows,), jnp.float32)
    codes, *found = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(jax.ShapeDtypeStruct(split, jnp.int8), a_row, a_row, a_row),
        scratch_types={
            "tiles": swizzled((SLOTS, plan.pieces * PIECE, HADAMARD), jnp.bfloat16),
            "matrix": swizzled((HADAMARD, HADAMARD), jnp.bfloat16),
            "staged": swizzled((WARPGROUPS, STAGED, PIECE, HADAMARD), jnp.int8),
            "rings": plgpu.SMEM((WARPGROUPS, 2, 2 * PIECE), jnp.float32),
            "of_rows": plgpu.SMEM((WARPGROUPS, 3, PIECE), jnp.float32),
            "matrix_loaded": plgpu.Barrier(),
            # A warpgroup counts what it waits for, so a slot has a barrier for each.
            "loaded": plgpu.Barrier(num_arrivals=plan.blocks, num_barriers=SLOTS * WARPGROUPS),
            "free": plgpu.Barrier(num_barriers=SLOTS),
        },
        grid=(min(cores, plan.tiles),),
        grid_names=("core",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x.reshape(split), jnp.asarray(sylvester(HADAMARD) / HADAMARD, jnp.bfloat16))
    scale, sums, largest = (values[:: plan.parts].reshape(rows) for values in found)
    array = Int8Array(codes=codes.reshape(x.shape), scale=scale, hadamard=HADAMARD)
    return array, RowStatistics(sum_abs=sums, max_abs=largest)


def _kernel(
    x,
    hadamard,
    codes,
    scale,
    sums,
    largest,
    *,
    plan: _Plan,
    tiles,
    matrix,
    staged,
    rings,
    of_rows,
    matrix_loaded,
    loaded,
    free,
):
    warpgroup = jax.lax.axis_index("warpgroup")
    core, cores = jax.lax.axis_index("core"), jax.lax.axis_size("core")
    own = pl.cdiv(plan.tiles - core, cores)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(hadamard, matrix, matrix_loaded)

        @pl.loop(0, own)
        def _(turn):
            slot = jax.lax.rem(turn, SLOTS)
            rows = pl.ds((core + turn * cores) * ROWS, ROWS)
            plgpu.barrier_wait(free.at[slot])

            @pl.loop(0, plan.blocks)
            def _(block):
                place = tiles.at[slot, pl.ds(block * ROWS, ROWS), :]
                plgpu.copy_gmem_to_smem(x.at[rows, block, :], place, loaded.at[jax.lax.rem(turn, SLOTS * WARPGROUPS)])

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        ring = rings.at[warpgroup]

        @pl.when(warpgroup == 0)
        def _():
            for slot in range(SLOTS):
                if plan.blocks * ROWS % PIECE:
                    last = tiles.at[slot, pl.ds((plan.pieces - 1) * PIECE, PIECE), :]
                    last[...] = plgpu.layout_cast(jnp.zeros(last.shape, jnp.bfloat16), plgpu.Layout.WGMMA)
                    plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[slot])

        plgpu.barrier_wait(matrix_loaded)

        @pl.loop(0, pl.cdiv(own - warpgroup, WARPGROUPS))
        def _(own_turn):
            turn = own_turn * WARPGROUPS + warpgroup
            row = (core + turn * cores) * ROWS
            slot = jax.lax.rem(turn, SLOTS)
            tile = tiles.at[slot]
            plgpu.barrier_wait(loaded.at[jax.lax.rem(turn, SLOTS * WARPGROUPS)])
            total, most = _statistics(tile, ring, plan)
            finite = total <= FLOAT32_MAX  # comparisons with NaN are false
            out = of_rows.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # all of the tile before
            largest_kept = jnp.where(most < FLUSH_BELOW, 0.0, most)
            out[1], out[2] = total, jnp.where(jnp.isnan(total), jnp.nan, largest_kept)  # a maximum may lose NaN

            @pl.when(_any_row(~finite | ((most > 0) & (most < MAYBE_FLUSHED)), ring))
            def _():
                _clean(tile, finite, plan)
                flushed, _ = _statistics(tile, ring, plan)
                out[1] = jnp.where(finite, flushed, total)

            def product(accumulator):
                plgpu.wgmma(accumulator, tile, matrix)
                plgpu.wgmma_wait(0)
                return accumulator[...]

            rotated = pl.run_scoped(product, plgpu.ACC((plan.pieces * PIECE, HADAMARD), jnp.float32))
            plgpu.barrier_arrive(free.at[slot])
            root = float(np.sqrt(np.float32(HADAMARD)))
            amax = _of_rows([_largest(rotated, plan) * root], [jnp.maximum], ring, plan)[0]
            row_scale = jnp.maximum(amax * (1 / INT8_MAX), MIN_SCALE)
            out[0] = jnp.where(finite, row_scale, jnp.nan)
            inverse = jax.lax.broadcast_in_dim(1.0 / row_scale, (PIECE, HADAMARD), (0,))
            for piece in range(plan.pieces):
                units = rotated[piece * PIECE : (piece + 1) * PIECE] * root * inverse
                rounded = jnp.maximum(units, -INT8_MAX) + ROUNDER  # between them, so that they are not one fma
                kept = staged.at[warpgroup, piece % STAGED]
                if piece >= STAGED:
                    plgpu.wait_smem_to_gmem(STAGED - 1, wait_read_only=True)
                kept[...] = jax.lax.bitcast_convert_type(rounded, jnp.int32).astype(jnp.int8)
                plgpu.commit_smem()
                if piece == 0:
                    for index, values in enumerate((scale, sums, largest)):
                        source = out.at[index, pl.ds(0, ROWS)]
                        plgpu.copy_smem_to_gmem(source, values.at[pl.ds(row, ROWS)], commit_group=False)

                @pl.loop(0, min(PIECE // ROWS, plan.blocks - piece * PIECE // ROWS))
                def _(block, piece=piece, kept=kept):
                    target = codes.at[pl.ds(row, ROWS), piece * PIECE // ROWS + block, :]
                    plgpu.copy_smem_to_gmem(kept.at[pl.ds(block * ROWS, ROWS), :], target, commit_group=False)

                plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)


def _pieces(tile, plan: _Plan):
    """References of the pieces of a tile."""
    return [tile.at[pl.ds(piece * PIECE, PIECE), :] for piece in range(plan.pieces)]


def _statistics(tile, ring, plan: _Plan) -> list[Float32[Array, " piece"]]:
    """The sum and the maximum of the magnitudes of each row, as `_of_rows` gives them."""
    magnitudes = [
        jnp.abs(plgpu.load(piece, layout=plgpu.Layout.WGMMA).astype(jnp.float32)) for piece in _pieces(tile, plan)
    ]
    found = [functools.reduce(of, magnitudes) for of in (jnp.add, jnp.maximum)]
    return _of_rows([found[0].sum(axis=1), found[1].max(axis=1)], [jnp.add, jnp.maximum], ring, plan)


def _clean(tile, finite: Bool[Array, " piece"], plan: _Plan) -> None:
    """Rows that are not finite become zero, as do values that the definition flushes."""
    for piece in _pieces(tile, plan):
        values = plgpu.load(piece, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        keep = (jnp.abs(values) >= FLUSH_BELOW) & jax.lax.broadcast_in_dim(finite, values.shape, (0,))
        piece[...] = jnp.where(keep, values, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _largest(rotated: Float32[Array, "m 128"], plan: _Plan) -> Float32[Array, " piece"]:
    """Maxima of magnitudes over all pieces and columns."""
    pieces = (jnp.abs(rotated[piece * PIECE : (piece + 1) * PIECE]) for piece in range(plan.pieces))
    return functools.reduce(jnp.maximum, pieces).max(axis=1)


def _of_rows(
    found: list[Float32[Array, " piece"]], combine: list[Callable], ring, plan: _Plan
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
    plgpu.commit_smem()
    if plan.parts > 1:
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
        plgpu.commit_smem()
    return found


def _any_row(flags: Bool[Array, " piece"], ring) -> Bool[Array, ""]:
    """Whether any of the flags of a tile's rows is set, alike in all threads."""
    ring.at[0, pl.ds(0, PIECE)][...] = jnp.where(flags, 1.0, 0.0)
    plgpu.commit_smem()
    found = functools.reduce(jnp.add, [ring[0, row] for row in range(ROWS)])
    plgpu.commit_smem()
    return found > 0
