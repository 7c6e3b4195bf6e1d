"""`rotate_quantize` of bfloat16 to INT8, and to NVFP4 in a carrier, as one Pallas Mosaic GPU kernel: Hopper.

A tile is eight rows of x, whole if a row has at most `MOST_BLOCKS` blocks of the rotation, else eight equal parts of
rows, those of one row next to each other. In shared memory it is a matrix [blocks * 8, 128], block by block, whose
halves [blocks * 8, 64] a warpgroup multiplies by the Hadamard matrix of 64; sum and difference of both products are the
rotation. x is read once. Warpgroups take tiles in turn; one more loads them and stores their codes, through TMA.

For INT8 the products of a tile stay in registers until the largest magnitude of each row is known. For NVFP4 they are
made again, 64 rows of the matrix at a time: its codes take many instructions, which for a whole tile in a row would be
more than the instruction cache has room for, and loops over few registers leave room for a third warpgroup.

Pallas would put a barrier of the warpgroup before and after each store to shared memory; a barrier instead stands where
one warp reads what another wrote, or writes what another read, and `commit_smem` where wgmma or TMA reads it.

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

from pallas_kernels.common import device, encode_registers
from pallas_kernels.common.formats import (
    CARRIERS,
    E2M1_MAX,
    E4M3_MAX,
    FP8_CARRIER_SHIFT,
    INT8_MAX,
    MIN_SCALE,
    CarriedArray,
    Int8Array,
    sylvester,
)
from pallas_kernels.common.quantize_tile import FLOAT32_MAX
from pallas_kernels.common.shared_memory import swizzled
from pallas_kernels.rotate_quantize import tile_statistics
from pallas_kernels.rotate_quantize.types import RowStatistics

HADAMARD = 128
HALF = HADAMARD // 2
ROWS = 8
"""Of a tile: as many as an atom of the swizzled layout has."""
PIECE = 64
"""Rows of the matrix that a warpgroup encodes at a time."""
MOST_BLOCKS = 24
"""Of a tile's row: a product of 24 * 8 rows fills the registers."""
PARTS = (1, 2, 4, 8)
MOST_SLOTS = 4
SHARED_MEMORY = 223 * 1024
"""Of a core, less what barriers and alignment take."""
REGISTERS = {2: 232, 3: 152}
"""Of a thread, by how many warpgroups quantise."""
TARGETS = ("int8", *CARRIERS)
KeepScale = Callable[[Float32[Array, " piece"]], None]


