"""The two stored formats, NVFP4 and INT8: constants, array types, and the checks on them.

Every array keeps its contracting axis last: activations are [..., K], weights [out, K]. A weight that lives as
[in, out] is transposed before it is quantised. K is the number of values along that axis.

E2M1 is a 4-bit float: bit 3 is the sign, bits 0 to 2 index `E2M1_VALUES`. No infinity, no NaN.
E4M3 is an 8-bit float (the "fn" kind): bit 7 is the sign, then 4 exponent bits of bias 7 and 3 mantissa bits;
exponent 0 is subnormal (steps of 2^-9), the largest value is 448, 0x7F and 0xFF are NaN, and there is no infinity.

NVFP4 stores E2M1 codes with two levels of scale:

    value = (E2M1(code) * E4M3(block scale)) * tensor scale

in this order, in float32: the first product is exact, the second rounds once. Scales multiply. Checkpoints by
ModelOpt hold the same three arrays (`weight_scale_2` is the tensor scale); those of compressed-tensors hold the
reciprocal of the tensor scale.

INT8 stores integers from -127 to 127 with one scale a row: value = float32(code) * scale.

Tensor cores other than Blackwell's take neither NVFP4's codes nor its block scales. `CarriedArray` is what an NVFP4
array becomes for them: E2M1(code) * E4M3(block scale) in a type they multiply, and one float32 scale a row. It is made
on the way into a matmul and never stored.

The array types are pytrees, whose leaves may be JAX or NumPy arrays, shapes, or placeholders of a transformation. So
their fields are not checked on construction; `validate` checks them.
"""

import dataclasses
import typing

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int8, UInt8

BLOCK = 16
"""Values that share one E4M3 scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
"""Smallest positive E4M3; also the smallest block scale the quantisers write."""
E4M3_NAN = 0x7F
"""Scale byte of a block that held a NaN or an infinity."""
E4M3_MAX_FOUR_OVER_SIX = 256.0
"""Largest first-choice block scale under "four over six": 1.5 times it still fits in E4M3."""

INT8_MAX = 127

FLUSH_BELOW = 2.0**-96
"""Inputs of smaller magnitude count as zero. No later float32 result is then subnormal, so devices that flush
subnormals agree with those that don't."""
MIN_SCALE = 2.0**-100
"""Floor of tensor and row scales, so that their reciprocals are finite."""
MAX_CODE_UNITS = 2.0**16
"""Ceiling of |x| / tensor scale; anything over 6 * 448 saturates anyway."""

HADAMARD_BLOCKS = (128, 64, 32)

