"""Rotate by a block Hadamard matrix, quantise, and measure the input, in one operation."""

from typing import Literal, overload

from jaxtyping import Array, Float

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.formats import (
    BLOCK,
    CARRIERS,
    CarriedArray,
    Int8Array,
    NVFP4Array,
    check_leading,
    hadamard_block,
)
from pallas_kernels.rotate_quantize import pallas_mosaic_gpu, pallas_triton, xla
from pallas_kernels.rotate_quantize.types import RowStatistics

IMPLEMENTATIONS = {
    "pallas_mosaic_gpu": Implementation(run=pallas_mosaic_gpu.rotate_quantize, refusal=pallas_mosaic_gpu.refusal),
    "pallas_triton": Implementation(run=pallas_triton.rotate_quantize, refusal=pallas_triton.refusal),
    "xla": xla.rotate_quantize,
}
FORMATS = ("nvfp4", "int8")
INPUT_DTYPES = ("bfloat16", "float16", "float32")


@overload
def rotate_quantize(
    x: Float[Array, "..."],
    *,
    format: Literal["nvfp4"],
    hadamard: int | None = None,
    tensor_scale: Float[Array, "..."] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: None = None,
    implementation: str | None = None,
) -> tuple[NVFP4Array, RowStatistics]: ...
@overload
def rotate_quantize(
    x: Float[Array, "..."],
    *,
    format: Literal["nvfp4"],
    hadamard: int | None = None,
    tensor_scale: Float[Array, "..."] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str,
    implementation: str | None = None,
) -> tuple[CarriedArray, RowStatistics]: ...
@overload
def rotate_quantize(
    x: Float[Array, "..."],
    *,
    format: Literal["int8"],
    hadamard: int | None = None,
    implementation: str | None = None,
) -> tuple[Int8Array, RowStatistics]: ...
@overload
def rotate_quantize(
    x: Float[Array, "..."],
    *,
    format: str,
    hadamard: int | None = None,
    tensor_scale: Float[Array, "..."] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
    implementation: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]: ...
def rotate_quantize(
    x: Float[Array, "..."],
    *,
    format: str,
    hadamard: int | None = None,
    tensor_scale: Float[Array, "..."] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
    implementation: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """Quantises x, an activation [..., K] or a weight [out, K]. `reference.py` defines every bit of the result.

    A block that holds a NaN or an infinity (after the rotation, which spreads one over its 128 values) gets a NaN
    scale, so that it dequantises to NaN; in INT8 the whole row does.

    Args:
        x: bfloat16, float16 or float32; the contracting axis is last.
        format: "nvfp4" or "int8".
        hadamard: block of the rotation: 128, 64 or 32, 0 for none, None for the largest that divides K.
        tensor_scale: NVFP4 only: the second-level scale to use, float32, positive and finite, of a shape that leads
            x.shape[:-1]. Values too large for it saturate.
        scale_dims: NVFP4 only, without `tensor_scale`: how many leading axes of x have a tensor scale for each of
            their entries: 0 is one for all of x, x.ndim - 1 is one a row, which needs no pass over all of x first.
        four_over_six: NVFP4 only: each block takes amax/6 or amax/4 as its scale, whichever has the smaller squared
            error (arXiv 2512.02010).
        carrier: NVFP4 only: "exact" or "fp8" returns the CarriedArray that `nvfp4_cast` makes of the packed array, for
            a matmul on tensor cores that don't take NVFP4; None returns the packed array.
        implementation: a name in `IMPLEMENTATIONS`, or None for the best one here.

    Returns:
        (the quantised array, statistics of the unrotated rows).

    Raises:
        ValueError: on an unknown format, carrier, implementation or dtype, a K that the blocks do not divide, an option
            that the format does not have, or a tensor scale of the wrong shape.
        NotImplementedError: if the named implementation can't do this call here.
    """
    check_format(
        format,
        x.shape,
        x.dtype.name,
        tensor_scale=tensor_scale,
        scale_dims=scale_dims,
        four_over_six=four_over_six,
        carrier=carrier,
    )
    options = {
        "format": format,
        "hadamard": hadamard_block(x.shape[-1], hadamard),
        "tensor_scale": tensor_scale,
        "scale_dims": scale_dims,
        "four_over_six": four_over_six,
        "carrier": carrier,
    }
    return choose("rotate_quantize", IMPLEMENTATIONS, implementation, x, **options)(x, **options)


def check_format(
    format: str,
    shape: tuple[int, ...],
    dtype: str,
    *,
    tensor_scale: Float[Array, "..."] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> None:
    """Raises ValueError unless x of this shape and dtype can be quantised so; see `rotate_quantize`."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"x must be of {', '.join(INPUT_DTYPES)}, found {dtype}")
    if len(shape) == 0 or 0 in shape:
        raise ValueError(f"x must be [..., K] and not empty, found {shape}")
    rows, size = shape[:-1], shape[-1]
    if format == "int8":
        if tensor_scale is not None or scale_dims or four_over_six or carrier is not None:
            raise ValueError("tensor_scale, scale_dims, four_over_six and carrier belong to format='nvfp4', not 'int8'")
        return
    if carrier not in (None, *CARRIERS):
        raise ValueError(f"unknown carrier {carrier!r}; carriers are None, {', '.join(CARRIERS)}")
    if size % BLOCK:
        raise ValueError(f"NVFP4 blocks of {BLOCK} do not divide a contracting axis of {size} (x is {shape})")
    if not 0 <= scale_dims <= len(rows):
        raise ValueError(f"scale_dims={scale_dims} must be 0 to {len(rows)} for x of {shape}")
    if tensor_scale is not None:
        if scale_dims:
            raise ValueError(f"pass tensor_scale or scale_dims={scale_dims}, not both")
        if tensor_scale.dtype.name != "float32":
            raise ValueError(f"tensor_scale must be float32, found {tensor_scale.dtype.name}")
        check_leading(tensor_scale.shape, rows)
