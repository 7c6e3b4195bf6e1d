"""`adaln_quantize` of bfloat16 to INT8, and to NVFP4 in a carrier, as one Pallas Mosaic GPU kernel: Hopper.

The kernel of `rotate_quantize`, in which a tile is normalised and modulated in place between its loading and its
rotation. For that a warp has two of the eight rows, a few blocks of them at a time, in registers: sums over a row then
need no shared memory, and two rows share each value that they are modulated with. Statistics of the result are taken
of registers on the way.

All that a core does is text, or video, of one sample, so that it loads what multiplies and what is added to normalised
values once. At most one tile of a sample has rows of both, and takes the other one's from global memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common import device, encode_registers
from pallas_kernels.common.formats import CarriedArray, Int8Array
from pallas_kernels.common.quantize_tile import FLOAT32_MAX
from pallas_kernels.rotate_quantize import pallas_mosaic_gpu as rotation
from pallas_kernels.rotate_quantize import tile_statistics
from pallas_kernels.rotate_quantize.pallas_mosaic_gpu import HADAMARD, MOST_BLOCKS, ROWS, Plan
from pallas_kernels.rotate_quantize.types import RowStatistics

BLOCK_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, HADAMARD), (2, HADAMARD), (4,))), warp_dims=(-5,), lane_dims=(-2,), vector_dim=-1
)
"""Of a block of a tile: a warp has two of the rows, a thread four columns of both."""
ROW_LAYOUT = BLOCK_LAYOUT.reduce(1)
COLUMN_LAYOUT = BLOCK_LAYOUT.reduce(0)
UNROLLS = (4, 3, 2, 1)
"""Blocks of one turn of a loop: a kernel longer than the instruction cache waits for its code."""


def refusal(
    x: Float[Array, "batch tokens dim"],
    norm: AdaptiveNorm,
    *,
    format: str,
    hadamard: int,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> str | None:
    """See `common.choice.Implementation`."""
    _, tokens, dim = x.shape
    if (reason := rotation.format_refusal(x, format, carrier, hadamard, four_over_six=four_over_six)) is not None:
        return reason
    if dim > MOST_BLOCKS * HADAMARD:
        return f"a row may have at most {MOST_BLOCKS} blocks of {HADAMARD}, not {dim} values"
    if tokens % ROWS:
        return f"its tiles have {ROWS} rows, which do not divide {tokens}"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def adaln_quantize(
    x: Float[Array, "batch tokens dim"],
    norm: AdaptiveNorm,
    *,
    format: str,
    hadamard: int,
    carrier: str | None = None,
    **options: Any,
) -> tuple[Int8Array | CarriedArray, RowStatistics]:
    """See `api.adaln_quantize`; the rotation is within `quantize_tile.ROTATION_BOUND`."""
    interpret = device.interpreting()
    return _adaln_quantize(
        x,
        _gain_and_offset(norm),
        text_length=norm.text_length,
        epsilon=norm.epsilon,
        target=carrier or format,
        cores=4 if interpret else device.core_count(),
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share:
    """How the tiles of each sample are shared among cores. The tile with both kinds of rows counts as one of text.

    Attributes:
        tiles: of text and of video.
        cores: for text and for video: none where there is no tile.
    """

    tiles: tuple[int, int]
    cores: tuple[int, int]


def _share(tokens: int, text_length: int, cores: int) -> _Share:
    """Such that the core with most tiles has few.

    Args:
        tokens: rows of a sample.
        text_length: of these.
        cores: for a sample.
    """
    text = pl.cdiv(text_length, ROWS)
    tiles = (text, tokens // ROWS - text)

    def most(cores: tuple[int, int]) -> int:
        return max(pl.cdiv(count, each) for count, each in zip(tiles, cores, strict=True) if count)

    if 0 in tiles:
        return _Share(tiles=tiles, cores=(min(tiles[0], cores), min(tiles[1], cores)))
    each = min(((few, cores - few) for few in range(1, cores)), key=most)
    return _Share(tiles=tiles, cores=each)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfCore:
    """What a core does.

    Attributes:
        modulation: the place of its gains and offsets among all.
        first: its first tile.
        step: from a tile of it to the next.
        own: how many it has.
    """

    modulation: Int32[Array, ""]
    first: Int32[Array, ""]
    step: Int32[Array, ""]
    own: Int32[Array, ""]


@functools.partial(jax.jit, static_argnames=("text_length", "epsilon", "target", "cores", "interpret"))
def _adaln_quantize(
    x: Float[Array, "batch tokens dim"],
    gain_and_offset: Float32[Array, "batch kind 2 dim"],
    *,
    text_length: int,
    epsilon: float,
    target: str,
    cores: int,
    interpret: bool,
) -> tuple[Int8Array | CarriedArray, RowStatistics]:
    batch, tokens, dim = x.shape
    blocks = dim // HADAMARD
    plan = Plan(rows=batch * tokens, parts=1, blocks=blocks, target=target, interpret=interpret, constants=2 * dim * 4)
    share = _share(tokens, text_length, max(cores // batch, 2))
    split = (plan.rows, plan.blocks, HADAMARD)
    codes, *found = plgpu.kernel(
        functools.partial(
            _kernel,
            plan=plan,
            share=share,
            tokens=tokens,
            text_length=text_length,
            epsilon=epsilon,
        ),
        out_type=rotation.result_types(plan),
        scratch_types={
            **rotation.scratch_types(plan, constants=2),
            "modulation": plgpu.SMEM((2, blocks, HADAMARD), jnp.float32),
        },
        grid=(batch, sum(share.cores)),
        grid_names=("sample", "core"),
        **rotation.launch(plan),
    )(x.reshape(split), rotation.rotation(), gain_and_offset.reshape(2 * batch, 2, *split[1:]))
    return rotation.results(codes.reshape(x.shape), [values.reshape(batch, tokens) for values in found], plan)


@jax.jit
def _gain_and_offset(norm: AdaptiveNorm) -> Float32[Array, "batch kind 2 dim"]:
    """What multiplies a normalised value, and what is then added."""
    norm_scale, norm_bias, shift, scale = (
        value.astype(jnp.float32) for value in (norm.norm_scale, norm.norm_bias, norm.shift, norm.scale)
    )
    return jnp.stack([norm_scale * (1 + scale), norm_bias * (1 + scale) + shift], 2)


def _kernel(
    x,
    hadamard,
    gain_and_offset,
    codes,
    scale,
    sums,
    largest,
    *,
    plan: Plan,
    share: _Share,
    tokens: int,
    text_length: int,
    epsilon: float,
    modulation,
    **scratch,
):
    def of_core() -> _OfCore:
        sample, core = jax.lax.axis_index("sample"), jax.lax.axis_index("core")
        video = (core >= share.cores[0]).astype(jnp.int32)
        cores, tiles = (of_text + video * (of_video - of_text) for of_text, of_video in (share.cores, share.tiles))
        place = core - video * share.cores[0]
        first = sample * (tokens // ROWS) + video * share.tiles[0] + place
        return _OfCore(modulation=2 * sample + video, first=first, step=cores, own=pl.cdiv(tiles - place, cores))

    def measure(tile, row, ring, out) -> tuple[Bool[Array, ""], rotation.KeepScale]:
        rows = out.at[:, pl.ds(0, ROWS)]
        sample = jax.lax.axis_index("sample")
        video_begins = sample * tokens + text_length

        def block(index):
            return tile.at[pl.ds(index * ROWS, ROWS), :]

        def modulate() -> tile_statistics.Found:
            return _modulate(block, block, modulation, plan, epsilon)

        def modulate_both() -> tile_statistics.Found:
            modulate()
            is_text = row + plgpu.broadcasted_iota(jnp.int32, (ROWS, HADAMARD), 0, layout=BLOCK_LAYOUT) < video_begins

            def unchanged(index):
                return x.at[pl.ds(row, ROWS), index, :]

            other = gain_and_offset.at[2 * sample + 1]
            return _modulate(unchanged, block, other, plan, epsilon, unless=is_text)

        both = (row < video_begins) & (row + ROWS > video_begins)
        total, most, *least = tile_statistics.reduced(jax.lax.cond(both, modulate_both, modulate))
        rows[1], rows[2] = total, tile_statistics.kept_maximum(total, most)
        unusual = rotation.any_row(tile_statistics.needs_cleaning(total <= FLOAT32_MAX, most, *least), ring)

        @pl.when(unusual)
        def _():
            finite = _is_finite(rows)
            tile_statistics.clean(tile, finite, plan.target, rows=ROWS, count=plan.blocks, layout=BLOCK_LAYOUT)
            found = tile_statistics.nothing_found(plan.target, rows=ROWS, layout=BLOCK_LAYOUT)
            found = tile_statistics.magnitudes(found, tile, rows=ROWS, count=plan.blocks, layout=BLOCK_LAYOUT)
            rows[1] = jnp.where(finite, tile_statistics.reduced(found)[0], jnp.nan)

        def keep_scale(row_scale: Float32[Array, " piece"]) -> None:
            out[0] = row_scale
            if plan.target == "int8":

                @pl.when(unusual)
                def _():
                    plgpu.commit_smem()
                    rows[0] = jnp.where(_is_finite(rows), plgpu.load(rows.at[0], layout=ROW_LAYOUT), jnp.nan)

        return unusual, keep_scale

    rotation.run(
        x,
        codes,
        (scale, sums, largest),
        plan=plan,
        own=lambda: of_core().own,
        first_row=lambda turn: (of_core().first + turn * of_core().step) * ROWS,
        constants=lambda: [(hadamard, scratch["matrix"]), (gain_and_offset.at[of_core().modulation], modulation)],
        measure=measure,
        **scratch,
    )


def _spread(values: Float32[Array, " n"], axis: int) -> Float32[Array, "8 128"]:
    """A value of each row (axis 0) or of each column (axis 1) of a block, for the others too."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(values, (ROWS, HADAMARD), (axis,)), BLOCK_LAYOUT)


