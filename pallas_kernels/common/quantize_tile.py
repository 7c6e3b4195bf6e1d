"""Rotation and quantisation inside a Triton kernel, a tile of whole rows at a time.

A tile is some rows of x [N, K], of every one all K values, in registers. The Hadamard matrix is a product of two,
H(128) = H(128 / width) x H(width): the right factor is applied on tensor cores, to operands that 16-bit floats hold
exactly (x, and a power of two with a sign); the left one is sums of whole slices of `width` columns, in float32.

    x: [N, blocks, slices, width], blocks of the size of the rotation.
    A chunk of a tile: [rows, blocks of a chunk, width] for every slice, as a matrix [rows * blocks of a chunk, width].

A matrix product can leave its columns in any order. For packed codes there are two, of the even and of the odd columns
("planes"), so that the two codes of a byte lie at the same place of two arrays.

With `Instructions.ptx` some steps are inline PTX, without which they are plain JAX; both give the same bits.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Float64, Int8, Int32, UInt8

from pallas_kernels.common import device
from pallas_kernels.common.decode_tile import e4m3_of_half, reciprocal
from pallas_kernels.common.formats import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MAX_FOUR_OVER_SIX,
    E4M3_MIN,
    E4M3_NAN,
    FLUSH_BELOW,
    FP8_CARRIER_SHIFT,
    INT8_MAX,
    MAX_CODE_UNITS,
    MIN_SCALE,
    sylvester,
)
from pallas_kernels.common.xla import decode_e2m1, decode_e4m3, encode_e2m1_magnitude

ROTATION_BOUND = 2.0**-20
"""Largest |rotated - exact| over the 2-norm of the block. A tensor core may truncate each of its sums of up to 16
products, which is at most 2^-22 of their 1-norm; there are up to eight of those, up to seven sums in float32, and a
rounded product. A 1-norm over sqrt(128) is no more than the 2-norm."""

ROUNDER = 1.5 * 2.0**23
"""Adding it to a float32 of magnitude under 2^22 rounds that to an integer, half to even, in the low bits."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGEST_BITS = 0x7F7FFFFF
"""Bits of the largest finite float32; those of infinity and NaN, without a sign, are larger integers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions:
    """What a kernel may be written with.

    Attributes:
        ptx: inline PTX; False where the kernel is interpreted.
        fp8: conversions to and from E4M3 (compute capability 8.9).
        bfloat16: arithmetic on pairs of bfloat16 (9.0).
    """

    ptx: bool = False
    fp8: bool = False
    bfloat16: bool = False

    @classmethod
    def here(cls) -> "Instructions":
        """Those of the default device; of none, if kernels are interpreted."""
        capability = (0, 0) if device.interpreting() else device.compute_capability() or (0, 0)
        return cls.of(capability)

    @classmethod
    def of(cls, capability: tuple[int, int]) -> "Instructions":
        """Those of a compute capability."""
        return cls(ptx=capability >= (8, 0), fp8=capability >= (8, 9), bfloat16=capability >= (9, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How x [N, K] is cut; see the module's docstring. All sizes but `total_rows` and `total_blocks` are powers of two.

    Attributes:
        total_rows: N.
        total_blocks: in a row.
        slices: in a block.
        width: of a slice, a multiple of 32.
        rows: of a tile.
        blocks: of a chunk.
        first_row: of the tile of this program, inside a kernel.
        end_row: first row that the program leaves out; None if that is a matter of N alone.
    """

    total_rows: int
    total_blocks: int
    slices: int
    width: int
    rows: int
    blocks: int
    first_row: Int32[Array, ""] | None = None
    end_row: Int32[Array, ""] | None = None

    @property
    def chunks(self) -> int:
        """In a row."""
        return pl.cdiv(self.total_blocks, self.blocks)

    @property
    def matrix_rows(self) -> int:
        """Of a slice of a chunk."""
        return self.rows * self.blocks

    def split(self, columns_of_a_slice: int) -> tuple[int, int, int, int]:
        """Shape of an array with that many elements for every slice."""
        return (self.total_rows, self.total_blocks, self.slices, columns_of_a_slice)

    @property
    def whole(self) -> bool:
        """Whether every row of every tile exists."""
        return self.end_row is None and self.total_rows % self.rows == 0

    def inside(self, chunk) -> Bool[Array, "rows blocks"] | None:
        """Which blocks of a chunk exist; None if all of them do."""
        if self.whole and self.total_blocks % self.blocks == 0:
            return None
        assert self.first_row is not None
        row = self.first_row + jax.lax.broadcasted_iota(jnp.int32, (self.rows, self.blocks), 0)
        block = chunk * self.blocks + jax.lax.broadcasted_iota(jnp.int32, (self.rows, self.blocks), 1)
        return (row < (self.total_rows if self.end_row is None else self.end_row)) & (block < self.total_blocks)

    def place(self, ref, chunk, slice_: int | None, part: int | None = None):
        """The reference of a slice of a chunk, [rows, blocks, columns], in an array of shape `split(...)`.

        Without a slice it is that of all of them, [rows, blocks, slices, columns]. With a part, it is that of the
        columns of even or of odd index, of an array that has a last axis for them.
        """
        return ref.at[(pl.ds(self.first_row, self.rows), *self._columns(ref, chunk, slice_, part))]

    def _columns(self, ref, chunk, slice_: int | None, part: int | None) -> tuple:
        # Traced, since a constant range may not leave the array, as one that is masked may.
        block = jnp.zeros((), jnp.int32) + chunk * self.blocks
        slices = pl.ds(0, self.slices) if slice_ is None else jnp.full((), slice_, jnp.int32)
        parts = () if part is None else (jnp.full((), part, jnp.int32),)
        return (pl.ds(block, self.blocks), slices, pl.ds(0, ref.shape[3]), *parts)

    def load(self, ref, chunk, slice_: int | None, part: int | None = None) -> Array:
        """A slice of a chunk, or all of them side by side, [rows, blocks, columns]; zeros where there is none."""
        mask = self._mask(ref, chunk, slice_)
        other = None if mask is None else jnp.zeros((), ref.dtype)
        values = plgpu.load(self.place(ref, chunk, slice_, part), mask=mask, other=other)
        return values.reshape(self.rows, self.blocks, -1)

    def load_one_row(self, ref, row, chunk, slice_: int | None, part: int | None = None) -> Array:
        """As `load`, from this one row of another array, [1, blocks, columns]; zeros in blocks that do not exist."""
        columns = (ref.shape[3],) if slice_ is not None else ref.shape[2:4]
        mask = None
        if self.total_blocks % self.blocks:
            mask = chunk * self.blocks + jax.lax.broadcasted_iota(jnp.int32, (self.blocks, *columns), 0)
            mask = mask < self.total_blocks
        other = None if mask is None else jnp.zeros((), ref.dtype)
        values = plgpu.load(ref.at[(row, *self._columns(ref, chunk, slice_, part))], mask=mask, other=other)
        return values.reshape(1, self.blocks, -1)

    def places(self, ref) -> list[tuple[int, int, int | None]]:
        """What `load` takes after a reference, for all of a tile in turn: (chunk, slice, part)."""
        parts = (0, 1) if len(ref.shape) == 5 else (None,)
        return list(itertools.product(range(self.chunks), range(self.slices), parts))

    def matrix(self, values: Array) -> Array:
        """[rows, blocks, columns] to [rows * blocks, columns]."""
        return values.reshape(self.matrix_rows, -1)

    def store(self, ref, chunk, slice_: int | None, values: Array) -> None:
        """Writes a matrix to a slice of a chunk, or to all of them, where it exists."""
        columns = (ref.shape[3],) if slice_ is not None else ref.shape[2:4]
        values = values.reshape(self.rows, self.blocks, *columns)
        plgpu.store(self.place(ref, chunk, slice_), values, mask=self._mask(ref, chunk, slice_))

    def _mask(self, ref, chunk, slice_: int | None) -> Bool[Array, "rows blocks *columns"] | None:
        inside = self.inside(chunk)
        if inside is None:
            return None
        columns = (ref.shape[3],) if slice_ is not None else ref.shape[2:4]
        return jnp.broadcast_to(inside.reshape(*inside.shape, *[1] * len(columns)), (*inside.shape, *columns))

    def load_rows(self, ref) -> Array:
        """[rows] of an array [N]; ones where there is none."""
        return plgpu.load(
            ref.at[pl.ds(self.first_row, self.rows)],
            mask=self._row_mask(),
            other=None if self.whole else jnp.ones((), ref.dtype),
        )

    def store_rows(self, ref, values: Array) -> None:
        """Writes [rows] to an array [N]."""
        plgpu.store(ref.at[pl.ds(self.first_row, self.rows)], values, mask=self._row_mask())

    def _row_mask(self) -> Bool[Array, " rows"] | None:
        if self.whole:
            return None
        assert self.first_row is not None
        row = self.first_row + jnp.arange(self.rows, dtype=jnp.int32)
        return row < (self.total_rows if self.end_row is None else self.end_row)

    def over_row(self, values: Float32[Array, " rows"]) -> Float32[Array, "matrix_rows 1"]:
        """A value of each row, for each row of the matrix of a chunk."""
        return jnp.broadcast_to(values[:, None], (self.rows, self.blocks)).reshape(self.matrix_rows, 1)

    def of_row(self, values: Array, combine: Callable) -> Array:
        """One value a row, [rows], of the matrix of a chunk (or of an elementwise combination of all chunks)."""
        return combine(combine(values, -1).reshape(self.rows, self.blocks), -1)


