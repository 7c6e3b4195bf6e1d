"""Weights rounded to NVFP4 so that a linear's outputs, not its weights, stay near: GPTQ (arXiv 2210.17323) in NVFP4.

Columns of the weight are rounded one after the other, and what each loses is made up for in those that are still to
come, as far as inputs tell columns apart: that is in their second moment. `sixbit_jax.moments` gathers it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.common.formats import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_NAN,
    HADAMARD_BLOCKS,
    MAX_CODE_UNITS,
    MIN_SCALE,
    NVFP4Array,
)
from pallas_kernels.common.xla import (
    decode_e2m1,
    decode_e4m3,
    encode_e2m1_magnitude,
    encode_e4m3_scale,
    pack,
    reciprocal,
)
from pallas_kernels.rotate_quantize.xla import rotate

LARGEST_GROUP = 4096
"""Inputs whose correlation is looked at together, at most: a moment has as many rows and columns."""
DAMPING = 0.01
"""Added to the diagonal of a moment, as a part of its mean: without it, directions that no input had would take any
error. The one of the GPTQ paper."""
SCALE_STEPS = (-3, 6)
"""Block scales that are tried: from so many E4M3 numbers under the one that has the largest value just in range, to
before so many above it; 3/4 to 3/2 of it."""
PANEL = 128
"""Columns whose losses are brought to the columns behind them at once."""


def group_size(k: int) -> int:
    """Rows of a moment for a contracting axis of k: the largest part of it, in whole rotation blocks, that is at most
    `LARGEST_GROUP`.

    Raises:
        ValueError: if NVFP4's blocks of 16 do not divide k.
    """
    block = math.gcd(k, max(HADAMARD_BLOCKS))
    if block < BLOCK:
        raise ValueError(f"blocks of {BLOCK} do not divide a contracting axis of {k}")
    parts = k // block
    return block * max(n for n in range(1, parts + 1) if parts % n == 0 and n * block <= LARGEST_GROUP)


@functools.partial(jax.jit, static_argnames="hadamard")
def round_to_inputs(
    weight: Float[Array, "out k"], moment: Float32[Array, "groups size size"], *, hadamard: int
) -> NVFP4Array:
    """Rotates and rounds a weight for inputs x of a given second moment.

    The tensor scale is that of `rotate_quantize`. The scale of 16 columns is chosen when their turn comes, of some
    around the one that `rotate_quantize` would take, as the one with the smallest error.

    Args:
        weight: finite.
        moment: sum of x^T x over rows x of inputs, not rotated, in groups of adjacent columns (`group_size`).
        hadamard: block of the rotation; 0 for none.

    Returns:
        The array, [out, k] with one tensor scale; which is NaN if the moment has no inverse, NaN in it included.
    """
    out = len(weight)
    groups, size, _ = moment.shape
    w = rotate(weight.astype(jnp.float32), hadamard)
    tensor_scale = jnp.maximum(jnp.abs(w).max() * (1 / (E2M1_MAX * E4M3_MAX)), MIN_SCALE)
    factors = jax.lax.map(functools.partial(_inverse_factor, hadamard=hadamard), moment)
    tensor_scale = jnp.where(jnp.isfinite(factors).all(), tensor_scale, jnp.nan)
    by_group = jnp.moveaxis(w.reshape(out, groups, size), 1, 0)
    found = jax.lax.map(lambda each: _round_group(each[0], each[1], tensor_scale), (by_group, factors))
    codes, scales = (jnp.moveaxis(values, 0, 1).reshape(out, -1) for values in found)
    return NVFP4Array(codes=pack(codes), scales=scales, tensor_scale=tensor_scale, hadamard=hadamard)


def _inverse_factor(moment: Float32[Array, "size size"], *, hadamard: int) -> Float32[Array, "size size"]:
    """Upper triangular U with U^T U the inverse of the rotated, damped moment."""
    moment = rotate(rotate(moment, hadamard).T, hadamard)
    mean = jnp.trace(moment) / len(moment)
    moment = moment + DAMPING * jnp.where(mean > 0, mean, 1.0) * jnp.eye(len(moment), dtype=jnp.float32)
    # From the last column to the first, the triangle of a Cholesky factor is an upper one.
    lower = jnp.linalg.cholesky(moment[::-1, ::-1])
    identity = jnp.eye(len(moment), dtype=jnp.float32)
    return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], identity, lower=False)


def _round_group(
    w: Float32[Array, "out size"], factor: Float32[Array, "size size"], tensor_scale: Float32[Array, ""]
) -> tuple[UInt8[Array, "out size"], UInt8[Array, "out blocks"]]:
    """Codes and block scales of columns that are rounded together."""
    out, size = w.shape
    panel = math.gcd(PANEL, size)

    def block(b: jax.Array, carry: tuple, square: jax.Array) -> tuple:
        columns, codes, losses, scales = carry
        first = b * BLOCK
        rows = jax.lax.dynamic_slice_in_dim(square, first, BLOCK)
        own = jax.lax.dynamic_slice_in_dim(columns, first, BLOCK, axis=1)
        inner = jax.lax.dynamic_slice_in_dim(rows, first, BLOCK, axis=1)
        byte, found, lost = _best_scale(own, inner, tensor_scale)
        later = jnp.where(jnp.arange(panel) >= first + BLOCK, rows, 0.0)
        columns = columns - jnp.matmul(lost, later, precision=jax.lax.Precision.HIGHEST)
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        scales = jax.lax.dynamic_update_index_in_dim(scales, byte, b, 1)
        return columns, update(codes, found), update(losses, lost), scales

    def one_panel(w: jax.Array, p: jax.Array) -> tuple[jax.Array, tuple]:
        first = p * panel
        rows = jax.lax.dynamic_slice_in_dim(factor, first, panel)
        square = jax.lax.dynamic_slice_in_dim(rows, first, panel, axis=1)
        start = (
            jax.lax.dynamic_slice_in_dim(w, first, panel, axis=1),
            jnp.zeros((out, panel), jnp.uint8),
            jnp.zeros((out, panel), jnp.float32),
            jnp.zeros((out, panel // BLOCK), jnp.uint8),
        )
        step = functools.partial(block, square=square)
        _, codes, losses, scales = jax.lax.fori_loop(0, panel // BLOCK, step, start)
        later = jnp.where(jnp.arange(size) >= first + panel, rows, 0.0)
        w = w - jnp.matmul(losses, later, precision=jax.lax.Precision.HIGHEST)
        return w, (codes, scales)

    _, found = jax.lax.scan(one_panel, w, jnp.arange(size // panel, dtype=jnp.int32))
    codes, scales = (jnp.moveaxis(values, 0, 1).reshape(out, -1) for values in found)
    return codes, scales


def _best_scale(
    w: Float32[Array, "out 16"], factor: Float32[Array, "16 16"], tensor_scale: Float32[Array, ""]
) -> tuple[UInt8[Array, " out"], UInt8[Array, "out 16"], Float32[Array, "out 16"]]:
    """Scale byte of each row of a block, its codes, and what each column loses, over its diagonal in the factor.

    Their squares sum up to what the block adds to the error of the outputs, if later columns make up for it as they
    can: what the scale is chosen by.
    """
    inverse = reciprocal(tensor_scale)
    nearest = encode_e4m3_scale(jnp.minimum(jnp.abs(w).max(1) * inverse, MAX_CODE_UNITS) * (1 / E2M1_MAX))
    steps = jnp.arange(*SCALE_STEPS, dtype=jnp.int32)[:, None]
    byte = jnp.clip(nearest.astype(jnp.int32) + steps, 1, E4M3_NAN - 1).astype(jnp.uint8)
    scale = decode_e4m3(byte)

    def column(j: jax.Array, carry: tuple) -> tuple:
        columns, codes, losses = carry
        value = jax.lax.dynamic_index_in_dim(columns, j, axis=2, keepdims=False)
        code = encode_e2m1_magnitude(jnp.minimum(jnp.abs(value) * inverse, MAX_CODE_UNITS), scale)
        code = code | jnp.where(value < 0, 8, 0)
        row = jax.lax.dynamic_index_in_dim(factor, j, keepdims=False)
        loss = (value - decode_e2m1(code) * scale * tensor_scale) / row[j]
        columns = columns - loss[..., None] * jnp.where(jnp.arange(BLOCK) > j, row, 0.0)
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=j, axis=2)
        return columns, update(codes, code.astype(jnp.uint8)), update(losses, loss)

    start = jnp.broadcast_to(w, (*byte.shape, BLOCK))
    start = (start, jnp.zeros(start.shape, jnp.uint8), jnp.zeros(start.shape, jnp.float32))
    _, codes, losses = jax.lax.fori_loop(0, BLOCK, column, start)
    best = jnp.argmin((losses**2).sum(2), axis=0)
    byte, codes, losses = (jax.vmap(lambda values, i: values[i], (1, 0))(each, best) for each in (byte, codes, losses))
    return byte, codes, losses
