"""The definition of `adaln_quantize`, in NumPy: `modulate`, then `rotate_quantize` row by row.

Sums over a row have no order, so `modulate` is what it is in exact arithmetic (float64, rounded once, to x's dtype),
and an implementation in float32, rounded once, is within `modulation_bound` of that. The rest of the definition then
holds, to the bit, for what it modulated to.
"""

import numpy as np

from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.rotate_quantize import reference as rotation
from pallas_kernels.rotate_quantize.types import RowStatistics


def adaln_quantize(
    x: np.ndarray,
    *,
    norm_scale: np.ndarray,
    norm_bias: np.ndarray,
    shift: np.ndarray,
    scale: np.ndarray,
    text_length: int,
    epsilon: float,
    format: str,
    hadamard: int,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.adaln_quantize`; `hadamard` is a block size or 0."""
    y = modulate(
        x,
        norm_scale=norm_scale,
        norm_bias=norm_bias,
        shift=shift,
        scale=scale,
        text_length=text_length,
        epsilon=epsilon,
    )
    return rotation.rotate_quantize(
        y,
        format=format,
        hadamard=hadamard,
        scale_dims=2 if format == "nvfp4" else 0,
        four_over_six=four_over_six,
        carrier=carrier,
    )


@np.errstate(over="ignore", invalid="ignore")
def modulate(
    x: np.ndarray,
    *,
    norm_scale: np.ndarray,
    norm_bias: np.ndarray,
    shift: np.ndarray,
    scale: np.ndarray,
    text_length: int,
    epsilon: float,
) -> np.ndarray:
    """((x - mean) / sqrt(variance + epsilon) * norm_scale + norm_bias) * (1 + scale) + shift, in x's dtype."""
    dtype = x.dtype
    x, norm_scale, norm_bias, shift, scale = (
        np.asarray(value, np.float64) for value in (x, norm_scale, norm_bias, shift, scale)
    )
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(epsilon).astype(np.float64))
    shift, scale = (rows_of(value, x.shape[1], text_length) for value in (shift, scale))
    return ((normed * norm_scale + norm_bias) * (1 + scale) + shift).astype(dtype)


def rows_of(modulation: np.ndarray, tokens: int, text_length: int) -> np.ndarray:
    """[batch, 2, dim] to what each row takes, [batch, tokens, dim]."""
    return modulation[:, np.where(np.arange(tokens) < text_length, 0, 1)]


@np.errstate(over="ignore", invalid="ignore")
def modulation_bound(
    x: np.ndarray,
    *,
    norm_scale: np.ndarray,
    norm_bias: np.ndarray,
    shift: np.ndarray,
    scale: np.ndarray,
    text_length: int,
    epsilon: float,
) -> np.ndarray:
    """Largest |result - `modulate`| of each value, float64 of x's shape, to first order.

    What is computed in float32 is rounded to x's dtype: nearly always to what `modulate` rounds to, and to its
    neighbour where a midpoint of two lies between. Before that rounding, in units of 2^-24, with
    r = 1/sqrt(variance + epsilon): sums are added in blocks or trees of at most sqrt(dim) in depth. So a mean is off by
    (sqrt(dim) + 2) * mean|x|, which centring passes on, and a variance by (sqrt(dim) + 5) times itself, of which half
    moves the row. A reciprocal square root is off by 2. Eight products and sums follow, on values no larger than
    |normed * norm_scale| + |norm_bias|, times |1 + scale|, plus |shift|.
    """
    dtype = x.dtype
    x, norm_scale, norm_bias, shift, scale = (
        np.asarray(value, np.float64) for value in (x, norm_scale, norm_bias, shift, scale)
    )
    depth = np.sqrt(x.shape[-1])
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    mean_error = (depth + 3) * np.abs(x).mean(-1, keepdims=True) * inverse
    normed = np.abs(centred) * inverse
    shift, scale = (rows_of(value, x.shape[1], text_length) for value in (shift, scale))
    exact = (centred * inverse * norm_scale + norm_bias) * (1 + scale) + shift
    shift, scale = np.abs(shift), np.abs(scale)
    # A mean that is off adds its square to the variance: beside 2^-24 * mean_error that is nothing.
    gain = np.abs(norm_scale) * (1 + scale)
    relative = (depth / 2 + 16) * normed + mean_error + normed * mean_error**2 * 2.0**-24
    room = 2.0**-24 * (relative * gain + 8 * (np.abs(norm_bias) * (1 + scale) + shift))
    low, middle, high = ((exact + off).astype(dtype).astype(np.float64) for off in (-room, 0, room))
    return np.maximum(high - middle, middle - low)
