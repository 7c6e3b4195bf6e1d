"""`scaled_matmul` as one Pallas Triton kernel: NVIDIA GPUs of compute capability 8.0 and newer.

Each program computes one tile of the result. Operands are read where they lie: rows past the end repeat the last row
and are not stored, so no array is padded. Both operands are contiguous along K, which is the order that the integer and
E4M3 tensor core instructions take.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import device
from pallas_kernels.common.epilogue import Epilogue, finish, select_gate, tanh_by_exp2
from pallas_kernels.common.formats import CarriedArray, Int8Array
from pallas_kernels.common.tuning import configured
from pallas_kernels.scaled_matmul.case import case

HOPPER = (9, 0)
STEP_BYTES = 128
"""Bytes of a row that a step multiplies, in a large product."""
LARGEST = 2**31 - 1
"""Offsets are 32-bit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        tile_m, tile_n: rows and columns of the result that a program computes, powers of two of at least 16.
        tile_k: contracting values a step, a power of two of at least 32.
        group_m: tiles of rows that share the columns they need; the order of the programs, for the L2 cache.
        num_warps, num_stages: as Triton takes them.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    group_m: int
    num_warps: int
    num_stages: int


def heuristic(*, rows: int, n: int, k: int, itemsize: int, gated: bool) -> Config:
    """What was fastest on the shapes of CogVideoX on an H200, smaller where the operands are.

    Two programs fit on a multiprocessor, so that one multiplies while the other finishes its tile.
    """
    return Config(
        tile_m=_fit(rows, 128, smallest=16),
        tile_n=_fit(n, 128, smallest=16),
        tile_k=_fit(k, STEP_BYTES // itemsize, smallest=32),
        group_m=8,
        num_warps=4,
        num_stages=3,
    )


def candidates(*, rows: int, n: int, k: int, itemsize: int, gated: bool) -> list[Config]:
    """What is worth timing, the heuristic's first."""
    tiles = [(128, 128, 4, 3), (128, 128, 8, 3), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3), (64, 128, 4, 4)]
    others = [
        Config(
            tile_m=tile_m,
            tile_n=tile_n,
            tile_k=STEP_BYTES // itemsize,
            group_m=group_m,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        for tile_m, tile_n, num_warps, num_stages in tiles
        for group_m in (8, 16)
        if tile_m <= max(rows, 64) and tile_n <= max(n, 64) and k * itemsize >= STEP_BYTES
    ]
    return list(dict.fromkeys([heuristic(rows=rows, n=n, k=k, itemsize=itemsize, gated=gated), *others]))


def refusal(
    a: Int8Array | CarriedArray, b: Int8Array | CarriedArray, *, epilogue: Epilogue, out_dtype: DTypeLike
) -> str | None:
    """Why this kernel can't do the call on the default device, if so."""
    if max(math.prod(a.shape), math.prod(b.shape), math.prod(a.shape[:-1]) * b.shape[0]) > LARGEST:
        return f"its offsets are 32-bit, and operands are {a.shape} and {b.shape}"
    return device.refusal(at_least=(8, 9) if a.codes.dtype == jnp.float8_e4m3fn else (8, 0))


def slower(
    a: Int8Array | CarriedArray, b: Int8Array | CarriedArray, *, epilogue: Epilogue, out_dtype: DTypeLike
) -> str | None:
    """Why XLA's own product is faster for the call on the default device, if so."""
    if not isinstance(a, Int8Array) and (device.compute_capability() or (0, 0)) >= HOPPER:
        return "XLA multiplies floats faster on Hopper; Triton's E4M3 sums are taken out of the tensor cores there"
    return None


def scaled_matmul(
    a: Int8Array | CarriedArray,
    b: Int8Array | CarriedArray,
    *,
    epilogue: Epilogue,
    out_dtype: DTypeLike,
    config: Config | None = None,
) -> Float[Array, "*rows n"] | Int32[Array, "*rows n"]:
    """See `api.scaled_matmul`; `config` None takes what `tuning.configured` finds."""
    if config is None:
        config = configured("scaled_matmul/pallas_triton", heuristic, **case(a, b, epilogue))
    return _scaled_matmul(a, b, epilogue, out_dtype=out_dtype, config=config, interpret=device.interpreting())


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def _scaled_matmul(
    a: Int8Array | CarriedArray,
    b: Int8Array | CarriedArray,
    epilogue: Epilogue,
    *,
    out_dtype: DTypeLike,
    config: Config,
    interpret: bool,
) -> Float[Array, "*rows n"] | Int32[Array, "*rows n"]:
    (n, k), rows = b.shape, a.shape[:-1]
    # Only a gate tells samples apart; a tile never crosses from one to the next.
    samples, tokens = rows if epilogue.gate is not None else (1, math.prod(rows))
    operands = {"a": a.codes.reshape(samples, tokens, k), "b": b.codes}
    if out_dtype != jnp.int32:
        operands |= {"a_scale": a.scale.reshape(samples, tokens), "b_scale": b.scale}
        parts = {"bias": epilogue.bias, "gate": epilogue.gate, "residual": epilogue.residual}
        operands |= {name: part for name, part in parts.items() if part is not None}
    tiles_m, tiles_n = pl.cdiv(tokens, config.tile_m), pl.cdiv(n, config.tile_n)
    result = pl.pallas_call(
        functools.partial(
            _kernel,
            names=tuple(operands),
            activation=epilogue.activation,
            text_length=epilogue.text_length,
            config=config,
            tanh=tanh_by_exp2 if interpret or jnp.dtype(out_dtype).itemsize > 2 else plt.approx_tanh,
        ),
        grid=(tiles_m * tiles_n, samples),
        out_shape=jax.ShapeDtypeStruct((samples, tokens, n), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="scaled_matmul",
    )(*operands.values())
    return result.reshape(*rows, n)


def _kernel(*refs, names: tuple[str, ...], activation: str | None, text_length: int, config: Config, tanh) -> None:
    """One tile. Refs are whole arrays: a [samples, tokens, K], b [N, K] and what `names` says, and the result."""
    *inputs, out_ref = refs
    gmem = dict(zip(names, inputs, strict=True))
    _, tokens, n = out_ref.shape
    k = gmem["b"].shape[1]
    tile, sample = pl.program_id(0), pl.program_id(1)
    tile_row, tile_column = grouped(tile, pl.cdiv(tokens, config.tile_m), pl.cdiv(n, config.tile_n), config.group_m)
    rows = tile_row * config.tile_m + jnp.arange(config.tile_m, dtype=jnp.int32)
    columns = tile_column * config.tile_n + jnp.arange(config.tile_n, dtype=jnp.int32)
    safe_rows, safe_columns = jnp.minimum(rows, tokens - 1), jnp.minimum(columns, n - 1)

    def step(i, accumulators):
        ks = i * config.tile_k + jnp.arange(config.tile_k, dtype=jnp.int32)
        mask, other = (None, None) if k % config.tile_k == 0 else ((ks < k)[None, :], jnp.zeros((), gmem["b"].dtype))
        a = plt.load(gmem["a"].at[sample, safe_rows[:, None], ks[None, :]], mask=mask, other=other)
        b = plt.load(gmem["b"].at[safe_columns[:, None], ks[None, :]], mask=mask, other=other)
        return accumulators + _dot(a, b)

    wide = jnp.int32 if gmem["b"].dtype == jnp.int8 else jnp.float32
    accumulators = jnp.zeros((config.tile_m, config.tile_n), wide)
    y = jax.lax.fori_loop(0, pl.cdiv(k, config.tile_k), step, accumulators)

    if "a_scale" in gmem:
        y = y.astype(jnp.float32)
        y = y * gmem["a_scale"][sample, safe_rows][:, None] * gmem["b_scale"][safe_columns][None, :]
        parts = {}
        if "bias" in gmem:
            parts["bias"] = gmem["bias"][safe_columns][None, :]
        if "gate" in gmem:
            text, video = (gmem["gate"][sample, entry, safe_columns][None, :] for entry in (0, 1))
            parts["gate"] = select_gate((rows < text_length)[:, None], text, video)
            parts["residual"] = gmem["residual"][sample, safe_rows[:, None], safe_columns[None, :]]
        y = finish(y, activation=activation, tanh=tanh, **parts)
    mask = (rows < tokens)[:, None] & (columns < n)[None, :]
    plt.store(out_ref.at[sample, rows[:, None], columns[None, :]], y.astype(out_ref.dtype), mask=mask)


def grouped(index: Int32[Array, ""], rows: int, columns: int, group: int) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """(row, column) of a tile such that `group` rows of tiles are done, column by column, before the next."""
    first = index // (group * columns) * group
    height = jnp.minimum(rows - first, group)
    within = index % (group * columns)
    return first + within % height, within // height


def _dot(a: Array, b: Array) -> Array:
    """a [m, k] times b [n, k], accumulated in int32 or float32."""
    wide = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.DEFAULT, preferred_element_type=wide
    )


def _fit(size: int, largest: int, *, smallest: int) -> int:
    """The smallest power of two that covers `size`, within bounds."""
    return max(smallest, min(largest, 1 << (size - 1).bit_length()))
