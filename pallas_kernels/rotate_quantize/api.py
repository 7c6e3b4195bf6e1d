"""Rotate by a block Hadamard matrix, quantise, and measure the input, in one operation."""

from jaxtyping import Array, Float

from pallas_kernels.common.choice import choose
from pallas_kernels.common.formats import BLOCK, Int8Array, NVFP4Array, check_leading, hadamard_block
from pallas_kernels.rotate_quantize import xla
from pallas_kernels.rotate_quantize.types import RowStatistics

IMPLEMENTATIONS = {"xla": xla.rotate_quantize}
FORMATS = ("nvfp4", "int8")
INPUT_DTYPES = ("bfloat16", "float16", "float32")


def rotate_quantize(
    x: Float[Array, "..."],
    *,
    format: str,
    hadamard: int | None = None,
    tensor_scale: Float[Array, "..."] | None = None,
    scale_dims: int = 0,
    four_over_six: bool = False,
    implementation: str | None = None,
) -> tuple[NVFP4Array | Int8Array, RowStatistics]:
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
        implementation: "xla", or None for the best one here.

    Returns:
        (the quantised array, statistics of the unrotated rows).

    Raises:
        ValueError: on an unknown format, implementation or dtype, a K that the blocks do not divide, an option that the
            format does not have, or a tensor scale of the wrong shape.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    if x.dtype.name not in INPUT_DTYPES:
        raise ValueError(f"x must be of {', '.join(INPUT_DTYPES)}, found {x.dtype.name}")
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"x must be [..., K] and not empty, found {x.shape}")
    rows, size = x.shape[:-1], x.shape[-1]
    if format == "int8":
        if tensor_scale is not None or scale_dims or four_over_six:
            raise ValueError("tensor_scale, scale_dims and four_over_six belong to format='nvfp4', not 'int8'")
    else:
        if size % BLOCK:
            raise ValueError(f"NVFP4 blocks of {BLOCK} do not divide a contracting axis of {size} (x is {x.shape})")
        if not 0 <= scale_dims <= len(rows):
            raise ValueError(f"scale_dims={scale_dims} must be 0 to {len(rows)} for x of {x.shape}")
        if tensor_scale is not None:
            if scale_dims:
                raise ValueError(f"pass tensor_scale or scale_dims={scale_dims}, not both")
            if tensor_scale.dtype.name != "float32":
                raise ValueError(f"tensor_scale must be float32, found {tensor_scale.dtype.name}")
            check_leading(tensor_scale.shape, rows)
    return choose("rotate_quantize", IMPLEMENTATIONS, implementation)(
        x,
        format=format,
        hadamard=hadamard_block(size, hadamard),
        tensor_scale=tensor_scale,
        scale_dims=scale_dims,
        four_over_six=four_over_six,
    )
