"""`rotate_quantize` in one pass over x, for compute capability 8.0 and up.

A program keeps whole rows in registers: it rotates them on tensor cores, takes the largest magnitude of every row and
then the codes. One tensor scale for several rows takes two passes, the first of which only finds the largest
magnitudes. See `common.quantize_tile`, which is most of this.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.common import device, quantize_tile
from pallas_kernels.common.formats import (
    BLOCK,
    CARRIERS,
    FP8_CARRIER_SHIFT,
    INT8_MAX,
    MIN_SCALE,
    CarriedArray,
    Int8Array,
    NVFP4Array,
)
from pallas_kernels.common.quantize_tile import Geometry, Instructions
from pallas_kernels.common.tuning import configured
from pallas_kernels.common.xla import expand_to
from pallas_kernels.rotate_quantize.types import RowStatistics

LARGEST_SIZE = 32_768
"""Values of a row that a program can keep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is divided. All are powers of two.

    Attributes:
        rows: of a program.
        blocks: of the rotation (or slices, without one), of each row, that are processed at a time.
        width: of the product on tensor cores: the rest of a block of the rotation is sums.
        num_warps: of a program.
    """

    rows: int
    blocks: int
    width: int
    num_warps: int


def heuristic(*, k: int, hadamard: int, target: str, most_chunks: int = 3) -> Config:
    """The configuration for rows of k values without a tuned one; `target` is "int8", "nvfp4" or a carrier.

    At least 64 blocks are processed at a time, for the tensor cores of Hopper, in the chunks that leave the fewest
    places empty. For all targets wide products were faster with several chunks, and products of 64 with one.
    """
    total = max(1, k // (hadamard or 64))
    sizes = {chunks: pl.next_power_of_2(pl.cdiv(total, chunks)) for chunks in range(1, most_chunks + 1)}
    chunks = min(sizes, key=lambda chunks: (chunks * sizes[chunks], chunks))
    blocks = sizes[chunks]
    return Config(
        rows=max(1, 64 // blocks),
        blocks=blocks,
        width=64 if chunks == 1 else 128,
        num_warps=4 if blocks <= 64 else 8,
    )


def candidates(*, k: int, hadamard: int, target: str) -> list[Config]:
    """Configurations worth timing."""
    total = k // (hadamard or 32)
    found = []
    for width in (32, 64, 128):
        for blocks in (4, 8, 16, 32, 64, 128):
            for rows in (1, 2, 4, 8, 16):
                for num_warps in (4, 8):
                    kept = rows * pl.cdiv(total, blocks) * blocks * (hadamard or 32) / (32 * num_warps)
                    if blocks < 2 * total and rows * blocks in (16 * num_warps, 32 * num_warps) and kept <= 192:
                        found.append(Config(rows=rows, blocks=blocks, width=width, num_warps=num_warps))
    return found


def refusal(x: Float[Array, "*rows k"], *, hadamard: int, **options) -> str | None:
    """See `common.choice.Implementation`."""
    if x.shape[-1] > LARGEST_SIZE:
        return f"it keeps a row in registers, at most {LARGEST_SIZE} values, found {x.shape[-1]}"
    if x.shape[-1] % BLOCK:
        return f"it goes by blocks of {BLOCK}, which do not divide a contracting axis of {x.shape[-1]}"
    return device.refusal(at_least=(8, 0))


def rotate_quantize(
    x: Float[Array, "*rows k"],
    *,
    format: str,
    hadamard: int,
    tensor_scale: Float32[Array, "*leading"] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
    config: Config | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.rotate_quantize`; `hadamard` is a block size or 0.

    The rotation is within `quantize_tile.ROTATION_BOUND`, and everything else equal to the reference in every byte for
    what it rotated to."""
    if config is None:
        case = {"k": x.shape[-1], "hadamard": hadamard, "target": carrier or format}
        if four_over_six or x.dtype == jnp.float32:
            config = heuristic(**case, most_chunks=1)  # several values are kept for each
        else:
            config = configured("rotate_quantize/pallas_triton", heuristic, **case)
    return _rotate_quantize(
        x,
        tensor_scale,
        format=format,
        hadamard=hadamard,
        scale_dims=scale_dims,
        four_over_six=four_over_six,
        carrier=carrier,
        config=config,
        instructions=Instructions.here(),
        interpret=device.interpreting(),
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "format",
        "hadamard",
        "scale_dims",
        "four_over_six",
        "carrier",
        "config",
        "instructions",
        "interpret",
    ),
)
def _rotate_quantize(
    x: Float[Array, "*rows k"],
    tensor_scale: Float32[Array, "*leading"] | None,
    *,
    format: str,
    hadamard: int,
    scale_dims: int,
    four_over_six: bool,
    carrier: str | None,
    config: Config,
    instructions: Instructions,
    interpret: bool,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    *rows, k = x.shape
    output = Output(format=format, carrier=carrier, hadamard=hadamard, four_over_six=four_over_six)
    run = functools.partial(
        quantize_rows,
        _rows,
        [x.reshape(-1, k)],
        dtype=x.dtype,
        rows=tuple(rows),
        size=k,
        config=config,
        instructions=instructions,
        interpret=interpret,
        name="rotate_quantize",
    )
    if format == "nvfp4":
        if tensor_scale is not None:
            tensor_scale = jnp.maximum(tensor_scale, MIN_SCALE)
        elif scale_dims < len(rows):
            amax = run(output=dataclasses.replace(output, only_maxima=True))
            assert isinstance(amax, jax.Array)
            amax = amax.reshape(rows).max(tuple(range(scale_dims, len(rows))))
            tensor_scale = quantize_tile.nvfp4_tensor_scale(amax, four_over_six=four_over_six)
    found = run(output=output, tensor_scale=tensor_scale)
    assert not isinstance(found, jax.Array)
    return found


def _rows(cut: Geometry, refs: list) -> tuple[Geometry, Callable]:
    """x itself."""
    cut = dataclasses.replace(cut, first_row=pl.program_id(0) * cut.rows)
    return cut, loader(cut, refs[0])


def loader(cut: Geometry, ref) -> Callable:
    """What a prologue gives, of an operand: the tile is loaded at once, other geometries when they are asked for."""
    kept: dict[tuple, Array] = {place: cut.load(ref, *place) for place in cut.places(ref)}

    def source(where: Geometry, chunk, slice_: int | None, part: int | None) -> Array:
        return kept[chunk, slice_, part] if where is cut else where.load(ref, chunk, slice_, part)

    return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a kernel writes; see `api.rotate_quantize`.

    Attributes:
        only_maxima: the largest finite magnitudes of the rotated rows, and nothing else.
    """

    format: str
    carrier: str | None
    hadamard: int
    four_over_six: bool
    only_maxima: bool = False

    @property
    def packed(self) -> bool:
        """Whether codes are two a byte."""
        return self.format == "nvfp4" and self.carrier is None

    @property
    def dtype(self) -> jnp.dtype:
        """Of the codes, as the kernel writes them."""
        if self.format == "int8":
            return jnp.dtype(jnp.int8)
        return jnp.dtype(jnp.bfloat16 if self.carrier == "exact" else jnp.uint8)


def quantize_rows(
    prologue: Callable[[Geometry, list], tuple[Geometry, Callable]],
    operands: Sequence[Array],
    *,
    dtype: DTypeLike,
    rows: tuple[int, ...],
    size: int,
    output: Output,
    config: Config,
    instructions: Instructions,
    interpret: bool,
    name: str,
    programs: int | None = None,
    tensor_scale: Float32[Array, "*leading"] | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics] | Float32[Array, " n"]:
    """Rotates and quantises rows that `prologue` makes, inside the kernel, from operands.

    Args:
        prologue: takes a geometry and references of the operands. Gives the geometry with the rows of this program; and
            a function that gives values of the rows, from a geometry and what `Geometry.load` takes after a reference.
        operands: those of a shape that ends in K are given to the kernel as `Geometry.split`, with an axis for parts if
            there are any.
        dtype: of what the prologue gives.
        rows: shape of the result without K.
        size: K.
        output: what to write.
        config: how to divide the work.
        instructions: to use.
        interpret: the kernel.
        name: of the kernel.
        programs: how many; None for one for every `config.rows` rows.
        tensor_scale: one for several rows; None if every row has its own.

    Returns:
        (the quantised array, statistics of the rows), or the largest magnitude of each row.
    """
    n = math.prod(rows)
    hadamard = output.hadamard
    cut = quantize_tile.geometry(
        (n, size), hadamard=hadamard, width=config.width, rows=config.rows, blocks=config.blocks
    )
    parts = [0, 1] if output.packed and not hadamard else [None]
    columns = cut.split(cut.width)[1:] if len(parts) == 1 else (*cut.split(cut.width // 2)[1:], 2)
    operands = [value.reshape(*value.shape[:-1], *columns) if value.shape[-1] == size else value for value in operands]
    planes = []
    for width in (cut.width, hadamard) if hadamard else ():
        found = quantize_tile.matrices(hadamard, width, packed=output.packed)
        planes += [jnp.asarray(plane, quantize_tile.operand_dtype(dtype)) for plane in found]
    row_scale = tensor_scale is None
    scales = []
    if tensor_scale is not None:
        scales = [jnp.broadcast_to(expand_to(tensor_scale, len(rows)), rows).reshape(n)]
    a_row = jax.ShapeDtypeStruct((n,), jnp.float32)
    if output.only_maxima:
        out_shape = [a_row]
    else:
        codes = cut.split(cut.width // 2 if output.packed else cut.width)
        out_shape = [jax.ShapeDtypeStruct(codes, output.dtype), a_row, a_row]
        out_shape += [a_row] if row_scale else []
        out_shape += [jax.ShapeDtypeStruct(cut.split(cut.width // BLOCK), jnp.uint8)] if output.packed else []
    kernel = functools.partial(
        _kernel,
        prologue=prologue,
        parts=parts,
        cut=cut,
        output=output,
        instructions=instructions,
        counts=(len(operands), len(planes) // 2, len(planes) // 2, len(scales)),
    )
    found = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(programs or pl.cdiv(n, cut.rows),),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*operands, *planes, *scales)
    if output.only_maxima:
        return found[0]
    codes, sum_abs, max_abs, *found = found
    statistics = RowStatistics(sum_abs=sum_abs.reshape(rows), max_abs=max_abs.reshape(rows))
    if row_scale:
        tensor_scale, *found = found
        tensor_scale = tensor_scale.reshape(rows)
    if output.packed:
        array = NVFP4Array(
            codes=codes.reshape(*rows, -1),
            scales=found[0].reshape(*rows, -1),
            tensor_scale=tensor_scale,
            hadamard=hadamard,
        )
    elif output.format == "int8":
        array = Int8Array(codes=codes.reshape(*rows, -1), scale=tensor_scale, hadamard=hadamard)
    else:
        if output.carrier == "fp8":
            codes = jax.lax.bitcast_convert_type(codes, CARRIERS["fp8"])
            tensor_scale = tensor_scale * (1 / FP8_CARRIER_SHIFT)
        scale = jnp.broadcast_to(expand_to(tensor_scale, len(rows)), rows)
        array = CarriedArray(codes=codes.reshape(*rows, -1), scale=scale, hadamard=hadamard)
    return array, statistics


def _kernel(
    *refs,
    prologue: Callable,
    parts: list,
    cut: Geometry,
    output: Output,
    instructions: Instructions,
    counts: tuple[int, int, int, int],
):
    refs = list(refs)
    operands, planes, whole_planes, given = ([refs.pop(0) for _ in range(count)] for count in counts)
    cut, source = prologue(cut, operands)
    flush = functools.partial(quantize_tile.flush, instructions=instructions)
    planes, whole_planes = ([plane[...] for plane in matrices] for matrices in (planes, whole_planes))

    def rotate(slices: Iterable[list[Array]], planes: list) -> list[list[Float32[Array, "m n"]]]:
        """[slice][part] of a chunk to [plane][slice]."""
        if output.hadamard:
            products = [quantize_tile.rotate_slice(parts[0], planes) for parts in slices]
            return [quantize_tile.combine_slices(plane, output.hadamard) for plane in zip(*products, strict=True)]
        # Adding zero leaves no negative one, which may have been flushed.
        return [[part.astype(jnp.float32) + 0.0 for part in plane] for plane in zip(*slices, strict=True)]

    found = []

    def flushed(chunk: int) -> Iterator[list[Array]]:
        """Slices one by one, each to be used before the next, as registers are few."""
        for slice_ in range(cut.slices):
            raw = [cut.matrix(source(cut, chunk, slice_, part)) for part in parts]
            values = [flush(part) for part in raw]
            for pair in zip(raw, values, strict=True):
                sums, magnitudes = quantize_tile.statistics(*pair, instructions)
                if found:
                    sums, magnitudes = sums + found[0], quantize_tile.maximum(magnitudes, found[1], instructions)
                found[:] = sums, magnitudes
            yield values

    chunks = [rotate(flushed(chunk), planes) for chunk in range(cut.chunks)]
    sums, largest = quantize_tile.row_statistics(cut, *found)
    if not output.only_maxima:
        codes_ref, sum_ref, max_ref, *refs = refs
        refs = [codes_ref, *refs]
        cut.store_rows(sum_ref, sums)
        cut.store_rows(max_ref, largest)

    def all_finite() -> None:
        places = {(c, s): [plane[s] for plane in chunks[c]] for c in range(cut.chunks) for s in range(cut.slices)}
        maxima = {place: quantize_tile.block_maxima(values, cut.width // BLOCK) for place, values in places.items()}
        amax = cut.of_row(functools.reduce(jnp.maximum, maxima.values()), jnp.max)
        write = _write_rows(cut, output, amax, None, given, refs, instructions)
        if write is not None:
            for place, values in places.items():
                write(cut, *place, values, maxima[place], None)

    # Rarely run, so slow and short: whole blocks, a few at a time, loaded again.
    few = dataclasses.replace(cut, blocks=max(1, 16 // cut.rows))

    def some_not_finite() -> None:
        def load(chunk) -> tuple[list, Float32[Array, "m blocks"], Bool[Array, "m blocks"]]:
            values = [flush(few.matrix(source(few, chunk, None, part))) for part in parts]
            planes_of_blocks = [plane[0] for plane in rotate([values], whole_planes)]
            return planes_of_blocks, *quantize_tile.finite_block_maxima(
                planes_of_blocks, (output.hadamard or cut.width) // BLOCK
            )

        def largest(chunk, found):
            _, amax, bad = load(chunk)
            bad = few.of_row(jnp.where(bad, 1, 0), jnp.max)
            return jnp.maximum(found[0], few.of_row(amax, jnp.max)), jnp.maximum(found[1], bad)

        start = jnp.zeros(cut.rows, jnp.float32), jnp.zeros(cut.rows, jnp.int32)
        amax, bad = jax.lax.fori_loop(0, few.chunks, largest, start)
        write = _write_rows(cut, output, amax, bad == 1, given, refs, instructions)

        if write is not None:
            jax.lax.fori_loop(0, few.chunks, lambda chunk, _: write(few, chunk, None, *load(chunk)), None)

    # A rotated value is no larger than the sum of its row. Comparisons with NaN are false.
    finite = jnp.where(sums <= quantize_tile.FLOAT32_MAX, 1, 0).min() == 1
    jax.lax.cond(finite, all_finite, some_not_finite)


def _write_rows(
    cut: Geometry,
    output: Output,
    amax: Float32[Array, " rows"],
    bad_rows: Bool[Array, " rows"] | None,
    given: list,
    refs: list,
    instructions: Instructions,
) -> Callable | None:
    """Writes what there is one of a row, from the largest finite magnitudes and (unless None) which rows hold others.

    Returns:
        what writes codes and block scales, from a geometry, a place, the planes of it, and `finite_block_maxima`; None
        if there is nothing else to write.
    """
    if output.only_maxima:
        cut.store_rows(refs[0], amax)
        return None
    codes_ref, *refs = refs
    if output.format == "int8":
        scale = jnp.maximum(amax * (1 / INT8_MAX), MIN_SCALE)
        inverse = quantize_tile.inverse(scale, instructions)
        if bad_rows is not None:
            scale = jnp.where(bad_rows, jnp.nan, scale)
            inverse = jnp.where(bad_rows, 0.0, inverse)
        cut.store_rows(refs[0], scale)

        def write_int8(cut: Geometry, chunk, slice_, planes, amax, bad) -> None:
            bad = None if bad is None else cut.over_row(inverse) == 0
            cut.store(
                codes_ref, chunk, slice_, quantize_tile.encode_int8(planes[0], cut.over_row(inverse), bad, instructions)
            )

        return write_int8
    if given:
        tensor_scale = cut.load_rows(given[0])
    else:
        tensor_scale = quantize_tile.nvfp4_tensor_scale(amax, four_over_six=output.four_over_six)
        tensor_scale_ref, *refs = refs
        cut.store_rows(tensor_scale_ref, tensor_scale)
    inverse = quantize_tile.inverse(tensor_scale, instructions)

    def write_nvfp4(cut: Geometry, chunk, slice_, planes, amax, bad) -> None:
        codes, scales = quantize_tile.encode_nvfp4(
            planes,
            amax,
            bad,
            cut.over_row(inverse),
            carrier=output.carrier,
            four_over_six=output.four_over_six,
            saturate=bool(given),
            instructions=instructions,
        )
        cut.store(codes_ref, chunk, slice_, codes)
        if output.packed:
            cut.store(refs[0], chunk, slice_, scales)

    return write_nvfp4