def geometry(shape: tuple[int, int], *, hadamard: int, width: int, rows: int, blocks: int) -> Geometry:
    """The geometry of x of this shape [N, K]; without a rotation a block is one slice."""
    size = hadamard or math.gcd(width, shape[1])
    width = min(width, size)
    return Geometry(
        total_rows=shape[0],
        total_blocks=shape[1] // size,
        slices=size // width,
        width=width,
        rows=rows,
        blocks=blocks,
    )


def matrices(hadamard: int, width: int, *, packed: bool) -> list[Float64[np.ndarray, "width columns"]]:
    """The right factor of the rotation, by plane; over `hadamard`, so that sums overflow only where results do."""
    matrix = sylvester(width) / hadamard
    return [matrix[:, 0::2], matrix[:, 1::2]] if packed else [matrix]


def operand_dtype(dtype: DTypeLike) -> np.dtype:
    """What values of this dtype are multiplied as on tensor cores."""
    return jnp.dtype(jnp.float16 if dtype == jnp.float16 else jnp.bfloat16)


def flush(x: Float[Array, "*n"], instructions: Instructions) -> Float[Array, "*n"]:
    """Magnitudes under 2^-96 become zero, of either sign."""
    if x.dtype == jnp.float16:
        return x
    if x.dtype == jnp.bfloat16 and instructions.bfloat16:
        # A comparison gives ones and zeros to multiply by. NaN compares as too small, and stays NaN.
        return _asm(
            ".reg .b32 m, t; mov.b32 t, 0x0F800F80; and.b32 m, $1, 0x7FFF7FFF; set.ge.bf16x2.bf16x2 m, m, t;"
            " mul.rn.bf16x2 $0, $1, m;",
            [x],
            jnp.bfloat16,
            pack=2,
        )
    return jnp.where(jnp.abs(x.astype(jnp.float32)) < FLUSH_BELOW, jnp.zeros((), x.dtype), x)