def _is_finite(rows) -> Bool[Array, " 8"]:
    """Of the rows whose statistics are kept; comparisons with NaN are false."""
    return plgpu.load(rows.at[1], layout=ROW_LAYOUT) <= FLOAT32_MAX


def _modulate(
    source: Callable, block: Callable, modulation, plan: Plan, epsilon: float, *, unless=None
) -> tile_statistics.Found:
    """Normalises and modulates eight rows in float32, and rounds once.

    Args:
        source: of an index, the reference of a block of these rows, [8, 128].
        block: of an index, where its result goes.
        modulation: gains and offsets, [2, blocks, 128].
        plan: sizes.
        epsilon: added to the variance.
        unless: [8, 128], which rows stay as they are in `block`; None for none.

    Returns:
        what is found of the results.
    """
    load = functools.partial(plgpu.load, optimized=False)  # there is no other for global memory
    unroll = next(size for size in UNROLLS if plan.blocks % size == 0)

    def values(index) -> Float32[Array, "8 128"]:
        return load(source(index), layout=BLOCK_LAYOUT).astype(jnp.float32)

    def over_row(values: Float32[Array, "8 128"]) -> Float32[Array, "8 128"]:
        return _spread(values.sum(axis=1) * (1 / (plan.blocks * HADAMARD)), 0)

    # Each place in a block has a mean and squares about it, in one pass: of differences to its value in the first one.
    first = values(0)

    def add(turn, sums):
        total, squares = sums
        for ahead in range(unroll):
            difference = values(turn * unroll + ahead) - first
            total, squares = total + difference, squares + difference * difference
        return total, squares

    none = plgpu.layout_cast(jnp.zeros((ROWS, HADAMARD), jnp.float32), BLOCK_LAYOUT)
    total, squares = jax.lax.fori_loop(0, plan.blocks // unroll, add, (none, none))
    means = first + total * (1 / plan.blocks)
    squares = jnp.where(squares <= FLOAT32_MAX, squares - total * (total * (1 / plan.blocks)), squares)
    centre = over_row(means * plan.blocks)
    squares = jnp.maximum(squares, 0.0) + (means - centre) * (means - centre) * plan.blocks
    inverse = jax.lax.rsqrt(over_row(squares) + epsilon)

    def modulate(turn, found: tile_statistics.Found) -> tile_statistics.Found:
        for index in (turn * unroll + ahead for ahead in range(unroll)):
            gain, offset = (_spread(load(modulation.at[i, index], layout=COLUMN_LAYOUT), 1) for i in range(2))
            modulated = (values(index) - centre) * inverse * gain + offset
            rounded, wide = encode_registers.bfloat16(modulated, BLOCK_LAYOUT, interpret=plan.interpret)
            if unless is not None:
                rounded = jnp.where(unless, plgpu.load(block(index), layout=BLOCK_LAYOUT), rounded)
                wide = rounded.astype(jnp.float32)
            block(index)[...] = rounded
            found = found.and_of(rounded, wide)
        return found

    nothing = tile_statistics.nothing_found(plan.target, rows=ROWS, layout=BLOCK_LAYOUT)
    return jax.lax.fori_loop(0, plan.blocks // unroll, modulate, nothing)
