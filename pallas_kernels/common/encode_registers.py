"""Codes of a rotated piece of a tile that a warpgroup has in registers as wgmma left it: Mosaic GPU.

A thread has, of each of two rows, two neighbouring values of every eight: four of each block of 16, whose other values
are those of the other three threads of its quad. What Pallas has no operation for is inline PTX; where a kernel is
interpreted, `quantize_tile` gives the same bits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import shfl_bfly
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, BFloat16, Bool, Float32, Int8

from pallas_kernels.common import quantize_tile
from pallas_kernels.common.formats import BLOCK
from pallas_kernels.common.quantize_tile import Instructions

LAYOUT = plgpu.Layout.WGMMA
ROW_LAYOUT = LAYOUT.reduce(1)
Halves = Sequence[Float32[Array, "rows 64"]]


def wait_for_warps(*, interpret: bool) -> None:
    """What a warpgroup's threads wrote to shared memory is there for its other threads; not for wgmma or TMA."""
    if interpret:
        plgpu.commit_smem()
    else:
        plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


def bfloat16(
    values: Float32[Array, "*n"], layout: Any, *, interpret: bool
) -> tuple[BFloat16[Array, "*n"], Float32[Array, "*n"]]:
    """Rounded to nearest, half to even, and that as float32 again: two values an instruction.

    Args:
        values: to round, an even number of neighbours to a register.
        layout: of these.
        interpret: the kernel.
    """
    if interpret:
        return values.astype(jnp.bfloat16), values.astype(jnp.bfloat16).astype(jnp.float32)
    types = [plgpu.ShapeDtypeStruct(values.shape, jnp.dtype(name), layout=layout) for name in ("bfloat16", "float32")]

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=types)
    def encode(_, values):
        rounded, wide = np.empty_like(values.registers), np.empty_like(values.registers)
        for place, register in np.ndenumerate(values.registers):
            (count,) = ir.VectorType(register.type).shape
            pairs = [[_element(register, i), _element(register, i + 1)] for i in range(0, count, 2)]
            words = [_ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", pair) for pair in pairs]
            halves = [_ptx(text, "=f,r", [word]) for word in words for text in (_LOW_BFLOAT16, _HIGH_BFLOAT16)]
            rounded[place] = vector.bitcast(ir.VectorType.get((count,), ir.BF16Type.get()), _vector(words))
            wide[place] = _vector(halves)
        return [
            mgpu.FragmentedArray(_registers=each, _layout=values.layout, _is_signed=None) for each in (rounded, wide)
        ]

    return tuple(encode(values))


def int8(halves: Halves, inverse_scale: Float32[Array, " rows"], *, interpret: bool) -> Int8[Array, "rows 128"]:
    """round(value * inverse scale), half to even, of magnitude at most 127."""
    if interpret:
        return quantize_tile.encode_int8(jnp.concatenate(halves, 1), inverse_scale[:, None], None, Instructions())

    @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT, ROW_LAYOUT), return_type=_result(halves, jnp.int8))
    def encode(_, left, right, inverse_scale):
        by_column, of_rows = _by_column(left, right), _scalars(inverse_scale)
        codes = np.empty_like(by_column)
        for (column, half), pair in np.ndenumerate(by_column):
            codes[column, half] = _ptx(_INT8, "=h,f,f,f", [*_pair(pair), of_rows[half]])
        return _array(codes, jnp.int8)

    return encode(*halves, inverse_scale)


def nvfp4(
    halves: Halves,
    inverse_scale: Float32[Array, " rows"],
    bad: Sequence[Bool[Array, "rows 64"]] | None,
    *,
    carrier: str,
    interpret: bool,
) -> Array:
    """NVFP4 in a carrier, as `quantize_tile.encode_nvfp4` has it; nothing saturates.

    Args:
        halves: of the columns, finite.
        inverse_scale: reciprocal of the tensor scale.
        bad: which values stand for others that are not finite; None if none do.
        carrier: "exact" or "fp8".
        interpret: the kernel.

    Returns:
        bfloat16, or int8 with the bytes of E4M3: [rows, 128].
    """
    if interpret:
        return _nvfp4_interpreted(halves, inverse_scale, bad, carrier)
    dtype = jnp.bfloat16 if carrier == "exact" else jnp.int8
    marks = [] if bad is None else [jnp.where(each, 1.0, 0.0) for each in bad]

    @plgpu.inline_mgpu(arg_types=(ROW_LAYOUT, *[LAYOUT for _ in [*halves, *marks]]), return_type=_result(halves, dtype))
    def encode(_, inverse_scale, left, right, *marks):
        by_column, of_rows = _by_column(left, right), _scalars(inverse_scale)
        marked = _by_column(*marks) if marks else None
        codes = np.empty_like(by_column)
        for first in range(0, len(by_column), 2):
            block = slice(first, first + 2)
            scales = _ptx_several(
                _SCALES[carrier],
                ["=f", "=f", *["=r" if carrier == "fp8" else "=f"] * 2, "f", "f", "f", "f"],
                [*(_over_quad(by_column[block, half]) for half in range(2)), *of_rows],
            )
            for half in range(2):
                quotient, scale = scales[half], scales[2 + half]
                not_finite = [] if marked is None else [_over_quad(marked[block, half])]
                for column in (first, first + 1):
                    inputs = [*_pair(by_column[column, half]), of_rows[half], quotient, scale]
                    kind = "r" if carrier == "exact" else "h"
                    code = _ptx(_CODES[carrier], f"={kind},f,f,f,f,{'f' if carrier == 'exact' else 'r'}", inputs)
                    for mark in not_finite:
                        code = _ptx(_NAN[carrier], f"={kind},{kind},f", [code, mark])
                    codes[column, half] = code
        return _array(codes, dtype)

    return encode(inverse_scale, *halves, *marks)