def absolute(x: Float[Array, "*n"], instructions: Instructions) -> Float[Array, "*n"]:
    """|x|."""
    if x.dtype.itemsize == 2 and instructions.ptx:
        return _asm("and.b32 $0, $1, 0x7FFF7FFF;", [x], x.dtype, pack=2)
    return jnp.abs(x)


def maximum(a: Float[Array, "*n"], b: Float[Array, "*n"], instructions: Instructions) -> Float[Array, "*n"]:
    """The larger, or the one that is not NaN."""
    if a.dtype.itemsize == 2 and instructions.ptx:
        kind = "f16x2" if a.dtype == jnp.float16 else "bf16x2"
        return _asm(f"max.{kind} $0, $1, $2;", [a, b], a.dtype, pack=2)
    return jnp.maximum(a, b)


def statistics(
    raw: Float[Array, "m n"], flushed: Float[Array, "m n"], instructions: Instructions
) -> tuple[Float32[Array, "m columns"], Float[Array, "m n"]]:
    """Partial sums and the magnitudes of one slice, as it was loaded and flushed, to be combined with those of others.

    Sums of 16-bit floats are products with ones on tensor cores, whose operands are those of the rotation.
    """
    sums = absolute(flushed, instructions)
    m, n = raw.shape
    if sums.dtype != jnp.float32 and n >= 32:
        sums = _dot(sums, jnp.ones((n, 16), sums.dtype))
        sums = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (m, 16), 1) == 0, sums, 0.0)
    return sums.astype(jnp.float32), absolute(raw, instructions)