CARRIERS = {"exact": np.dtype(ml_dtypes.bfloat16), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Type of `CarriedArray.codes` by the name of the carrier."""
FP8_CARRIER_SHIFT = 2.0**-3
"""What the fp8 carrier multiplies codes by: 6 * 448 would overflow E4M3, an eighth of it does not."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NVFP4Array:
    """An array [..., K] in NVFP4: 4.5 bits a value.

    Attributes:
        codes: uint8 [..., K/2]. Byte i holds value 2i in its low nibble and value 2i+1 in its high nibble.
        scales: uint8 [..., K/16], the bytes of E4M3 block scales; block j covers values 16j to 16j+15.
        tensor_scale: float32; its shape is a leading part of codes.shape[:-1]: () is one for the whole array, [L] one
            for each of L stacked layers, codes.shape[:-1] one a row.
        hadamard: block size of the rotation the values went through before they were quantised; 0 for none. Operands
            of a matmul must agree in it.

    The invariants, which `validate` checks: those shapes and dtypes, K a positive multiple of 16, and `hadamard` one of
    0, 32, 64, 128 that divides K. All byte values are legal.
    """

    codes: UInt8[Array | np.ndarray, "*rows half"]
    scales: UInt8[Array | np.ndarray, "*rows blocks"]
    tensor_scale: Float32[Array | np.ndarray, "*leading"]
    hadamard: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, [..., K]."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def validate(self) -> None:
        """Raises ValueError, naming the field and its sizes, if an invariant does not hold."""
        _check_dtype(self, codes=np.uint8, scales=np.uint8, tensor_scale=np.float32)
        if self.codes.ndim < 1 or self.codes.shape[-1] == 0 or self.shape[-1] % BLOCK:
            raise ValueError(f"NVFP4Array: codes {self.codes.shape} hold K/2 bytes a row, K a positive multiple of 16")
        rows, size = self.shape[:-1], self.shape[-1]
        if self.scales.shape != (*rows, size // BLOCK):
            raise ValueError(
                f"NVFP4Array: codes {self.codes.shape} are [..., K/2], so scales must be [..., K/16] ="
                f" {(*rows, size // BLOCK)}, found {self.scales.shape}"
            )
        check_leading(self.tensor_scale.shape, rows)
        _check_hadamard(self, size)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Int8Array:
    """An array [..., K] in INT8, symmetric, one scale a row (a token of an activation, an output channel of a weight).

    Attributes:
        codes: int8 [..., K]; the quantisers never write -128.
        scale: float32 [...]; NaN for a row that held a NaN or an infinity.
        hadamard: as in `NVFP4Array`.

    The invariants, which `validate` checks: those shapes and dtypes, K positive, and `hadamard` one of 0, 32, 64, 128
    that divides K.
    """

    codes: Int8[Array | np.ndarray, "*rows k"]
    scale: Float32[Array | np.ndarray, "*rows"]
    hadamard: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, [..., K]."""
        return self.codes.shape

    def validate(self) -> None:
        """Raises ValueError, naming the field and its sizes, if an invariant does not hold."""
        _check_dtype(self, codes=np.int8, scale=np.float32)
        _check_rows(self)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CarriedArray:
    """NVFP4 values [..., K] in a type that a tensor core multiplies: value = float32(code) * scale.

    With u = E2M1(code) * E4M3(block scale) of the NVFP4 array:

    - carrier "exact": codes are u in bfloat16, which is exact; scale is the tensor scale of the row.
    - carrier "fp8": codes are u / 8 rounded to E4M3, nearest, ties to even: one more rounding, of at most 1/16 of the
      value (or 2^-10, near zero); scale is 8 times the tensor scale. NaN stays NaN, and nothing overflows.

    Attributes:
        codes: bfloat16 or float8_e4m3fn [..., K].
        scale: float32 [...].
        hadamard: as in `NVFP4Array`.

    The invariants, which `validate` checks: those shapes and dtypes, K positive, and `hadamard` one of 0, 32, 64, 128
    that divides K.
    """

    codes: Float[Array | np.ndarray, "*rows k"]
    scale: Float32[Array | np.ndarray, "*rows"]
    hadamard: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, [..., K]."""
        return self.codes.shape

    def validate(self) -> None:
        """Raises ValueError, naming the field and its sizes, if an invariant does not hold."""
        if self.codes.dtype not in CARRIERS.values():
            raise ValueError(
                f"CarriedArray: codes must be {' or '.join(map(str, CARRIERS.values()))}, found {self.codes.dtype}"
            )
        _check_dtype(self, scale=np.float32)
        _check_rows(self)


def check_operands(a: NVFP4Array | Int8Array | CarriedArray, b: NVFP4Array | Int8Array | CarriedArray) -> None:
    """Raises ValueError, with the sizes, unless a [..., K] and b [N, K] are valid and can be multiplied."""
    a.validate()
    b.validate()
    if len(b.shape) != 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a must be [..., K] and b [N, K], found {a.shape} and {b.shape}")
    if a.hadamard != b.hadamard:
        raise ValueError(f"operands must be rotated alike, found hadamard={a.hadamard} and hadamard={b.hadamard}")
    if 0 in (*a.shape, *b.shape):
        raise ValueError(f"operands must not be empty, found {a.shape} and {b.shape}")


def check_leading(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """Raises ValueError unless a tensor scale of this shape fits rows of that shape."""
    if shape != rows[: len(shape)]:
        raise ValueError(f"tensor_scale must have a leading part of the shape {rows} of the rows, found {shape}")


def hadamard_block(size: int, requested: int | None = None) -> int:
    """Block size of the rotation along a contracting axis of `size` values.

    Args:
        size: K.
        requested: a block size, 0 for no rotation, or None for the largest of 128, 64, 32 that divides K.

    Raises:
        ValueError: if none, or not the requested one, divides K.
    """
    if requested is None:
        fitting = [block for block in HADAMARD_BLOCKS if size % block == 0]
        if size <= 0 or not fitting:
            raise ValueError(
                f"no Hadamard block of {HADAMARD_BLOCKS} divides a contracting axis of {size}; pass hadamard=0 to"
                " quantise without rotation"
            )
        return fitting[0]
    if requested not in (0, *HADAMARD_BLOCKS):
        raise ValueError(f"hadamard={requested} is not one of 0 (none), {HADAMARD_BLOCKS}")
    if requested and size % requested:
        raise ValueError(f"hadamard={requested} does not divide a contracting axis of {size}")
    return requested


def sylvester(size: int) -> Float64[np.ndarray, "{size} {size}"]:
    """The symmetric Hadamard matrix of 1 and -1, in Sylvester's order; `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _check_rows(array: Int8Array | CarriedArray) -> None:
    name, shape = type(array).__name__, array.codes.shape
    if len(shape) < 1 or shape[-1] == 0:
        raise ValueError(f"{name}: codes must be [..., K] with K positive, found {shape}")
    if array.scale.shape != shape[:-1]:
        raise ValueError(f"{name}: codes {shape} need one scale a row, {shape[:-1]}, found {array.scale.shape}")
    _check_hadamard(array, shape[-1])


def _check_dtype(array: NVFP4Array | Int8Array | CarriedArray, **wanted: type[np.generic]) -> None:
    for name, dtype in wanted.items():
        if (found := getattr(array, name).dtype) != dtype:
            raise ValueError(f"{type(array).__name__}: {name} must be {np.dtype(dtype)}, found {found}")


def _check_hadamard(array: NVFP4Array | Int8Array | CarriedArray, size: int) -> None:
    try:
        hadamard_block(size, array.hadamard)
    except ValueError as error:
        raise ValueError(f"{type(array).__name__}: {error}") from None
