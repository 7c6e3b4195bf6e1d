"""NVFP4 decoded inside a kernel, a tile at a time, without 4-bit or 8-bit float types.

An E2M1 magnitude is exponent and mantissa of a half-precision float whose exponent bias is too large by 14: shifted to
their place, its three bits are the value times 2^-14, subnormals and all. The scales take the missing power of two.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float16, Float32, Int32, UInt8, UInt16

from pallas_kernels.common.formats import BLOCK, E4M3_NAN, FP8_CARRIER_SHIFT
from pallas_kernels.common.xla import decode_e4m3

E2M1_SHIFT = 2.0**14
"""What the result of `e2m1_as_half` is to be multiplied by."""


def e2m1_as_half(codes: UInt8[Array, "*n"]) -> Float16[Array, "*n"]:
    """E2M1(code) / `E2M1_SHIFT`, exact, of the low four bits of each byte."""
    codes = codes.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(((codes & 7) << 9) | ((codes & 8) << 12), jnp.float16)


def load(
    codes_ref, scales_ref, row, block, *, rows: int, blocks: int
) -> tuple[UInt8[Array, "rows blocks 8"], Float32[Array, "rows blocks"]]:
    """Packed codes and decoded block scales of a tile; zeros outside the array.

    Args:
        codes_ref: uint8 [N, K/2].
        scales_ref: uint8 [N, K/16].
        row, block: where the tile begins, in rows and in blocks of 16.
        rows, blocks: of the tile, powers of two; see `enough_rows`.
    """
    codes = load_tile(codes_ref, row, block * (BLOCK // 2), shape=(rows, blocks * (BLOCK // 2)))
    scales = load_tile(scales_ref, row, block, shape=(rows, blocks))
    return codes.reshape(rows, blocks, BLOCK // 2), decode_e4m3(scales)


def enough_rows(blocks: int, num_warps: int) -> int:
    """Fewest rows of a tile for `as_words`: every thread must hold whole blocks."""
    return max(1, 32 * num_warps // blocks)


def check_tile(rows: int, blocks: int, num_warps: int, *, interpret: bool) -> None:
    """Raises ValueError unless a compiled kernel can decode tiles of this size."""
    if rows < enough_rows(blocks, num_warps) and not interpret:
        raise ValueError(f"a tile of {rows} rows and {blocks} blocks is less than a block a thread of {num_warps=}")


def decode(
    codes: UInt8[Array, "rows blocks 8"],
    scales: Float32[Array, "rows blocks"],
    target: str,
    *,
    inverse: Float32[Array, "rows 1"] | None = None,
    interpret: bool,
) -> Array:
    """A tile [rows, 16 * blocks] in another type, with u = E2M1(code) * scale.

    Args:
        codes: packed, by block.
        scales: of the blocks.
        target: "exact": bfloat16, u; "fp8": int8, the E4M3 byte of u / 8 (compute capability 8.9 and up);
            "int8": int8, u * inverse rounded to float32 and then to an integer, half to even.
        inverse: for "int8", finite.
        interpret: whether to do without inline PTX, which has the same result.
    """
    if interpret:
        halves = [_plain(nibbles, scales[:, :, None], target, inverse) for nibbles in (codes & 0xF, codes >> 4)]
        return jnp.stack(halves, -1).reshape(codes.shape[0], -1)
    bfloat16 = target == "exact"
    # The power of two is what the decoded codes lack, or part of it.
    scales = scales * {"exact": 2.0**63, "fp8": 2.0**7, "int8": 2.0**3}[target]
    factors = [_twice(scales.astype(jnp.bfloat16 if bfloat16 else jnp.float16))]
    if inverse is not None:
        factors.append(jnp.broadcast_to(inverse * 2.0**11, scales.shape))
    values: list = [None] * BLOCK
    for half, word in enumerate(as_words(codes, interpret=interpret)):
        for j, pair in enumerate(pairs(word, bfloat16=bfloat16)):
            (result,) = plgpu.elementwise_inline_asm(
                _PTX[target],
                args=[pair, *factors],
                constraints=",".join(["=&r", "r", "r"] + ["f"] * (len(factors) - 1)),
                pack=1,
                result_shape_dtypes=[jax.ShapeDtypeStruct(pair.shape, jnp.int32)],
            )
            for place, shift in ((j, 0), (j + 4, 16 if bfloat16 else 8)):
                part = result >> shift
                if bfloat16:
                    part = jax.lax.bitcast_convert_type(part.astype(jnp.uint16), jnp.bfloat16)
                values[8 * half + place] = part if bfloat16 else part.astype(jnp.int8)
    # Joined from the highest bit of the index in a block to the lowest.
    while len(values) > 1:
        middle = len(values) // 2
        values = [jnp.stack(both, -1) for both in zip(values[:middle], values[middle:], strict=True)]
    return values[0].reshape(codes.shape[0], -1)


_PTX = {
    # Twice 2^63; minus zero as addend keeps the sign of a zero.
    "exact": "{ .reg .b32 k, z; mov.b32 k, 0x5F005F00; mov.b32 z, 0x80008000;"
    " fma.rn.bf16x2 $0, $1, k, z; fma.rn.bf16x2 $0, $0, $2, z; }",
    # 16 as half precision: the factor 2^14 is more than a scale has room for.
    "fp8": "{ .reg .b32 k, p; .reg .b16 c, o; mov.b32 k, 0x4C004C00; mul.rn.f16x2 p, $1, $2; mul.rn.f16x2 p, p, k;"
    " cvt.rn.satfinite.e4m3x2.f16x2 c, p; mov.b16 o, 0; mov.b32 $0, {c, o}; }",
    # Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    "int8": "{ .reg .b32 p; .reg .b16 l, h; .reg .f32 f, g; mul.rn.f16x2 p, $1, $2; mov.b32 {l, h}, p;"
    " cvt.f32.f16 f, l; cvt.f32.f16 g, h; mul.rn.f32 f, f, $3; mul.rn.f32 g, g, $3;"
    " add.rn.f32 f, f, 0f4B400000; add.rn.f32 g, g, 0f4B400000;"
    " .reg .b32 a, b; mov.b32 a, f; mov.b32 b, g; prmt.b32 $0, a, b, 0x0040; }",
}
"""From a pair of decoded codes and the scale, twice, to a pair of results in the low bits of a word."""


def _twice(values: Array) -> Int32[Array, "rows blocks"]:
    """16-bit floats, each twice in a word."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.int32)
    return bits | (bits << 16)