def refusal(
    x: Float[Array, "*rows k"],
    *,
    format: str,
    hadamard: int,
    tensor_scale: Float[Array, "*leading"] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> str | None:
    """See `common.choice.Implementation`."""
    *rows, k = x.shape
    if (reason := format_refusal(x, format, carrier, hadamard, four_over_six=four_over_six)) is not None:
        return reason
    if format == "nvfp4" and (tensor_scale is not None or scale_dims < len(rows)):
        return "it gives each row a tensor scale of its own"
    plan = plan_of(math.prod(rows), k, "int8")
    if plan is None:
        return f"a row of {k} does not come to equal parts of at most {MOST_BLOCKS} blocks"
    if plan.rows % ROWS:
        return f"its tiles have {ROWS} rows, or parts of rows, which do not divide {plan.rows}"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def format_refusal(
    x: Float[Array, "..."], format: str, carrier: str | None, hadamard: int, *, four_over_six: bool
) -> str | None:
    """Why x is not rotated and quantised so by this kernel."""
    target = carrier or format
    if target not in TARGETS or four_over_six or x.dtype != jnp.bfloat16 or hadamard != HADAMARD:
        kind = f"{target}{', four over six,' if four_over_six else ''} of {x.dtype} by {hadamard}"
        return f"it makes {', '.join(TARGETS)} of bfloat16 rotated by blocks of {HADAMARD}, here {kind}"
    return None


def rotate_quantize(
    x: Float[Array, "*rows k"], *, format: str, hadamard: int, carrier: str | None = None, **options
) -> tuple[Int8Array | CarriedArray, RowStatistics]:
    """See `api.rotate_quantize`; the rotation is within `quantize_tile.ROTATION_BOUND`."""
    interpret = device.interpreting()
    cores = 2 if interpret else device.core_count()
    return _rotate_quantize(x, target=carrier or format, cores=cores, interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one call, and what it makes.

    Attributes:
        rows: of tiles: rows of x, or parts of them.
        parts: of a row of x.
        blocks: of the rotation, in each of `rows`.
        target: "int8", or the carrier of NVFP4.
        interpret: the kernel.
        constants: bytes of shared memory beside what all such kernels have there.
    """

    rows: int
    parts: int
    blocks: int
    target: str
    interpret: bool
    constants: int = 0

    @property
    def holds_products(self) -> bool:
        """Whether those of a whole tile stay in registers."""
        return self.target == "int8"

    @property
    def warpgroups(self) -> int:
        """That quantise."""
        return 2 if self.holds_products else 3

    @property
    def slots(self) -> int:
        """Tiles in shared memory."""
        others = HALF * HALF * 2 + self.warpgroups * 4 * 2 * PIECE * 4 + self.constants
        of_a_slot = self.pieces * PIECE * HADAMARD * 2 + 3 * PIECE * 4
        return min(MOST_SLOTS, (SHARED_MEMORY - others) // of_a_slot)

    @property
    def dtype(self) -> jnp.dtype:
        """Of codes; those of "fp8" as bytes."""
        return jnp.dtype(jnp.bfloat16 if self.target == "exact" else jnp.int8)

    @property
    def tiles(self) -> int:
        return self.rows // ROWS

    @property
    def pieces(self) -> int:
        """Of the matrix of a tile, the last of which may end in zeros."""
        return pl.cdiv(self.blocks * ROWS, PIECE)


def plan_of(rows: int, k: int, target: str, *, interpret: bool = False) -> Plan | None:
    blocks = k // HADAMARD
    for parts in PARTS:
        if blocks % parts == 0 and blocks // parts <= MOST_BLOCKS:
            return Plan(rows=rows * parts, parts=parts, blocks=blocks // parts, target=target, interpret=interpret)
    return None


@functools.partial(jax.jit, static_argnames=("target", "cores", "interpret"))
def _rotate_quantize(
    x: Float[Array, "*rows k"], *, target: str, cores: int, interpret: bool
) -> tuple[Int8Array | CarriedArray, RowStatistics]:
    *rows, k = x.shape
    plan = plan_of(math.prod(rows), k, target, interpret=interpret)
    assert plan is not None
    split = (plan.rows, plan.blocks, HADAMARD)
    codes, *found = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=result_types(plan),
        scratch_types=scratch_types(plan, constants=1),
        grid=(min(cores, plan.tiles),),
        grid_names=("core",),
        **launch(plan),
    )(x.reshape(split), rotation())
    return results(codes.reshape(x.shape), [values[:: plan.parts].reshape(rows) for values in found], plan)


def result_types(plan: Plan) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Codes; scales and statistics of each row."""
    a_row = jax.ShapeDtypeStruct((plan.rows,), jnp.float32)
    return jax.ShapeDtypeStruct((plan.rows, plan.blocks, HADAMARD), plan.dtype), a_row, a_row, a_row


def results(
    codes: Array, found: Sequence[Float32[Array, "*rows"]], plan: Plan
) -> tuple[Int8Array | CarriedArray, RowStatistics]:
    """What `run` wrote as `result_types`."""
    scale, sums, largest = found
    statistics = RowStatistics(sum_abs=sums, max_abs=largest)
    if plan.target == "int8":
        return Int8Array(codes=codes, scale=scale, hadamard=HADAMARD), statistics
    if plan.target == "fp8":
        codes = jax.lax.bitcast_convert_type(codes, CARRIERS["fp8"])
    return CarriedArray(codes=codes, scale=scale, hadamard=HADAMARD), statistics


def rotation() -> BFloat16[Array, "64 64"]:
    """What halves of blocks are multiplied by; over a block's size, so that sums overflow only where results do."""
    return jnp.asarray(sylvester(HALF) / HADAMARD, jnp.bfloat16)


def scratch_types(plan: Plan, *, constants: int) -> dict[str, Any]:
    """Shared memory and barriers that `run` takes.

    Args:
        plan: sizes.
        constants: arrays that are copied there before all tiles.
    """
    return {
        # Once a piece is rotated, its codes take its place, or of a byte each, half of the place of an earlier one.
        "tiles": plgpu.RefUnion(
            swizzled((plan.slots, plan.pieces * PIECE, HADAMARD), jnp.bfloat16),
            swizzled((plan.slots, 2 // plan.dtype.itemsize * plan.pieces * PIECE, HADAMARD), plan.dtype),
        ),
        "matrix": swizzled((HALF, HALF), jnp.bfloat16),
        "rings": plgpu.SMEM((plan.warpgroups, 4, 2 * PIECE), jnp.float32),
        "of_rows": plgpu.SMEM((plan.slots, 3, PIECE), jnp.float32),
        "constants_loaded": plgpu.Barrier(num_arrivals=constants),
        # A warpgroup counts what it waits for, so a slot has a barrier for each.
        "loaded": plgpu.Barrier(num_arrivals=plan.blocks, num_barriers=plan.slots * plan.warpgroups),
        "quantized": plgpu.Barrier(num_barriers=plan.slots),
    }


def launch(plan: Plan) -> dict[str, Any]:
    """How `plgpu.kernel` starts a kernel that is a `run`."""
    return {
        "num_threads": plan.warpgroups + 1,
        "thread_name": "warpgroup",
        "interpret": plgpu.InterpretGPUParams() if plan.interpret else None,
        "compiler_params": plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    }


def _kernel(x, hadamard, codes, scale, sums, largest, *, plan: Plan, **scratch):
    core, cores = jax.lax.axis_index("core"), jax.lax.axis_size("core")

    def measure(tile, row, ring, out) -> tuple[Bool[Array, ""], KeepScale]:
        total, most, *least = _statistics(tile, ring, plan)
        finite = total <= FLOAT32_MAX  # comparisons with NaN are false
        out[1], out[2] = total, tile_statistics.kept_maximum(total, most)
        unusual = any_row(tile_statistics.needs_cleaning(finite, most, *least), ring)

        @pl.when(unusual)
        def _():
            tile_statistics.clean(tile, finite, plan.target, rows=PIECE, count=plan.pieces, layout=plgpu.Layout.WGMMA)
            flushed, *_ = _statistics(tile, ring, plan)
            out[1] = jnp.where(finite, flushed, total)
            plgpu.commit_smem()

        def keep_scale(row_scale: Float32[Array, " piece"]) -> None:
            out[0] = jnp.where(finite, row_scale, jnp.nan) if plan.target == "int8" else row_scale

        return unusual, keep_scale

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
    measure: Callable[..., tuple[Bool[Array, ""], KeepScale]],
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

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        if plan.blocks * ROWS % PIECE:
            for slot in range(plan.slots):
                last = tiles.at[slot, pl.ds((plan.pieces - 1) * PIECE, PIECE), :]
                last[...] = plgpu.layout_cast(jnp.zeros(last.shape, jnp.bfloat16), plgpu.Layout.WGMMA)
            plgpu.commit_smem()
        for source, place in constants():
            plgpu.copy_gmem_to_smem(source, place, constants_loaded)

        def store(turn):
            slot, row = jax.lax.rem(turn, plan.slots), first_row(turn)
            plgpu.barrier_wait(quantized.at[slot])
            for index, values in enumerate(of_each_row):
                source = of_rows.at[slot, index, pl.ds(0, ROWS)]
                plgpu.copy_smem_to_gmem(source, values.at[pl.ds(row, ROWS)], commit_group=False)

            @pl.loop(0, plan.blocks)
            def _(block):
                source = staged.at[slot, pl.ds(block * ROWS, ROWS), :]
                plgpu.copy_smem_to_gmem(source, codes.at[pl.ds(row, ROWS), block, :], commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.loop(0, own())
        def _(turn):
            slot = jax.lax.rem(turn, plan.slots)

            @pl.when(turn >= plan.slots)
            def _():
                store(turn - plan.slots)

            @pl.loop(0, plan.blocks)
            def _(block):
                place = tiles.at[slot, pl.ds(block * ROWS, ROWS), :]
                source = x.at[pl.ds(first_row(turn), ROWS), block, :]
                plgpu.copy_gmem_to_smem(source, place, loaded.at[jax.lax.rem(turn, plan.slots * plan.warpgroups)])

        @pl.loop(jnp.maximum(own() - plan.slots, 0), own())
        def _(turn):
            store(turn)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(REGISTERS[plan.warpgroups], action="increase")
        ring = rings.at[warpgroup]
        plgpu.barrier_wait(constants_loaded)

        @pl.loop(0, pl.cdiv(own() - warpgroup, plan.warpgroups))
        def _(own_turn):
            turn = own_turn * plan.warpgroups + warpgroup
            row = first_row(turn)
            slot = jax.lax.rem(turn, plan.slots)
            tile = tiles.at[slot]
            plgpu.barrier_wait(loaded.at[jax.lax.rem(turn, plan.slots * plan.warpgroups)])
            out = of_rows.at[slot]
            unusual, keep_scale = measure(tile, row, ring, out)
            quantize = functools.partial(_quantize, tile, staged.at[slot], matrix, ring, keep_scale, plan)
            if plan.target == "int8":
                quantize(finite=True)
            else:
                pl.when(unusual)(lambda: quantize(finite=False))
                pl.when(~unusual)(lambda: quantize(finite=True))
            plgpu.commit_smem()
            plgpu.barrier_arrive(quantized.at[slot])


def _quantize(tile, staged, matrix, ring, keep_scale: KeepScale, plan: Plan, *, finite: bool) -> None:
    """Rotates a tile and puts its codes in its place.

    Args:
        tile, staged: references to the tile, as values and as codes.
        matrix: of the rotation.
        ring: see `_of_rows`.
        keep_scale: takes the scales.
        plan: sizes.
        finite: whether all rotated values are known to be.
    """
    root = float(np.sqrt(np.float32(HADAMARD)))

    def products(first, rows: int) -> list[Float32[Array, "rows 64"]]:
        """Of both halves of blocks: their sum and their difference are the rotation."""

        def multiply(*halves):
            for index, half in enumerate(halves):
                part = tile.at[pl.ds(first, rows), pl.ds(index * HALF, HALF)]
                plgpu.wgmma(half, part, matrix)
            plgpu.wgmma_wait(0)
            return [half[...] for half in halves]

        accumulator = plgpu.ACC((rows, HALF), jnp.float32)
        return pl.run_scoped(multiply, accumulator, accumulator)

    def rotated(halves) -> list[Float32[Array, "piece 64"]]:
        left, right = halves
        return [(left + right) * root, (left - right) * root]

    def is_finite(values: Float32[Array, "*n"]) -> Bool[Array, "*n"]:
        return jnp.abs(values) <= FLOAT32_MAX

    def larger(most, halves):
        if finite:
            left, right = halves
            # The larger magnitude of their sum and their difference.
            return jnp.maximum(most, jnp.abs(left) + jnp.abs(right))
        for values in rotated(halves):
            most = jnp.maximum(most, jnp.where(is_finite(values), jnp.abs(values), 0.0))
        return most

    def encode(piece, halves, inverse):
        values, bad = rotated(halves), None
        if not finite:
            bad = [~is_finite(half) for half in values]
            values = [jnp.where(*each) for each in zip(bad, [0.0, 0.0], values, strict=True)]
        if plan.target == "int8":
            codes = encode_registers.int8(values, inverse, interpret=plan.interpret)
        else:
            codes = encode_registers.nvfp4(values, inverse, bad, carrier=plan.target, interpret=plan.interpret)
        staged.at[pl.ds(piece * PIECE, PIECE), :][...] = codes

    most = plgpu.layout_cast(jnp.zeros((PIECE, HALF), jnp.float32), plgpu.Layout.WGMMA)
    pieces = []
    if plan.holds_products:
        whole = products(0, plan.pieces * PIECE)
        pieces = [[half[i * PIECE : (i + 1) * PIECE] for half in whole] for i in range(plan.pieces)]
        most = functools.reduce(larger, pieces, most)
    else:
        most = jax.lax.fori_loop(0, plan.pieces, lambda i, most: larger(most, products(i * PIECE, PIECE)), most)
    amax = _of_rows([most.max(axis=1) * (root if finite else 1.0)], [jnp.maximum], ring, plan)[0]
    largest = INT8_MAX if plan.target == "int8" else E2M1_MAX * E4M3_MAX
    row_scale = jnp.maximum(amax * (1 / largest), MIN_SCALE)
    keep_scale(row_scale * (1 / FP8_CARRIER_SHIFT) if plan.target == "fp8" else row_scale)
    inverse = rounded_inverse(row_scale, 1.0 / row_scale)
    for index, halves in enumerate(pieces):
        encode(index, halves, inverse)
    if not plan.holds_products:

        @pl.loop(0, plan.pieces)
        def _(piece):
            halves = products(piece * PIECE, PIECE)
            # Before what other warps may still multiply is written to.
            encode_registers.wait_for_warps(interpret=plan.interpret)
            encode(piece, halves, inverse)


def _statistics(tile, ring, plan: Plan) -> list[Float32[Array, " piece"]]:
    """As `tile_statistics.reduced`, over all places of the tile that are of the same row."""
    found = tile_statistics.nothing_found(plan.target, rows=PIECE, layout=plgpu.Layout.WGMMA)
    found = tile_statistics.magnitudes(found, tile, rows=PIECE, count=plan.pieces, layout=plgpu.Layout.WGMMA)
    values, combine = tile_statistics.reduced(found), (jnp.add, jnp.maximum, jnp.minimum)
    return _of_rows(values, combine[: len(values)], ring, plan)


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
    found: list[Float32[Array, " piece"]], combine: Sequence[Callable], ring, plan: Plan
) -> list[Float32[Array, " piece"]]:
    """What was found for each row of a piece, combined over all that belong to the same row of x; at most three.

    A ring holds the values twice, so that those of any distance ahead are in one slice of it.
    """

    def load(index: int, ahead: int) -> Float32[Array, " piece"]:
        return plgpu.load(ring.at[index, pl.ds(ahead, PIECE)], layout=plgpu.Layout.WGMMA.reduce(1))

    def put() -> None:
        for index, values in enumerate(found):
            for copy in (0, PIECE):
                ring.at[index, pl.ds(copy, PIECE)][...] = values
        encode_registers.wait_for_warps(interpret=plan.interpret)

    put()
    found = [
        functools.reduce(of, (load(index, ahead) for ahead in range(ROWS, PIECE, ROWS)), values)
        for index, (values, of) in enumerate(zip(found, combine, strict=True))
    ]
    if plan.parts > 1:
        encode_registers.wait_for_warps(interpret=plan.interpret)
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
    ring.at[3, pl.ds(0, flags.size)][...] = jnp.where(flags, 1.0, 0.0)
    plgpu.commit_smem()
    return functools.reduce(jnp.add, [ring[3, row] for row in range(ROWS)]) > 0
