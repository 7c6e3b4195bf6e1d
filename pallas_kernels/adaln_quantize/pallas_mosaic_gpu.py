"""`adaln_quantize` of bfloat16 to INT8 as one Pallas Mosaic GPU kernel: Hopper.

The kernel of `rotate_quantize`, in which a tile is normalised and modulated in place between its loading and its
rotation. For that a warp has two of the eight rows, all their blocks, in registers: sums over a row then need no shared
memory, and two rows share each value that they are modulated with.

All that a core does is text, or video, of one sample, so that it loads what multiplies and what is added to normalised
values once. At most one tile of a sample has rows of both, and takes the other one's from global memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common import device
from pallas_kernels.common.formats import Int8Array
from pallas_kernels.common.quantize_tile import FLOAT32_MAX
from pallas_kernels.rotate_quantize import pallas_mosaic_gpu as rotation
from pallas_kernels.rotate_quantize.pallas_mosaic_gpu import HADAMARD, MOST_BLOCKS, ROWS, Plan
from pallas_kernels.rotate_quantize.types import RowStatistics

BLOCK_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, HADAMARD), (2, HADAMARD), (4,))), warp_dims=(-5,), lane_dims=(-2,), vector_dim=-1
)
"""Of a block of a tile: a warp has two of the rows, a thread four columns of both."""
ROW_LAYOUT = BLOCK_LAYOUT.reduce(1)
COLUMN_LAYOUT = BLOCK_LAYOUT.reduce(0)
HELD = 20
"""Blocks that stay in registers while a tile is normalised; more would leave none for anything else."""


def refusal(
    x: Float[Array, "batch tokens dim"], norm: AdaptiveNorm, *, format: str, hadamard: int, **options: Any
) -> str | None:
    """See `common.choice.Implementation`."""
    _, tokens, dim = x.shape
    if (reason := rotation.format_refusal(x, format=format, hadamard=hadamard)) is not None:
        return reason
    if dim > MOST_BLOCKS * HADAMARD:
        return f"a row may have at most {MOST_BLOCKS} blocks of {HADAMARD}, not {dim} values"
    if tokens % ROWS:
        return f"its tiles have {ROWS} rows, which do not divide {tokens}"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def adaln_quantize(
    x: Float[Array, "batch tokens dim"], norm: AdaptiveNorm, *, format: str, hadamard: int, **options: Any
) -> tuple[Int8Array, RowStatistics]:
    """See `api.adaln_quantize`; the rotation is within `quantize_tile.ROTATION_BOUND`."""
    interpret = device.interpreting()
    return _adaln_quantize(
        x,
        _gain_and_offset(norm),
        text_length=norm.text_length,
        epsilon=norm.epsilon,
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


@functools.partial(jax.jit, static_argnames=("text_length", "epsilon", "cores", "interpret"))
def _adaln_quantize(
    x: Float[Array, "batch tokens dim"],
    gain_and_offset: Float32[Array, "batch kind 2 dim"],
    *,
    text_length: int,
    epsilon: float,
    cores: int,
    interpret: bool,
) -> tuple[Int8Array, RowStatistics]:
    batch, tokens, dim = x.shape
    plan = Plan(rows=batch * tokens, parts=1, blocks=dim // HADAMARD)
    share = _share(tokens, text_length, max(cores // batch, 2))
    split = (plan.rows, plan.blocks, HADAMARD)
    a_row = jax.ShapeDtypeStruct((plan.rows,), jnp.float32)
    codes, *found = plgpu.kernel(
        functools.partial(_kernel, plan=plan, share=share, tokens=tokens, text_length=text_length, epsilon=epsilon),
        out_type=(jax.ShapeDtypeStruct(split, jnp.int8), a_row, a_row, a_row),
        scratch_types={
            **rotation.scratch_types(plan, constants=2),
            "modulation": plgpu.SMEM((2, plan.blocks, HADAMARD), jnp.float32),
        },
        grid=(batch, sum(share.cores)),
        grid_names=("sample", "core"),
        **rotation.launch(interpret=interpret),
    )(x.reshape(split), rotation.rotation(), gain_and_offset.reshape(2 * batch, 2, *split[1:]))
    scale, sums, largest = (values.reshape(batch, tokens) for values in found)
    array = Int8Array(codes=codes.reshape(x.shape), scale=scale, hadamard=HADAMARD)
    return array, RowStatistics(sum_abs=sums, max_abs=largest)


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

    def measure(tile, row, ring, out) -> rotation.KeepScale:
        blocks = [tile.at[pl.ds(block * ROWS, ROWS), :] for block in range(plan.blocks)]
        rows = out.at[:, pl.ds(0, ROWS)]
        sample = jax.lax.axis_index("sample")
        video_begins = sample * tokens + text_length

        _modulate(blocks, blocks, modulation, epsilon)

        @pl.when((row < video_begins) & (row + ROWS > video_begins))
        def _():
            unchanged = [x.at[pl.ds(row, ROWS), block, :] for block in range(plan.blocks)]
            is_text = row + plgpu.broadcasted_iota(jnp.int32, (ROWS, HADAMARD), 0, layout=BLOCK_LAYOUT) < video_begins
            _modulate(unchanged, blocks, gain_and_offset.at[2 * sample + 1], epsilon, unless=is_text)

        plgpu.commit_smem()
        total, most = _statistics(tile, plan)
        rows[1], rows[2] = total, rotation.kept_maximum(total, most)
        cleaned = rotation.any_row(rotation.needs_cleaning(total <= FLOAT32_MAX, most), ring)

        @pl.when(cleaned)
        def _():
            finite = _is_finite(rows)
            rotation.clean(tile, finite, rows=ROWS, count=plan.blocks, layout=BLOCK_LAYOUT)
            flushed, _ = _statistics(tile, plan)
            rows[1] = jnp.where(finite, flushed, jnp.nan)

        def keep_scale(row_scale: Float32[Array, " piece"]) -> None:
            out[0] = row_scale

            @pl.when(cleaned)
            def _():
                plgpu.commit_smem()
                rows[0] = jnp.where(_is_finite(rows), plgpu.load(rows.at[0], layout=ROW_LAYOUT), jnp.nan)

        return keep_scale

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


def _modulate(sources: list, blocks: list, modulation, epsilon: float, *, unless=None) -> None:
    """Normalises and modulates eight rows in float32, and rounds once.

    Args:
        sources: references of these rows, [8, 128] for each block.
        blocks: where the result goes.
        modulation: gains and offsets, [2, blocks, 128].
        epsilon: added to the variance.
        unless: [8, 128], which rows stay as they are in `blocks`; None for none.
    """
    load = functools.partial(plgpu.load, optimized=False)  # there is no other for global memory

    def mean(values: list[Float32[Array, "8 128"]]) -> Float32[Array, " 8"]:
        return functools.reduce(jnp.add, values).sum(axis=1) * (1 / (len(blocks) * HADAMARD))

    def value(source) -> Float32[Array, "8 128"]:
        return load(source, layout=BLOCK_LAYOUT).astype(jnp.float32)

    def again(held: list[Float32[Array, "8 128"]]) -> list[Float32[Array, "8 128"]]:
        if len(blocks) > HELD:
            plgpu.commit_smem()  # past it, what was loaded before is loaded again rather than held
        return held + [value(source) for source in sources[HELD:]]

    values = [value(source) for source in sources]
    centre = _spread(mean(values), 0)
    centred = [each - centre for each in again(values[:HELD])]
    inverse = _spread(jax.lax.rsqrt(mean([each * each for each in centred]) + epsilon), 0)
    for index, (each, block) in enumerate(zip(again(centred[:HELD]), blocks, strict=True)):
        gain, offset = (_spread(load(modulation.at[i, index], layout=COLUMN_LAYOUT), 1) for i in range(2))
        normalised = (each if index < HELD else each - centre) * inverse
        rounded = (normalised * gain + offset).astype(jnp.bfloat16)
        if unless is not None:
            rounded = jnp.where(unless, plgpu.load(block, layout=BLOCK_LAYOUT), rounded)
        block[...] = rounded


def _statistics(tile, plan: Plan) -> list[Float32[Array, " 8"]]:
    """The sum and the maximum of the magnitudes of each row of a tile."""
    unroll = next(size for size in (4, 3, 2, 1) if plan.blocks % size == 0)
    return rotation.magnitudes(tile, rows=ROWS, count=plan.blocks, unroll=unroll, layout=BLOCK_LAYOUT)