def _plain(
    nibbles: UInt8[Array, "rows blocks 8"],
    scales: Float32[Array, "rows blocks 1"],
    target: str,
    inverse: Float32[Array, "rows 1"] | None,
) -> Array:
    match target:
        case "exact":
            return (e2m1_as_half(nibbles).astype(jnp.float32) * (scales * E2M1_SHIFT)).astype(jnp.bfloat16)
        case "fp8":
            shift = FP8_CARRIER_SHIFT * E2M1_SHIFT * 2.0**-8
            products = e2m1_as_half(nibbles) * (scales * shift).astype(jnp.float16)
            return jnp.where(jnp.isnan(scales), jnp.uint8(E4M3_NAN), e4m3_of_half(products)).astype(jnp.int8)
        case _:
            assert target == "int8"
            assert inverse is not None
            units = e2m1_as_half(nibbles).astype(jnp.float32) * (scales * E2M1_SHIFT)
            return jnp.round(units * inverse[:, :, None]).astype(jnp.int8)


def block_maxima(codes: UInt8[Array, "rows blocks 8"], *, interpret: bool) -> Float32[Array, "rows blocks"]:
    """Largest E2M1 magnitude of each block over `E2M1_SHIFT`."""
    if interpret:
        return e2m1_as_half(jnp.maximum(codes & 7, (codes >> 4) & 7).max(-1)).astype(jnp.float32)
    # The bits of half-precision magnitudes are in the order of the magnitudes.
    found = [pair & 0x0E000E00 for word in as_words(codes, interpret=interpret) for pair in pairs(word)]
    maxima = found[0]
    for pair in found[1:]:
        (maxima,) = plgpu.elementwise_inline_asm(
            "max.f16x2 $0, $1, $2;",
            args=[maxima, pair],
            constraints="=r,r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(maxima.shape, jnp.int32)],
        )
    bits = jnp.maximum(maxima & 0xFFFF, maxima >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def as_words(
    codes: UInt8[Array, "rows blocks 8"], *, interpret: bool
) -> tuple[Int32[Array, "rows blocks"], Int32[Array, "rows blocks"]]:
    """The eight bytes of each block as two words, the first byte lowest.

    The bytes of a block must lie in registers of one thread, in order, as `load` leaves them: see `enough_rows`.
    """
    if interpret:
        shifted = codes.reshape(*codes.shape[:-1], 2, 4).astype(jnp.int32) << (8 * jnp.arange(4))
        low, high = jnp.unstack(shifted.sum(-1), axis=-1)
        return low, high
    # The bytes lie in two registers already. An elementwise operation has as many results as operands, so it makes
    # eight words of eight bytes; those that nobody reads cost nothing.
    (words,) = plgpu.elementwise_inline_asm(
        "mov.b32 $0, $8; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " mov.b32 $4, $9; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0;",
        args=[codes],
        constraints=",".join(["=&r"] * 8 + ["r"] * 2),
        pack=8,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
    )
    for size in (4, 2):
        words, _ = jnp.unstack(words.reshape(*codes.shape[:-1], size, 2), axis=-1)
    low, high = jnp.unstack(words, axis=-1)
    return low, high


def pairs(words: Int32[Array, "rows blocks"], *, bfloat16: bool = False) -> list[Int32[Array, "rows blocks"]]:
    """Four pairs of 16-bit floats, codes j and j + 4, of the eight codes of a word.

    The bits of a code, put in place, are 2^-14 of its value in half precision and 2^-126 of it in bfloat16.
    """
    place, magnitude = (6, 0x01C001C0) if bfloat16 else (9, 0x0E000E00)
    sign = jnp.int32(-0x7FFF8000)
    found = []
    for j in range(4):
        shift = place - 4 * j
        moved = words << shift if shift >= 0 else words >> -shift
        found.append((moved & jnp.int32(magnitude)) | ((words << (12 - 4 * j)) & sign))
    return found


def load_tile(ref, row, column, *, shape: tuple[int, ...]) -> Array:
    """A tile of a matrix; zeros outside it."""
    mask = inside(ref, row, column, shape)
    return plgpu.load(tile(ref, row, column, shape), mask=mask, other=None if mask is None else 0)


def store_tile(ref, row, column, values: Array) -> None:
    """Writes the part of a tile that lies in the matrix."""
    plgpu.store(tile(ref, row, column, values.shape), values, mask=inside(ref, row, column, values.shape))


def tile(ref, row, column, shape: tuple[int, ...]):
    """The reference of a tile."""
    return ref.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])]


