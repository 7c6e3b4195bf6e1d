"""Decode a packed NVFP4 array, once a call, for the matmul that follows."""

from typing import Any, Literal, overload

from jaxtyping import Array, BFloat16

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.nvfp4_cast import pallas_triton, xla
from pallas_kernels.nvfp4_cast.reference import TARGETS

IMPLEMENTATIONS = {
    "pallas_triton": Implementation(run=pallas_triton.cast, refusal=pallas_triton.refusal),
    "xla": xla.cast,
}


@overload
def cast(
    array: NVFP4Array, *, to: Literal["bfloat16"], implementation: str | None = None
) -> BFloat16[Array, "*rows k"]: ...
@overload
def cast(array: NVFP4Array, *, to: str, implementation: str | None = None) -> Int8Array | CarriedArray | Any: ...
def cast(
    array: NVFP4Array, *, to: str, implementation: str | None = None
) -> Int8Array | CarriedArray | BFloat16[Array, "*rows k"]:
    """The same values in another type; `reference.cast` defines every bit of the result.

    Args:
        array: [..., K], most often a stored weight [out, K].
        to: what to make of it.
            "int8": Int8Array, symmetric, one scale a row; a row with a NaN block scale has a NaN scale.
            "exact", "fp8": CarriedArray of that carrier.
            "bfloat16": an array of bfloat16 [..., K], rotated back and rounded once, from float32: the weight to
            multiply an activation with that was not rotated. The other three stay rotated.
        implementation: "xla", "pallas_triton", or None for the best one here.

    Raises:
        ValueError: on an unknown target or implementation, or an array whose fields do not fit together.
        NotImplementedError: if the named implementation can't run here.
    """
    if to not in TARGETS:
        raise ValueError(f"cast: unknown target {to!r}; targets are {', '.join(TARGETS)}")
    array.validate()
    return choose("nvfp4_cast", IMPLEMENTATIONS, implementation, array, to=to)(array, to=to)
