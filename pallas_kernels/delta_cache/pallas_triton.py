"""The delta cache's operations in one pass each, deltas in NVFP4, for compute capability 8.0 and up.

A program keeps the new deltas of a few rows in registers: the largest magnitude of a row comes before its first code.
Even and odd columns are apart, so that the two codes of a byte lie at the same place of two arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, UInt8

from pallas_kernels.common import device, quantize_tile
from pallas_kernels.common.decode_tile import E2M1_SHIFT, e2m1_as_half
from pallas_kernels.common.formats import BLOCK, NVFP4Array
from pallas_kernels.common.quantize_tile import Instructions
from pallas_kernels.common.xla import decode_e4m3
from pallas_kernels.delta_cache.types import DeltaSums

HALF = BLOCK // 2
LARGEST_SIZE = 16_384
"""Values of a row that a program can keep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is divided; powers of two.

    Attributes:
        rows: of a program.
        blocks: of 16 values, of each row, that are processed at a time.
        num_warps: of a program.
    """

    rows: int
    blocks: int
    num_warps: int


def heuristic(*, k: int) -> Config:
    """The configuration for rows of k values, unless another is asked for."""
    blocks = min(64, pl.next_power_of_2(k // BLOCK))
    return Config(rows=max(1, 128 // blocks), blocks=blocks, num_warps=4)


def refusal(x: Float[Array, "batch tokens dim"], *rest, **options) -> str | None:
    """See `common.choice.Implementation`."""
    stored = rest[-1]
    if not isinstance(stored, NVFP4Array):
        return "it stores deltas in NVFP4"
    if stored.hadamard:
        return f"it stores deltas as they are, not rotated in blocks of {stored.hadamard}"
    if x.shape[-1] > LARGEST_SIZE:
        return f"it keeps a row in registers, at most {LARGEST_SIZE} values, found {x.shape[-1]}"
    if x.dtype.name != "bfloat16":
        return f"it takes bfloat16, not {x.dtype}"
    return device.refusal(at_least=(8, 0))


def store_delta(
    before: Float[Array, "batch tokens dim"],
    after: Float[Array, "batch tokens dim"],
    stored: NVFP4Array,
    *,
    compare: bool,
    config: Config | None = None,
) -> tuple[NVFP4Array, DeltaSums]:
    """See `api.store_delta`."""
    config = config or heuristic(k=before.shape[-1])
    return _store_delta(
        before,
        after,
        stored,
        compare=compare,
        config=config,
        instructions=Instructions.here(),
        interpret=device.interpreting(),
    )


@functools.partial(jax.jit, static_argnames=("compare", "config", "instructions", "interpret"))
def _store_delta(
    before: Float[Array, "batch tokens dim"],
    after: Float[Array, "batch tokens dim"],
    stored: NVFP4Array,
    *,
    compare: bool,
    config: Config,
    instructions: Instructions,
    interpret: bool,
) -> tuple[NVFP4Array, DeltaSums]:
    *rows, k = before.shape
    n, blocks = math.prod(rows), k // BLOCK
    a_row = jax.ShapeDtypeStruct((n,), jnp.float32)
    out_shape = [
        jax.ShapeDtypeStruct((n, blocks, HALF), jnp.uint8),
        jax.ShapeDtypeStruct((n, blocks), jnp.uint8),
        *[a_row] * (5 if compare else 3),
    ]
    codes, scales, tensor_scale, *sums = pl.pallas_call(
        functools.partial(_store_kernel, config=config, compare=compare, instructions=instructions),
        out_shape=out_shape,
        grid=(pl.cdiv(n, config.rows),),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="store_delta",
    )(*(x.reshape(n, blocks, BLOCK) for x in (before, after)), *(_entry(stored, n, blocks) if compare else ()))
    entry = NVFP4Array(
        codes=codes.reshape(*rows, k // 2),
        scales=scales.reshape(*rows, blocks),
        tensor_scale=tensor_scale.reshape(rows),
        hadamard=0,
    )
    sums = [value.reshape(rows) for value in sums] + [None] * (0 if compare else 2)
    return entry, DeltaSums(before=sums[0], delta=sums[1], change=sums[2], stored=sums[3])


def apply_delta(
    x: Float[Array, "batch tokens dim"], stored: NVFP4Array, *, config: Config | None = None
) -> Float[Array, "batch tokens dim"]:
    """See `api.apply_delta`."""
    config = config or heuristic(k=x.shape[-1])
    return _apply_delta(x, stored, config=config, interpret=device.interpreting())


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _apply_delta(
    x: Float[Array, "batch tokens dim"], stored: NVFP4Array, *, config: Config, interpret: bool
) -> Float[Array, "batch tokens dim"]:
    n, blocks = math.prod(x.shape[:-1]), x.shape[-1] // BLOCK
    return pl.pallas_call(
        functools.partial(_apply_kernel, config=config),
        out_shape=jax.ShapeDtypeStruct((n, blocks, BLOCK), x.dtype),
        grid=(pl.cdiv(n, config.rows), pl.cdiv(blocks, config.blocks)),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="apply_delta",
    )(x.reshape(n, blocks, BLOCK), *_entry(stored, n, blocks)).reshape(x.shape)


def _entry(stored: NVFP4Array, n: int, blocks: int) -> tuple[Array, Array, Array]:
    codes, scales, tensor_scale = (jnp.asarray(field) for field in (stored.codes, stored.scales, stored.tensor_scale))
    return codes.reshape(n, blocks, HALF), scales.reshape(n, blocks), tensor_scale.reshape(n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Some rows of [N, blocks, ...] and a chunk of their blocks.

    Attributes:
        row, block: where it begins.
        shape: (rows, blocks).
        whole: (N, blocks) of the array.
    """

    row: Array
    block: Array | int
    shape: tuple[int, int]
    whole: tuple[int, int]

    def mask(self, *columns: int) -> Bool[Array, "..."] | None:
        """What of it exists; None if all of it does."""
        if all(size % part == 0 for size, part in zip(self.whole, self.shape, strict=True)):
            return None
        shape = (*self.shape, *columns)
        row, block = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
        return (self.row + row < self.whole[0]) & (self.block + block < self.whole[1])

    def place(self, ref):
        """The reference of the tile."""
        # A constant range may not leave the array, as a traced one that is masked may.
        block = jnp.zeros((), jnp.int32) + self.block
        columns = [pl.ds(0, size) for size in ref.shape[2:]]
        return ref.at[(pl.ds(self.row, self.shape[0]), pl.ds(block, self.shape[1]), *columns)]

    def load(self, ref) -> Array:
        """[rows, blocks, ...]; zeros where there is nothing."""
        mask = self.mask(*ref.shape[2:])
        return plgpu.load(self.place(ref), mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))

    def store(self, ref, values: Array) -> None:
        """Writes what exists."""
        plgpu.store(self.place(ref), values, mask=self.mask(*ref.shape[2:]))

    def rows(self) -> tuple[Array, Bool[Array, " rows"] | None]:
        """(which rows, which of them exist)."""
        rows = self.row + jnp.arange(self.shape[0], dtype=jnp.int32)
        return rows, rows < self.whole[0] if self.whole[0] % self.shape[0] else None

    def load_rows(self, ref) -> Float32[Array, " rows"]:
        _, mask = self.rows()
        other = None if mask is None else jnp.zeros((), ref.dtype)
        return plgpu.load(ref.at[pl.ds(self.row, self.shape[0])], mask=mask, other=other)

    def store_rows(self, ref, values: Float32[Array, " rows"]) -> None:
        plgpu.store(ref.at[pl.ds(self.row, self.shape[0])], values, mask=self.rows()[1])