def inside(ref, row, column, shape: tuple[int, ...]) -> Bool[Array, "rows columns"] | None:
    """Which elements of a tile lie in the matrix; None if tiles of this shape, side by side, fill it."""
    if ref.shape[0] % shape[0] == 0 and ref.shape[1] % shape[1] == 0:
        return None
    rows = row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = column + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (rows < ref.shape[0]) & (columns < ref.shape[1])


def e4m3_of_half(values: Float16[Array, "*n"]) -> UInt8[Array, "*n"]:
    """E4M3 byte of 2^8 * value, nearest, ties to even, for values of magnitude under 2^0.8; NaN is undefined.

    The exponent of E4M3 has a bias of 7 where half precision has 15, so the two fields agree, of subnormals too, and
    what remains is to round away 7 of 10 mantissa bits.
    """
    bits: UInt16[Array, "*n"] = jax.lax.bitcast_convert_type(values, jnp.uint16)
    magnitude = bits & 0x7FFF
    rounded = (magnitude + 0x3F + ((magnitude >> 7) & 1)) >> 7
    return (rounded | ((bits >> 8) & 0x80)).astype(jnp.uint8)


def reciprocal(values: Float32[Array, "*n"], *, interpret: bool) -> Float32[Array, "*n"]:
    """1 / values, correctly rounded, which a kernel's own division is not."""
    if interpret:
        return 1 / values
    (result,) = plgpu.elementwise_inline_asm(
        "rcp.rn.f32 $0, $1;",
        args=[values],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.float32)],
    )
    return result
