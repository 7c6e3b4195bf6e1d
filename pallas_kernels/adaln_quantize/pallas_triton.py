"""`adaln_quantize` in one pass over x, for compute capability 8.0 and up.

The kernel of `rotate_quantize`, whose rows are not loaded but made: a program keeps its rows of x in registers, takes
mean and variance, and modulates. What multiplies and what is added to a normalised value is computed before, once for
the rows of text and once for those of video of each sample.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common import device
from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.common.quantize_tile import Geometry, Instructions
from pallas_kernels.common.tuning import configured
from pallas_kernels.rotate_quantize import pallas_triton as rotation
from pallas_kernels.rotate_quantize.pallas_triton import Config, Output
from pallas_kernels.rotate_quantize.types import RowStatistics


def heuristic(*, k: int, hadamard: int, target: str) -> Config:
    """The configuration for rows of k values without a tuned one; `target` is "int8", "nvfp4" or a carrier.

    Several rows a program, as all of a program's rows share what they are modulated with.
    """
    return dataclasses.replace(rotation.heuristic(k=k, hadamard=hadamard, target=target), width=min(64, hadamard or 64))


def candidates(*, k: int, hadamard: int, target: str) -> list[Config]:
    """Configurations worth timing."""
    return rotation.candidates(k=k, hadamard=hadamard, target=target)


def refusal(x: Float[Array, "batch tokens dim"], norm: AdaptiveNorm, *, hadamard: int, **options: Any) -> str | None:
    """See `common.choice.Implementation`."""
    return rotation.refusal(x, hadamard=hadamard)


def adaln_quantize(
    x: Float[Array, "batch tokens dim"],
    norm: AdaptiveNorm,
    *,
    format: str,
    hadamard: int,
    four_over_six: bool = False,
    carrier: str | None = None,
    config: Config | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.adaln_quantize`; `hadamard` is a block size or 0."""
    if config is None:
        config = configured(
            "adaln_quantize/pallas_triton", heuristic, k=x.shape[-1], hadamard=hadamard, target=carrier or format
        )
    return _adaln_quantize(
        x,
        norm,
        output=Output(format=format, carrier=carrier, hadamard=hadamard, four_over_six=four_over_six),
        config=config,
        instructions=Instructions.here(),
        interpret=device.interpreting(),
    )


@functools.partial(jax.jit, static_argnames=("output", "config", "instructions", "interpret"))
def _adaln_quantize(
    x: Float[Array, "batch tokens dim"],
    norm: AdaptiveNorm,
    *,
    output: Output,
    config: Config,
    instructions: Instructions,
    interpret: bool,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    batch, tokens, dim = x.shape
    norm_scale, norm_bias, shift, scale = (
        value.astype(jnp.float32) for value in (norm.norm_scale, norm.norm_bias, norm.shift, norm.scale)
    )
    gain = norm_scale * (1 + scale)
    offset = norm_bias * (1 + scale) + shift
    tiles = [pl.cdiv(length, config.rows) for length in (norm.text_length, tokens - norm.text_length)]
    prologue = functools.partial(
        _modulated,
        dim=dim,
        tokens=tokens,
        text_length=norm.text_length,
        text_tiles=tiles[0],
        tiles=sum(tiles),
        epsilon=norm.epsilon,
    )
    found = rotation.quantize_rows(
        prologue,
        [x.reshape(-1, dim), gain.reshape(-1, dim), offset.reshape(-1, dim)],
        dtype=x.dtype,
        rows=(batch, tokens),
        size=dim,
        output=output,
        config=config,
        instructions=instructions,
        interpret=interpret,
        name="adaln_quantize",
        programs=batch * sum(tiles),
    )
    assert not isinstance(found, jax.Array)
    return found


def _modulated(
    cut: Geometry,
    refs: list,
    *,
    dim: int,
    tokens: int,
    text_length: int,
    text_tiles: int,
    tiles: int,
    epsilon: float,
) -> tuple[Geometry, Callable]:
    """Rows of normalised and modulated x. A tile is all text or all video of one sample, so tiles may be incomplete.

    Gain and offset are [2 * batch, ...], text before video of each sample.
    """
    x_ref, gain_ref, offset_ref = refs
    sample, tile = jax.lax.div(pl.program_id(0), tiles), jax.lax.rem(pl.program_id(0), tiles)
    video = jnp.minimum(jnp.maximum(tile - (text_tiles - 1), 0), 1)  # 0 or 1
    first = sample * tokens + tile * cut.rows + video * (text_length - text_tiles * cut.rows)
    end = None
    if text_length % cut.rows or tokens % cut.rows:
        end = sample * tokens + text_length + video * (tokens - text_length)
    cut = dataclasses.replace(cut, first_row=first, end_row=end)
    kind = 2 * sample + video

    load = rotation.loader(cut, x_ref)
    places = cut.places(x_ref)
    total = functools.reduce(jnp.add, [load(cut, *place).astype(jnp.float32) for place in places])
    mean = total.sum(2).sum(1) * (1 / dim)

    def centred(where: Geometry, chunk, slice_: int | None, part: int | None) -> Float32[Array, "rows blocks columns"]:
        """x - mean; zero in blocks that do not exist."""
        difference = load(where, chunk, slice_, part).astype(jnp.float32) - mean[:, None, None]
        if where.total_blocks % where.blocks == 0:
            return difference
        inside = where.inside(chunk)
        assert inside is not None
        return jnp.where(inside[:, :, None], difference, 0.0)

    squares = [centred(cut, *place) for place in places]
    squares = functools.reduce(jnp.add, [difference * difference for difference in squares])
    inverse = jax.lax.rsqrt(squares.sum(2).sum(1) * (1 / dim) + epsilon)

    def source(where: Geometry, chunk, slice_: int | None, part: int | None) -> Float[Array, "rows blocks columns"]:
        gain, offset = (where.load_one_row(ref, kind, chunk, slice_, part) for ref in (gain_ref, offset_ref))
        values = centred(where, chunk, slice_, part) * inverse[:, None, None] * gain + offset
        return values.astype(x_ref.dtype)

    return cut, source