def _pair(values: Array) -> tuple[Array, Array]:
    """[rows, blocks, 16] -> even and odd columns, [rows, blocks, 8] each."""
    even, odd = jnp.unstack(values.reshape(*values.shape[:-1], HALF, 2), axis=-1)
    return even, odd


def _decoded(tile: Tile, refs: list, tensor_scale: Float32[Array, " rows"]) -> list[Float32[Array, "rows blocks 8"]]:
    """Even and odd columns of a stored delta."""
    codes: UInt8[Array, "rows blocks 8"] = tile.load(refs[0])
    scales = decode_e4m3(tile.load(refs[1]))[:, :, None] * E2M1_SHIFT
    halves = (e2m1_as_half(nibbles).astype(jnp.float32) * scales for nibbles in (codes & 0xF, codes >> 4))
    return [values * tensor_scale[:, None, None] for values in halves]


def _apply_kernel(x_ref, *refs, config: Config):
    *entry, out_ref = refs
    tile = Tile(
        row=pl.program_id(0) * config.rows,
        block=pl.program_id(1) * config.blocks,
        shape=(config.rows, config.blocks),
        whole=x_ref.shape[:2],
    )
    even, odd = _decoded(tile, entry, tile.load_rows(entry[2]))
    delta = jnp.stack([even, odd], axis=-1).reshape(*tile.shape, BLOCK)
    tile.store(out_ref, (tile.load(x_ref).astype(jnp.float32) + delta).astype(x_ref.dtype))