def row_statistics(
    cut: Geometry, sums: Float32[Array, "m columns"], magnitudes: Float[Array, "m n"]
) -> tuple[Float32[Array, " rows"], Float32[Array, " rows"]]:
    """Sum and maximum of |x| of each row, from the sum and `maximum` of `statistics` of all slices."""
    sums = cut.of_row(sums, jnp.sum)
    largest = cut.of_row(magnitudes.astype(jnp.float32), jnp.max)
    largest = jnp.where(largest < FLUSH_BELOW, 0.0, largest)
    # NaN, which a maximum drops, is what is not equal to itself.
    return sums, jnp.where(sums == sums, largest, jnp.nan)


def pieces(x: Float[Array, "*n"]) -> list[Float[Array, "*n"]]:
    """16-bit floats whose sum is x exactly, smallest first: itself, or for float32 three bfloat16 of 8 bits each."""
    if x.dtype != jnp.float32:
        return [x]
    found = []
    for _ in range(3):
        head = jax.lax.bitcast_convert_type(
            jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-0x10000), jnp.float32
        )
        found.append(head.astype(jnp.bfloat16))
        x = x - head
    return found[::-1]


def rotate_slice(
    values: Float[Array, "m width"], planes: Sequence[Float[Array, "width n"]]
) -> list[Float32[Array, "m n"]]:
    """A slice times the right factor of the rotation, by plane; `planes` are the `matrices`."""
    parts = pieces(values)
    return [functools.reduce(jnp.add, [_dot(part, matrix) for part in parts]) for matrix in planes]


