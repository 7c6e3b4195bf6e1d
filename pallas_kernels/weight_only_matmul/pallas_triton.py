"""`weight_only_matmul` for compute capability 8.0 and up.

Few rows: two kernels. The first rotates x with tensor cores and leaves it in half precision, each window of 128 values
divided by a power of two of its own, in the order in which the second wants it. The second reads packed weights as
32-bit words, eight codes each. Masks and shifts make four pairs of half-precision floats of a word (see
`common.decode_tile`), a pair being codes j and j + 4, and packed multiply-adds take them times x. So a weight costs
about two instructions to decode and half of one for each row of x, and no block scale multiplies a weight: it
multiplies the sum of its block of 16, in float32. A program has whole rows of weights, so there is one sum, in a fixed
order.

Many rows: the weight is cast to bfloat16 by `nvfp4_cast.pallas_triton`. Where `scaled_matmul.pallas_mosaic_gpu` takes
the call, it multiplies, with the epilogue in the same kernel; elsewhere XLA does.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Float64, Int32

from pallas_kernels.common import device
from pallas_kernels.common.decode_tile import as_words, check_tile, enough_rows, load, load_tile, pairs, store_tile
from pallas_kernels.common.epilogue import Epilogue, finish
from pallas_kernels.common.formats import BLOCK, CarriedArray, NVFP4Array, sylvester
from pallas_kernels.common.tuning import configured
from pallas_kernels.nvfp4_cast import pallas_triton as nvfp4_cast
from pallas_kernels.scaled_matmul import pallas_mosaic_gpu
from pallas_kernels.weight_only_matmul import xla

FEW = 16
"""Most rows of x that the packed weight is multiplied with."""
WINDOW = 128
"""Values of x that share a power of two."""
HALF_PRECISION_BOUND = 2.0**-8
"""Largest error over the sum of |x| |w|, of rotated factors: x is rounded to 2^-11, and so is each of 8 sums."""
_PAIRS = 8
_LOW = tuple(8 * (pair // 4) + pair % 4 for pair in range(_PAIRS))
"""Index in its block of the first code of each pair; the second is 4 further."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work of few rows is divided.

    Attributes:
        tile_n: outputs of a program.
        blocks: of 16 weights of each output, that are decoded at a time.
        num_warps: of a program.
    """

    tile_n: int
    blocks: int
    num_warps: int


def heuristic(*, rows: int, n: int, k: int) -> Config:
    """The configuration of x [rows, k] times a weight [n, k] without a tuned one.

    One row needs many programs more than large ones: with few outputs, each takes whole rows of the weight.
    """
    if rows == 1 and k > 64 * BLOCK:
        if n > 4096:
            return Config(tile_n=8, blocks=64, num_warps=4)
        blocks = 256 if 128 * BLOCK < k <= 256 * BLOCK else 128
        return Config(tile_n=256 // blocks, blocks=blocks, num_warps=blocks // 64)
    blocks = min(32 if rows == 1 else 64, pl.next_power_of_2(pl.cdiv(k, BLOCK)))
    if blocks == 64:
        return Config(tile_n=8, blocks=blocks, num_warps=8)
    tile_n = 8 if k > 32 * BLOCK else 16
    num_warps = 2 if k > 32 * BLOCK else 4
    return Config(tile_n=max(tile_n, enough_rows(blocks, num_warps)), blocks=blocks, num_warps=num_warps)


def candidates(*, rows: int, n: int, k: int) -> list[Config]:
    """Configurations worth timing."""
    most = pl.next_power_of_2(pl.cdiv(k, BLOCK))
    return [
        Config(tile_n=size // blocks, blocks=blocks, num_warps=num_warps)
        for blocks in (32, 64, 128, 256)
        for num_warps in (2, 4, 8)
        for size in (64 * num_warps, 128 * num_warps)
        if blocks <= most and size >= blocks
    ]


def refusal(x: Float[Array, "*rows k"], weight: NVFP4Array, *, epilogue: Epilogue, out_dtype: DTypeLike) -> str | None:
    """See `common.choice.Implementation`."""
    return device.refusal(at_least=(8, 0))


def weight_only_matmul(
    x: Float[Array, "*rows k"],
    weight: NVFP4Array,
    *,
    epilogue: Epilogue,
    out_dtype: DTypeLike,
    config: Config | None = None,
) -> Float[Array, "*rows n"]:
    """See `api.weight_only_matmul`. Few rows are within `HALF_PRECISION_BOUND`, many as in `xla`."""
    rows = math.prod(x.shape[:-1])
    if rows > FEW:
        dense = nvfp4_cast.cast(weight, to="bfloat16")
        assert isinstance(dense, jax.Array)
        return _many_rows(x, dense, epilogue=epilogue, out_dtype=out_dtype)
    if config is None:
        n, k = weight.shape
        config = configured("weight_only_matmul/pallas_triton", heuristic, rows=rows, n=n, k=k)
    return _few_rows(x, weight, epilogue=epilogue, out_dtype=out_dtype, config=config, interpret=device.interpreting())


def _many_rows(
    x: Float[Array, "*rows k"], weight: BFloat16[Array, "n k"], *, epilogue: Epilogue, out_dtype: DTypeLike
) -> Float[Array, "*rows n"]:
    a, b = (
        CarriedArray(codes=values.astype(jnp.bfloat16), scale=jnp.ones(values.shape[:-1], jnp.float32))
        for values in (x, weight)
    )
    call = {"epilogue": epilogue, "out_dtype": jnp.dtype(out_dtype)}
    if pallas_mosaic_gpu.refusal(a, b, **call) is None:
        return pallas_mosaic_gpu.scaled_matmul(a, b, **call)
    return xla.matmul(x, weight, **call)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def _few_rows(
    x: Float[Array, "*rows k"],
    weight: NVFP4Array,
    *,
    epilogue: Epilogue,
    out_dtype: DTypeLike,
    config: Config,
    interpret: bool,
) -> Float[Array, "*rows n"]:
    check_tile(config.tile_n, config.blocks, config.num_warps, interpret=interpret)
    (n, k), rows = weight.shape, math.prod(x.shape[:-1])
    x_pairs, x_scale = _prepare(x.reshape(rows, k), hadamard=weight.hadamard, interpret=interpret)
    operands = {
        "codes": weight.codes,
        "scales": weight.scales,
        "tensor_scale": weight.tensor_scale.reshape(1, -1),
        "pairs": x_pairs.reshape(rows * _PAIRS, -1),
        "x_scale": x_scale,
    }
    parts = {"bias": epilogue.bias, "gate": epilogue.gate, "residual": epilogue.residual}
    operands |= {name: part.reshape(-1, n) for name, part in parts.items() if part is not None}
    found = pl.pallas_call(
        functools.partial(
            _few_rows_kernel,
            names=tuple(operands),
            activation=epilogue.activation,
            text_length=epilogue.text_length,
            config=config,
            interpret=interpret,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
        grid=(pl.cdiv(n, config.tile_n), 1),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps),
        interpret=interpret,
        name="weight_only_matmul",
    )(*operands.values())
    return found.reshape(*x.shape[:-1], n)


def _prepare(
    x: Float[Array, "rows k"], *, hadamard: int, interpret: bool
) -> tuple[Int32[Array, "rows 8 blocks"], Float32[Array, "rows blocks"]]:
    """Pairs of half-precision values of the rotated x, by row, pair and block of 16, and what to multiply them by.

    float32 is rounded to bfloat16 first, as it is for many rows.
    """
    x = x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    rows, k = x.shape
    blocks = k // BLOCK
    tile = max(16, pl.next_power_of_2(rows))
    return pl.pallas_call(
        functools.partial(_prepare_kernel, norm=1 / math.sqrt(hadamard or 1), tile=tile),
        out_shape=(
            jax.ShapeDtypeStruct((rows, _PAIRS, blocks), jnp.int32),
            jax.ShapeDtypeStruct((rows, blocks), jnp.float32),
        ),
        grid=(1, pl.cdiv(k, WINDOW)),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="rotate_few_rows",
    )(x, *(jnp.asarray(signs, x.dtype) for signs in _signs(hadamard)))


def _signs(hadamard: int) -> tuple[Float64[np.ndarray, "128 64"], Float64[np.ndarray, "128 64"]]:
    """Columns of the block-diagonal matrix of the rotation, without its norm, that make the first and the second of
    each pair: pair by pair, and of each the blocks of a window."""
    size = hadamard or 1
    matrix = np.kron(np.eye(WINDOW // size), sylvester(size))
    low = np.add.outer(_LOW, BLOCK * np.arange(WINDOW // BLOCK)).ravel()
    return matrix[:, low], matrix[:, low + 4]


def _prepare_kernel(x_ref, low_ref, high_ref, pairs_ref, x_scale_ref, *, norm: float, tile: int):
    row, window = pl.program_id(0) * tile, pl.program_id(1)
    blocks = WINDOW // BLOCK
    x = load_tile(x_ref, row, window * WINDOW, shape=(tile, WINDOW))
    low, high = (
        jax.lax.dot(x, ref[...], precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
        for ref in (low_ref, high_ref)
    )
    amax = jnp.maximum(jnp.max(jnp.abs(low), -1), jnp.max(jnp.abs(high), -1))
    # A kernel's maximum drops NaN, a sum does not.
    finite = jnp.sum(jnp.abs(low) + jnp.abs(high), -1) < jnp.inf
    exponent = jax.lax.bitcast_convert_type(jnp.maximum(jnp.where(finite, amax, 1.0), 2.0**-100), jnp.int32) >> 23
    to_half = jax.lax.bitcast_convert_type((2 * 127 + 14 - exponent) << 23, jnp.float32)
    x_scale = jnp.where(finite, jax.lax.bitcast_convert_type(exponent << 23, jnp.float32) * norm, jnp.nan)

    low, high = (
        jax.lax.bitcast_convert_type((sums * to_half[:, None]).astype(jnp.float16), jnp.uint16).astype(jnp.int32)
        for sums in (low, high)
    )
    packed = (low | (high << 16)).reshape(tile, _PAIRS, blocks)
    rows = row + jax.lax.broadcasted_iota(jnp.int32, packed.shape, 0)
    block = window * blocks + jax.lax.broadcasted_iota(jnp.int32, packed.shape, 2)
    plgpu.store(
        pairs_ref.at[pl.ds(row, tile), :, pl.ds(window * blocks, blocks)],
        packed,
        mask=(rows < pairs_ref.shape[0]) & (block < pairs_ref.shape[2]),
    )
    store_tile(x_scale_ref, row, window * blocks, jnp.broadcast_to(x_scale[:, None], (tile, blocks)))


def _few_rows_kernel(
    *refs, names: tuple[str, ...], activation: str | None, text_length: int, config: Config, interpret: bool
):
    *inputs, out_ref = refs
    gmem = dict(zip(names, inputs, strict=True))
    rows, n = out_ref.shape
    first, zero = pl.program_id(0) * config.tile_n, pl.program_id(1)
    tile_n, blocks = config.tile_n, config.blocks

    def add(chunk, sums):
        start = zero + chunk * blocks
        codes, scales = load(gmem["codes"], gmem["scales"], first, start, rows=tile_n, blocks=blocks)
        words = as_words(codes, interpret=interpret)
        weights = [pair for word in words for pair in pairs(word)]
        found = []
        for row, sum_so_far in enumerate(sums):
            x = [load_tile(gmem["pairs"], row * _PAIRS + pair, start, shape=(1, blocks)) for pair in range(_PAIRS)]
            products = _dot(weights, [jnp.broadcast_to(each, scales.shape) for each in x], interpret=interpret)
            x_scale = load_tile(gmem["x_scale"], row, start, shape=(1, blocks))
            found.append(sum_so_far + products * (scales * x_scale))
        return tuple(found)

    zeros = jnp.zeros((tile_n, blocks), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(gmem["scales"].shape[1], blocks), add, (zeros,) * rows)

    def vector(name, row):
        return load_tile(gmem[name], row, first, shape=(1, config.tile_n))[0]

    tensor_scale = vector("tensor_scale", 0) if gmem["tensor_scale"].shape == (1, n) else gmem["tensor_scale"][0, 0]
    bias = vector("bias", 0) if "bias" in gmem else None
    for row in range(rows):
        y = jnp.sum(sums[row], -1) * tensor_scale
        gate = residual = None
        if "gate" in gmem:
            sample, token = divmod(row, rows // (gmem["gate"].shape[0] // 2))
            gate = vector("gate", 2 * sample + (token >= text_length))
            residual = vector("residual", row)
        y = finish(y, bias=bias, activation=activation, gate=gate, residual=residual)
        store_tile(out_ref, row, first, y.astype(out_ref.dtype)[None])


def _dot(
    a: list[Int32[Array, "n blocks"]], b: list[Int32[Array, "n blocks"]], *, interpret: bool
) -> Float32[Array, "n blocks"]:
    """Sum of products of pairs of half-precision values; each half is summed in half precision."""
    if interpret:
        products = [_half(p, shift) * _half(q, shift) for p, q in zip(a, b, strict=True) for shift in (0, 16)]
        return sum(products[1:], products[0])
    n = len(a)
    steps = [f"mul.rn.f16x2 sum, $1, ${n + 1};"]
    steps += [f"fma.rn.f16x2 sum, ${i + 1}, ${n + i + 1}, sum;" for i in range(1, n)]
    (sums,) = plgpu.elementwise_inline_asm(
        "{ .reg .b32 sum; .reg .b16 low, high; .reg .f32 wide; "
        + " ".join(steps)
        + " mov.b32 {low, high}, sum; cvt.f32.f16 $0, low; cvt.f32.f16 wide, high; add.f32 $0, $0, wide; }",
        args=[*a, *b],
        constraints=",".join(["=&f"] + ["r"] * (2 * n)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a[0].shape, jnp.float32)],
    )
    return sums


def _half(pairs: Int32[Array, "n blocks"], shift: int) -> Float32[Array, "n blocks"]:
    bits = ((pairs >> shift) & 0xFFFF).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