def _store_kernel(before_ref, after_ref, *refs, config: Config, compare: bool, instructions: Instructions):
    entry, refs = (list(refs[:3]), refs[3:]) if compare else ([], refs)
    codes_ref, scales_ref, tensor_scale_ref, *sum_refs = refs
    n, blocks, _ = before_ref.shape
    first = pl.program_id(0) * config.rows

    def tiles() -> Iterator[Tile]:
        for block in range(0, blocks, config.blocks):
            yield Tile(row=first, block=block, shape=(config.rows, config.blocks), whole=(n, blocks))

    rows = next(tiles())
    tensor_scale = rows.load_rows(entry[2]) if compare else None
    deltas, totals = [], [jnp.zeros(config.rows, jnp.float32)] * len(sum_refs)
    for tile in tiles():
        before, after = (tile.load(ref).astype(jnp.float32) for ref in (before_ref, after_ref))
        delta = quantize_tile.flush((after - before).astype(before_ref.dtype), instructions)
        pair = _pair(delta)
        wide = [half.astype(jnp.float32) for half in pair]
        measured = [[before], wide]
        if tensor_scale is not None:
            stored = _decoded(tile, entry, tensor_scale)
            measured += [[a - b for a, b in zip(wide, stored, strict=True)], stored]
        totals = [
            total + sum(jnp.abs(half).sum(-1).sum(-1) for half in halves)
            for total, halves in zip(totals, measured, strict=True)
        ]
        deltas.append(pair)
    for ref, total in zip(sum_refs, totals, strict=True):
        rows.store_rows(ref, total)

    def planes(pair: tuple[Array, Array]) -> list[Float32[Array, "m 8"]]:
        return [half.astype(jnp.float32).reshape(-1, HALF) for half in pair]

    def write(maxima: list[tuple[Array, Array | None]]) -> None:
        """From the largest finite magnitude of each block, and which blocks hold others (None: none)."""
        largest = functools.reduce(jnp.maximum, [amax.reshape(rows.shape).max(-1) for amax, _ in maxima])
        scale = quantize_tile.nvfp4_tensor_scale(largest, four_over_six=False)
        rows.store_rows(tensor_scale_ref, scale)
        inverse = jnp.broadcast_to(quantize_tile.inverse(scale, instructions)[:, None], rows.shape).reshape(-1, 1)
        for tile, pair, (amax, bad) in zip(tiles(), deltas, maxima, strict=True):
            codes, scales = quantize_tile.encode_nvfp4(
                planes(pair),
                amax,
                bad,
                inverse,
                carrier=None,
                four_over_six=False,
                saturate=False,
                instructions=instructions,
            )
            tile.store(codes_ref, codes.reshape(*tile.shape, HALF))
            tile.store(scales_ref, scales.reshape(tile.shape))

    def all_finite() -> None:
        write([(quantize_tile.block_maxima(planes(pair), 1), None) for pair in deltas])

    def some_not_finite() -> None:
        write([quantize_tile.finite_block_maxima(planes(pair), 1) for pair in deltas])

    # Comparisons with NaN are false.
    finite = jnp.where(totals[1] <= quantize_tile.FLOAT32_MAX, 1, 0).min() == 1
    jax.lax.cond(finite, all_finite, some_not_finite)