def combine_slices(slices: Sequence[Float32[Array, "m n"]], hadamard: int) -> list[Float32[Array, "m n"]]:
    """The left factor of the rotation, over all slices of one plane, and its norm."""
    sums, stride = list(slices), 1
    while stride < len(sums):
        for first in range(len(sums)):
            if not first & stride:
                a, b = sums[first], sums[first + stride]
                sums[first], sums[first + stride] = a + b, a - b
        stride *= 2
    return [values * float(np.sqrt(np.float32(hadamard))) for values in sums]


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float32[Array, "m n"]:
    return jax.lax.dot(a, b, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def magnitude_bits(values: Float32[Array, "*n"]) -> Int32[Array, "*n"]:
    """Bits of |value|, which as integers are in the order of the magnitudes, with infinity and NaN on top."""
    return jax.lax.bitcast_convert_type(jnp.abs(values), jnp.int32)


def block_maxima(planes: Sequence[Float32[Array, "m n"]], blocks: int) -> Float32[Array, "m blocks"]:
    """Largest magnitude of each block of 16 of one slice, whose planes these are, all finite."""
    return _of_blocks(functools.reduce(jnp.maximum, map(jnp.abs, planes)), blocks)


def finite_block_maxima(
    planes: Sequence[Float32[Array, "m n"]], blocks: int
) -> tuple[Float32[Array, "m blocks"], Bool[Array, "m blocks"]]:
    """Largest finite magnitude of each block of 16, and which blocks hold NaN or infinity."""
    bits = [magnitude_bits(values) for values in planes]
    bad = _of_blocks(functools.reduce(jnp.maximum, bits), blocks) > LARGEST_BITS
    bits = [jnp.where(values > LARGEST_BITS, 0, values) for values in bits]
    amax = _of_blocks(functools.reduce(jnp.maximum, bits), blocks)
    return jax.lax.bitcast_convert_type(amax, jnp.float32), bad


def _of_blocks(values: Array, blocks: int) -> Array:
    return values.reshape(values.shape[0], blocks, -1).max(-1)


def nvfp4_tensor_scale(amax: Float32[Array, "*n"], *, four_over_six: bool) -> Float32[Array, "*n"]:
    """What the largest magnitude gives."""
    largest = E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX
    return jnp.maximum(amax * (1 / (E2M1_MAX * largest)), MIN_SCALE)


def inverse(scale: Float32[Array, "*n"], instructions: Instructions) -> Float32[Array, "*n"]:
    """1 / scale, correctly rounded."""
    return reciprocal(scale, interpret=not instructions.ptx)


def encode_nvfp4(
    planes: Sequence[Float32[Array, "m n"]],
    amax: Float32[Array, "m blocks"],
    bad: Bool[Array, "m blocks"] | None,
    inverse_scale: Float32[Array, "m 1"],
    *,
    carrier: str | None,
    four_over_six: bool,
    saturate: bool,
    instructions: Instructions,
) -> tuple[Array, UInt8[Array, "m blocks"]]:
    """One slice in NVFP4.

    Args:
        planes: of even and odd columns for packed codes, else one.
        amax: with `bad`, `finite_block_maxima`.
        bad: see `amax`; None if all values are finite.
        inverse_scale: reciprocal of the tensor scale.
        carrier: None for packed codes.
        four_over_six: as in `rotate_quantize`.
        saturate: whether a value may be more than 448 * 6 tensor scales.
        instructions: to use.

    Returns:
        (uint8 of packed codes or of the fp8 carrier, or bfloat16 of the exact one; bytes of the block scales).
    """
    blocks = amax.shape[1]
    units = amax * inverse_scale
    if saturate:
        units = jnp.minimum(units, MAX_CODE_UNITS)

    def spread(values: Array, like: Array = planes[0]) -> Array:
        """A value of each block, for each value of the block in a plane."""
        m, n = like.shape
        return jnp.broadcast_to(values[:, :, None], (m, blocks, n // blocks)).reshape(m, n)

    if bad is None and not four_over_six and instructions.ptx and (instructions.fp8 or carrier != "fp8"):
        wanted = jnp.maximum(units * (1 / 6), E4M3_MIN)
        if instructions.fp8:
            scales, decoded = _e4m3_scale_ptx(wanted)
        else:
            scales, decoded = e4m3_scale(wanted)
        arguments = [*planes, jnp.broadcast_to(inverse_scale, planes[0].shape), spread(_quotient_ptx(decoded))]
        arguments += [] if carrier is None else [spread(decoded)]
        return _nvfp4_ptx(arguments, carrier=carrier, saturate=saturate), scales.astype(jnp.uint8)

    scales, decoded = e4m3_scale(units * (1 / 6))
    magnitudes = [jnp.minimum(jnp.abs(values) * inverse_scale, MAX_CODE_UNITS) for values in planes]
    codes = [encode_e2m1_magnitude(values, spread(decoded)) for values in magnitudes]
    if four_over_six:
        scales_4, decoded_4 = e4m3_scale(units * (1 / 4))
        codes_4 = [encode_e2m1_magnitude(values, spread(decoded_4)) for values in magnitudes]
        exponent = jax.lax.bitcast_convert_type(decoded, jnp.int32) >> 23
        fixed_point = jax.lax.bitcast_convert_type((2 * 127 + 11 - exponent) << 23, jnp.float32)

        def squared_error(codes: list[Array], decoded: Array) -> Int32[Array, "m blocks"]:
            total = jnp.zeros(planes[0].shape, jnp.int32)
            for values, code in zip(magnitudes, codes, strict=True):
                error = jnp.abs(values - decode_e2m1(code) * spread(decoded)) * spread(fixed_point)
                # The minimum is below every magnitude that the constant does not round.
                steps = jax.lax.bitcast_convert_type(jnp.minimum(error, 2.0**13) + ROUNDER, jnp.int32) & 0x3FFF
                total += steps * steps
            return total.reshape(*amax.shape, -1).sum(-1)

        take_4 = squared_error(codes_4, decoded_4) < squared_error(codes, decoded)
        scales, decoded = jnp.where(take_4, scales_4, scales), jnp.where(take_4, decoded_4, decoded)
        codes = [jnp.where(spread(take_4), *pair) for pair in zip(codes_4, codes, strict=True)]
    signs = [jnp.where(values < 0, 8, 0) for values in planes]
    if bad is not None:
        codes, signs = ([jnp.where(spread(bad), 0, part) for part in parts] for parts in (codes, signs))
        scales = jnp.where(bad, jnp.uint8(E4M3_NAN), scales)
        decoded = jnp.where(bad, jnp.nan, decoded)
    if carrier is None:
        even, odd = (code | sign for code, sign in zip(codes, signs, strict=True))
        return (even | (odd << 4)).astype(jnp.uint8), scales
    # Zeros have a sign too, which a kernel's negation would not give them.
    values = jax.lax.bitcast_convert_type(decode_e2m1(codes[0]) * spread(decoded), jnp.int32) | (signs[0] << 28)
    values = jax.lax.bitcast_convert_type(values, jnp.float32)
    return (values.astype(jnp.bfloat16) if carrier == "exact" else _encode_fp8(values)), scales


def e4m3_scale(wanted: Float32[Array, "*n"]) -> tuple[UInt8[Array, "*n"], Float32[Array, "*n"]]:
    """E4M3 byte of a block scale, clamped to [2^-9, 448], nearest, ties to even; and its value."""
    wanted = jnp.minimum(jnp.maximum(wanted, E4M3_MIN), E4M3_MAX)
    bits = jax.lax.bitcast_convert_type(wanted, jnp.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = jax.lax.bitcast_convert_type(wanted * (1 / E4M3_MIN) + ROUNDER, jnp.int32) & 0xF
    scales = jnp.where(wanted < 2.0**-6, subnormal, normal).astype(jnp.uint8)
    return scales, decode_e4m3(scales)


def encode_int8(
    values: Float32[Array, "m n"],
    inverse_scale: Float32[Array, "m 1"],
    bad: Bool[Array, "m 1"] | None,
    instructions: Instructions,
) -> Int8[Array, "m n"]:
    """round(value * inverse scale), half to even, of magnitude at most 127; zero in bad rows."""
    if bad is not None:
        values = jnp.where(bad, 0.0, values)
    if not instructions.ptx:
        codes = jnp.round(values * inverse_scale)
        return jnp.clip(codes, -INT8_MAX, INT8_MAX).astype(jnp.int8)
    steps = [".reg .b32 t<4>;"]
    for i in range(4):
        # .rn keeps the product from being fused with the sum, of `ROUNDER`.
        steps.append(f"mul.rn.f32 t{i}, ${1 + i}, ${5 + i}; add.rn.f32 t{i}, t{i}, 0f4B400000;")
    steps.append(_FOUR_BYTES)
    arguments = [values, jnp.broadcast_to(inverse_scale, values.shape)]
    return _asm(" ".join(steps), arguments, jnp.int8, pack=4)


_FOUR_BYTES = "prmt.b32 t0, t0, t1, 0x40; prmt.b32 t2, t2, t3, 0x40; prmt.b32 $0, t0, t2, 0x5410;"
"""PTX: the low bytes of t0 to t3."""


def _e4m3_scale_ptx(wanted: Float32[Array, "*n"]) -> tuple[Int8[Array, "*n"], Float32[Array, "*n"]]:
    """As `e4m3_scale`, of at least 2^-9."""
    scales = _asm(
        ".reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
        " mov.b32 $0, {l, h};",
        [wanted],
        jnp.int8,
        pack=4,
    )
    decoded = _asm(
        ".reg .b16 l, h; .reg .b32 w; cvt.rn.satfinite.e4m3x2.f32 l, $3, $2; cvt.rn.f16x2.e4m3x2 w, l;"
        " mov.b32 {l, h}, w; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;",
        [wanted],
        jnp.float32,
        pack=2,
    )
    return scales, decoded


def _quotient_ptx(decoded: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """2^-14 over a block scale, off by at most 2^-22."""
    return _asm("rcp.approx.ftz.f32 $0, $1; mul.rn.f32 $0, $0, 0f38800000;", [decoded], jnp.float32)


def _nvfp4_ptx(arguments: list[Float32[Array, "m n"]], *, carrier: str | None, saturate: bool) -> Array:
    """Codes from planes, inverse tensor scale, 2^-14 over the block scale, and for carriers the block scale, in PTX.

    Two values at a time become E2M1 * 2^-14 in half precision, whose sign, exponent and first mantissa bit are the
    code. u = value * inverse scale is first rounded to 8 bits, to odd if that drops bits. This keeps it on its side of
    the midpoints times the block scale, which have 7 bits, and keeps ties. Its product with the reciprocal of the block
    scale, off by less than 2^-20, is then a midpoint in half precision if and only if it was a tie.
    """
    planes = 2 if carrier is None else 1
    inverse, quotient, last = (1 + 4 * (planes + i) + (1 if carrier == "exact" else 0) for i in range(3))
    first = inverse - 4 * planes
    pairs = [(i, i, first + i, first + 4 + i) for i in range(4)]
    if carrier is not None:
        pairs = [(i, i + 1, first + i, first + i + 1) for i in (0, 2)]
    steps = [".reg .b32 u, v, w, x, y, t<4>; .reg .b16 h, l;"]
    for place, (low, high, low_value, high_value) in enumerate(pairs):
        for register, value, i in (("u", low_value, low), ("v", high_value, high)):
            steps.append(
                f"mul.rn.f32 {register}, ${value}, ${inverse + i}; and.b32 x, {register}, 0x7FFF; add.u32 x, x, 0x7FFF;"
                f" lop3.b32 {register}, {register}, x, 0xFFFF8000, 0xA8;"
                f" mul.rn.f32 {register}, {register}, ${quotient + i};"
            )
            if saturate:  # at 6 * 2^-14
                steps.append(f"min.f32 {register}, {register}, 0f39C00000; max.f32 {register}, {register}, 0fB9C00000;")
        # To one mantissa bit, half to even.
        steps.append("cvt.rn.f16x2.f32 w, v, u; shr.u32 x, w, 9; and.b32 x, x, 0x00010001; add.u32 x, x, 0x00FF00FF;")
        steps.append("add.u32 w, w, x;")
        if carrier is None:
            steps.append(f"mov.b32 t{place}, w;")
            continue
        steps.append("and.b32 w, w, 0xFE00FE00;")
        if carrier == "fp8":
            # 2^11 in half precision: with the 2^-14 of the code, the 2^-3 of the carrier.
            steps.append(
                f"mov.b32 x, 0x68006800; mul.rn.f16x2 w, w, x; cvt.rn.f16x2.f32 y, ${last + high}, ${last + low};"
                f" mul.rn.f16x2 w, w, y; cvt.rn.satfinite.e4m3x2.f16x2 {'hl'[place]}, w;"
            )
        else:
            steps.append("mov.b32 {l, h}, w; cvt.f32.f16 u, l; cvt.f32.f16 v, h;")
            for register, i in (("u", low), ("v", high)):
                # 2^14
                steps.append(
                    f"mul.rn.f32 {register}, {register}, 0f46800000; mul.rn.f32 {register}, {register}, ${last + i};"
                )
            steps.append(f"cvt.rn.bf16x2.f32 ${place}, v, u;")
    if carrier is None:
        # The upper byte of a half is s000ccc. : those of four even values to u, of four odd ones to v.
        steps.append(
            "prmt.b32 t0, t0, t1, 0x7351; prmt.b32 t2, t2, t3, 0x7351; prmt.b32 u, t0, t2, 0x5410;"
            " prmt.b32 v, t0, t2, 0x7632; shr.u32 w, u, 1; and.b32 w, w, 0x07070707; shr.u32 u, u, 4;"
            " lop3.b32 w, u, 0x08080808, w, 0xEA; shl.b32 x, v, 3; lop3.b32 w, x, 0x70707070, w, 0xEA;"
            " lop3.b32 $0, v, 0x80808080, w, 0xEA;"
        )
    elif carrier == "fp8":
        steps.append("mov.b32 $0, {h, l};")
    if carrier == "exact":
        return _asm(" ".join(steps), arguments, jnp.bfloat16, pack=4)
    return _asm(" ".join(steps), arguments, jnp.int8, pack=4).astype(jnp.uint8)


def _encode_fp8(units: Float32[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Bytes of the fp8 carrier of values in code units."""
    codes = e4m3_of_half((units * (FP8_CARRIER_SHIFT * 2.0**-8)).astype(jnp.float16))
    # NaN is not equal to itself.
    return jnp.where(units == units, codes, jnp.uint8(E4M3_NAN))


def _asm(text: str, arguments: Sequence[Array], dtype: DTypeLike, *, pack: int = 1) -> Array:
    """Elementwise PTX on `pack` values at a time; arrays of 8 or 16 bits come several to a register."""

    def constraint(dtype: np.dtype) -> list[str]:
        return ["f" if dtype == jnp.float32 else "r"] * max(1, pack * dtype.itemsize // 4)

    results = ["=" + letter for letter in constraint(jnp.dtype(dtype))]
    (result,) = plgpu.elementwise_inline_asm(
        "{" + text + "}",
        args=arguments,
        constraints=",".join(results + [letter for array in arguments for letter in constraint(array.dtype)]),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, dtype)],
    )
    return result
