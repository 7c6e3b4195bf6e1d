"""`cast` in one pass over the packed bytes, for compute capability 8.0 and up.

Every program decodes a tile of rows. INT8 needs the largest magnitude of a row before its first code, so there a
program owns whole rows, and goes over their packed bytes twice; the second time they are in a cache, or in registers
if the tile is as wide as the row. Rotating back is a product with the Hadamard matrix of ones and minus ones on tensor
cores: both factors are exact in bfloat16, so only the float32 sum rounds, and the result is that of the reference
unless the sum needs more than 24 bits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.common import device
from pallas_kernels.common.decode_tile import (
    E2M1_SHIFT,
    block_maxima,
    check_tile,
    decode,
    enough_rows,
    load,
    reciprocal,
    store_tile,
)
from pallas_kernels.common.formats import (
    BLOCK,
    CARRIERS,
    E2M1_MAX,
    E4M3_MAX,
    FP8_CARRIER_SHIFT,
    INT8_MAX,
    MIN_SCALE,
    CarriedArray,
    Int8Array,
    NVFP4Array,
    sylvester,
)
from pallas_kernels.common.tuning import configured
from pallas_kernels.nvfp4_cast.xla import scale_a_row

ROTATION_BOUND = 2.0**-20
"""Largest |rotated - exact| over the 2-norm of the block: 128 terms are summed eight times sixteen, each time with a
rounding, or truncation, of at most 2^-23 of the block's 1-norm, which is at most sqrt(128) times its 2-norm; the
product is divided by sqrt(128)."""
LARGEST_UNITS = E2M1_MAX * E4M3_MAX
"""Largest finite value in code units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is divided.

    Attributes:
        rows: of the tile of a program.
        columns: values of a row that are decoded at a time.
        num_warps: of a program.
    """

    rows: int
    columns: int
    num_warps: int


def heuristic(*, to: str, n: int, k: int) -> Config:
    """The configuration of a weight [n, k] without a tuned one."""
    columns = min(128 if to == "bfloat16" else 1024, pl.next_power_of_2(k))
    rows = max(64 if to == "bfloat16" else 4, enough_rows(columns // BLOCK, 4))
    return Config(rows=rows, columns=columns, num_warps=4)


def candidates(*, to: str, n: int, k: int) -> list[Config]:
    """Configurations worth timing."""
    if to == "bfloat16":
        tiles = [(32, 128), (64, 128), (128, 128), (16, 256), (32, 256)]
    else:
        widths = sorted({min(width, pl.next_power_of_2(k)) for width in (512, 1024, 2048)})
        tiles = [(rows, columns) for rows in (1, 2, 4, 8) for columns in widths]
    configs = [Config(rows=r, columns=c, num_warps=w) for r, c in tiles for w in (4, 8)]
    return [c for c in configs if c.rows >= enough_rows(c.columns // BLOCK, c.num_warps)]


def refusal(array: NVFP4Array, *, to: str) -> str | None:
    """See `common.choice.Implementation`."""
    return device.refusal(at_least=(8, 9) if to == "fp8" else (8, 0))


def cast(
    array: NVFP4Array, *, to: str, config: Config | None = None
) -> Int8Array | CarriedArray | BFloat16[Array, "*rows k"]:
    """See `api.cast`. Equal to the reference in every byte, but "bfloat16" with a rotation: that is within
    `ROTATION_BOUND` before it is rounded."""
    if config is None:
        n, k = math.prod(array.shape[:-1]), array.shape[-1]
        config = configured("nvfp4_cast/pallas_triton", heuristic, to=to, n=n, k=k)
    return _cast(array, to=to, config=config, interpret=device.interpreting())


@functools.partial(jax.jit, static_argnames=("to", "config", "interpret"))
def _cast(array: NVFP4Array, *, to: str, config: Config, interpret: bool):
    check_tile(config.rows, config.columns // BLOCK, config.num_warps, interpret=interpret)
    *rows, k = array.shape
    n = math.prod(rows)
    codes, scales = array.codes.reshape(n, -1), array.scales.reshape(n, -1)
    operands: list[Array | np.ndarray] = [codes, scales]
    if to in CARRIERS:
        body = functools.partial(_carry_kernel, carrier=to)
        out_shape = jax.ShapeDtypeStruct((n, k), jnp.int8 if to == "fp8" else CARRIERS[to])
    else:
        one = array.tensor_scale.size == 1
        operands.append(array.tensor_scale.reshape(1) if one else scale_a_row(array).reshape(n))
        if to == "int8":
            body = _int8_kernel
            out_shape = (jax.ShapeDtypeStruct((n, k), jnp.int8), jax.ShapeDtypeStruct((n,), jnp.float32))
        else:
            body = functools.partial(_bfloat16_kernel, hadamard=array.hadamard)
            if array.hadamard:
                operands.append(jnp.asarray(sylvester(array.hadamard), jnp.bfloat16))
            out_shape = jax.ShapeDtypeStruct((n, k), jnp.bfloat16)
    found = pl.pallas_call(
        functools.partial(body, config=config, interpret=interpret),
        out_shape=out_shape,
        grid=(pl.cdiv(n, config.rows), 1 if to == "int8" else pl.cdiv(k, config.columns)),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps),
        interpret=interpret,
        name=f"nvfp4_to_{to}",
    )(*operands)
    match to:
        case "int8":
            return Int8Array(codes=found[0].reshape(array.shape), scale=found[1].reshape(rows), hadamard=array.hadamard)
        case "bfloat16":
            return found.reshape(array.shape)
        case _:
            scale = scale_a_row(array) * (1 / FP8_CARRIER_SHIFT if to == "fp8" else 1)
            found = jax.lax.bitcast_convert_type(found, CARRIERS[to]).reshape(array.shape)
            return CarriedArray(codes=found, scale=scale, hadamard=array.hadamard)


def _int8_kernel(codes_ref, scales_ref, tensor_scale_ref, out_ref, scale_ref, *, config: Config, interpret: bool):
    rows, blocks = config.rows, config.columns // BLOCK
    row = pl.program_id(0) * rows
    chunks = pl.cdiv(out_ref.shape[1], config.columns)

    def largest(chunk, found):
        codes, scales = load(codes_ref, scales_ref, row, chunk * blocks, rows=rows, blocks=blocks)
        units = jnp.abs(block_maxima(codes, interpret=interpret) * (scales * E2M1_SHIFT))
        # A comparison, since a kernel's maximum drops NaN.
        return jnp.maximum(found, jnp.where(units <= LARGEST_UNITS, units, jnp.inf))

    amax = jax.lax.fori_loop(0, chunks, largest, jnp.zeros((rows, blocks), jnp.float32)).max(-1)
    bad = amax > LARGEST_UNITS
    scale = jnp.maximum(jnp.where(bad, 0.0, amax) * (1 / INT8_MAX), MIN_SCALE)
    # Codes of a bad row are zero.
    inverse = jnp.where(bad, 0.0, reciprocal(scale, interpret=interpret))[:, None]

    def write(chunk, _):
        codes, scales = load(codes_ref, scales_ref, row, chunk * blocks, rows=rows, blocks=blocks)
        scales = jnp.where(bad[:, None], 0.0, scales)
        out = decode(codes, scales, "int8", inverse=inverse, interpret=interpret)
        store_tile(out_ref, row, chunk * config.columns, out)

    jax.lax.fori_loop(0, chunks, write, None)
    inside = row + jnp.arange(rows) < scale_ref.shape[0]
    tensor_scale = _tensor_scales(tensor_scale_ref, row, rows)
    scale = jnp.where(bad, jnp.nan, jnp.maximum(scale * tensor_scale, 2.0**-126))
    plgpu.store(scale_ref.at[pl.ds(row, rows)], scale, mask=inside)


def _carry_kernel(codes_ref, scales_ref, out_ref, *, config: Config, carrier: str, interpret: bool):
    row, column = pl.program_id(0), pl.program_id(1)
    blocks = config.columns // BLOCK
    codes, scales = load(codes_ref, scales_ref, row * config.rows, column * blocks, rows=config.rows, blocks=blocks)
    out = decode(codes, scales, carrier, interpret=interpret)
    store_tile(out_ref, row * config.rows, column * config.columns, out)


def _bfloat16_kernel(codes_ref, scales_ref, tensor_scale_ref, *refs, config: Config, hadamard: int, interpret: bool):
    *signs_ref, out_ref = refs
    rows, columns = config.rows, config.columns
    blocks = columns // BLOCK
    row, column = pl.program_id(0) * rows, pl.program_id(1)
    codes, scales = load(codes_ref, scales_ref, row, column * blocks, rows=rows, blocks=blocks)
    units = decode(codes, scales, "exact", interpret=interpret)
    if hadamard:
        sums = jax.lax.dot(
            units.reshape(rows * columns // hadamard, hadamard),
            signs_ref[0][...],
            precision=jax.lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        units = (sums.reshape(rows, columns) * (1 / hadamard)) * float(np.sqrt(np.float32(hadamard)))
    else:
        units = units.astype(jnp.float32)
    tensor_scale = _tensor_scales(tensor_scale_ref, row, rows)
    store_tile(out_ref, row, column * columns, (units * tensor_scale[:, None]).astype(jnp.bfloat16))


def _tensor_scales(ref, row, rows: int) -> Float32[Array, " rows"]:
    """Of the rows of a tile, from one for all or one a row."""
    if ref.shape[0] == 1:
        return jnp.full(rows, ref[0])
    return plgpu.load(ref.at[pl.ds(row, rows)], mask=row + jnp.arange(rows) < ref.shape[0], other=1.0)