def _nvfp4_interpreted(halves: Halves, inverse_scale, bad, carrier: str) -> Array:
    values = jnp.concatenate(halves, 1)
    amax, _ = quantize_tile.finite_block_maxima([values], values.shape[1] // BLOCK)
    if bad is not None:
        bad = jnp.concatenate(bad, 1).reshape(*amax.shape, BLOCK).any(-1)
    codes, _ = quantize_tile.encode_nvfp4(
        [values],
        amax,
        bad,
        inverse_scale[:, None],
        carrier=carrier,
        four_over_six=False,
        saturate=False,
        instructions=Instructions(),
    )
    return codes if carrier == "exact" else codes.astype(jnp.int8)


def _result(halves: Halves, dtype) -> Any:
    return plgpu.ShapeDtypeStruct((len(halves[0]), 128), dtype, layout=LAYOUT)


def _by_column(*halves: mgpu.FragmentedArray) -> np.ndarray:
    """Registers, each of two neighbouring values: [columns / 8, 2 rows]."""
    return np.concatenate([half.registers.reshape(-1, 2) for half in halves])


def _scalars(of_rows: mgpu.FragmentedArray) -> list[ir.Value]:
    """The two values of a piece of 64 rows."""
    return [_element(register, 0) for register in of_rows.registers.flat]


def _array(codes: np.ndarray, dtype) -> mgpu.FragmentedArray:
    element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.IntegerType.get_signless(8)
    pair = ir.VectorType.get((2,), element)
    registers = np.empty_like(codes)
    for place, code in np.ndenumerate(codes):
        registers[place] = vector.bitcast(pair, _vector([code]))
    shape = mgpu.WGMMA_LAYOUT.registers_shape((64, 8 * len(codes)))
    signed = None if dtype == jnp.bfloat16 else True
    return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=signed)


def _vector(values: Sequence[ir.Value]) -> ir.Value:
    return vector.from_elements(ir.VectorType.get((len(values),), values[0].type), values)


def _element(register: ir.Value, place: int) -> ir.Value:
    static = ir.DenseI64ArrayAttr.get([place])
    return vector.extract(register, dynamic_position=[], static_position=static)


def _pair(register: ir.Value) -> list[ir.Value]:
    return [_element(register, 0), _element(register, 1)]


def _over_quad(registers: Iterable[ir.Value]) -> ir.Value:
    """Largest magnitude of four values of each of the four threads that share a row."""
    most = _ptx(_LARGEST, "=f,f,f,f,f", [value for register in registers for value in _pair(register)])
    for distance in (1, 2):
        most = _ptx("max.f32 $0, $1, $2;", "=f,f,f", [most, shfl_bfly(most, distance)])
    return most


_TYPES = {"f": lambda: ir.F32Type.get(), "h": lambda: ir.IntegerType.get_signless(16)}
_TYPES["r"] = lambda: ir.IntegerType.get_signless(32)


def _ptx(text: str, constraints: str, arguments: Sequence[ir.Value]) -> ir.Value:
    return _inline_asm(_TYPES[constraints[1]](), arguments, text, constraints)


def _inline_asm(result: ir.Type, arguments: Sequence[ir.Value], text: str, constraints: str) -> ir.Value:
    found = llvm.inline_asm(result, arguments, "{" + text + "}", constraints)
    assert isinstance(found, ir.Value)
    return found


def _ptx_several(text: str, constraints: Sequence[str], arguments: Sequence[ir.Value]) -> list[ir.Value]:
    types = [_TYPES[letter[-1]]() for letter in constraints if letter.startswith("=")]
    constraints = ",".join(letter.replace("=", "=&") for letter in constraints)
    struct = _inline_asm(llvm.StructType.get_literal(types), arguments, text, constraints)
    return [llvm.extractvalue(each, struct, ir.DenseI64ArrayAttr.get([place])) for place, each in enumerate(types)]


_LOW_BFLOAT16 = "shl.b32 $0, $1, 16;"
_HIGH_BFLOAT16 = "and.b32 $0, $1, 0xFFFF0000;"
_INT8 = (
    # .rn keeps the product from being fused with the sum, of `ROUNDER`.
    " .reg .f32 a, b; .reg .b32 u, v; .reg .b16 high;"
    " mul.rn.f32 a, $1, $3; add.rn.f32 a, a, 0f4B400000; mul.rn.f32 b, $2, $3; add.rn.f32 b, b, 0f4B400000;"
    " mov.b32 u, a; mov.b32 v, b; prmt.b32 u, u, v, 0x0040; mov.b32 {$0, high}, u;"
)
_LARGEST = (
    " .reg .f32 a, b, c; abs.f32 a, $1; abs.f32 b, $2; max.f32 a, a, b; abs.f32 b, $3; abs.f32 c, $4;"
    " max.f32 b, b, c; max.f32 $0, a, b;"
)
_SCALES = {
    carrier: (
        # Of both rows: a sixth of the largest magnitude, at least 2^-9, to E4M3 and back; 2^-14 over it; and itself,
        # as a pair of half precision, or times 2^14.
        " .reg .f32 a, b; .reg .b16 e, l, h; .reg .b32 w;"
        " mul.rn.f32 a, $4, $6; mul.rn.f32 a, a, 0f3E2AAAAB; max.f32 a, a, 0f3B000000;"
        " mul.rn.f32 b, $5, $7; mul.rn.f32 b, b, 0f3E2AAAAB; max.f32 b, b, 0f3B000000;"
        " cvt.rn.satfinite.e4m3x2.f32 e, b, a; cvt.rn.f16x2.e4m3x2 w, e; mov.b32 {l, h}, w;"
        " cvt.f32.f16 a, l; cvt.f32.f16 b, h;"
        " rcp.approx.ftz.f32 $0, a; mul.rn.f32 $0, $0, 0f38800000;"
        " rcp.approx.ftz.f32 $1, b; mul.rn.f32 $1, $1, 0f38800000;" + last
    )
    for carrier, last in {
        "fp8": " mov.b32 $2, {l, l}; mov.b32 $3, {h, h};",
        "exact": " mul.rn.f32 $2, a, 0f46800000; mul.rn.f32 $3, b, 0f46800000;",
    }.items()
}
_CODES = {
    carrier: (
        # As `quantize_tile._nvfp4_ptx` does: rounded to odd at 8 bits, to E2M1 * 2^-14 in half precision.
        " .reg .b32 u, v, w, x;"
        " mul.rn.f32 u, $1, $3; and.b32 x, u, 0x7FFF; add.u32 x, x, 0x7FFF; lop3.b32 u, u, x, 0xFFFF8000, 0xA8;"
        " mul.rn.f32 v, $2, $3; and.b32 x, v, 0x7FFF; add.u32 x, x, 0x7FFF; lop3.b32 v, v, x, 0xFFFF8000, 0xA8;"
        " mul.rn.f32 u, u, $4; mul.rn.f32 v, v, $4; cvt.rn.f16x2.f32 w, v, u;"
        " shr.u32 x, w, 9; and.b32 x, x, 0x00010001; add.u32 x, x, 0x00FF00FF; add.u32 w, w, x;"
        " and.b32 w, w, 0xFE00FE00;" + last
    )
    for carrier, last in {
        # 2^11: with the 2^-14 of the code, the 2^-3 of the carrier.
        "fp8": " mov.b32 x, 0x68006800; mul.rn.f16x2 w, w, x; mul.rn.f16x2 w, w, $5;"
        " cvt.rn.satfinite.e4m3x2.f16x2 $0, w;",
        "exact": " .reg .b16 l, h; mov.b32 {l, h}, w; cvt.f32.f16 u, l; cvt.f32.f16 v, h;"
        " mul.rn.f32 u, u, $5; mul.rn.f32 v, v, $5; cvt.rn.bf16x2.f32 $0, v, u;",
    }.items()
}
_NAN = {
    carrier: f" .reg .pred p; setp.gt.f32 p, $2, 0f00000000; selp.b{bits} $0, {nan}, $1, p;"
    for carrier, bits, nan in (("fp8", 16, "0x7F7F"), ("exact", 32, "0x7FC07FC0"))
}
