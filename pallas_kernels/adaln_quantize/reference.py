"""The definition of `adaln_quantize`, in NumPy: `modulate`, then `rotate_quantize` row by row.

Sums over a row have no order, so `modulate` is what it is in exact arithmetic (float64, rounded once, to x's dtype),
and an implementation in float32, rounded once, is within `modulation_bound` of that. The rest of the definition then
holds, to the bit, for what it modulated to.
"""

from typing import Any

import jax
import numpy as np

from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.rotate_quantize import reference as rotation
from pallas_kernels.rotate_quantize.types import RowStatistics


def adaln_quantize(
    x: np.ndarray, norm: AdaptiveNorm, *, format: str, **options: Any
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.adaln_quantize`; options are those of `rotate_quantize`."""
    scale_dims = 2 if format == "nvfp4" else 0
    return rotation.rotate_quantize(modulate(x, norm), format=format, scale_dims=scale_dims, **options)


@np.errstate(over="ignore", invalid="ignore")
def modulate(x: np.ndarray, norm: AdaptiveNorm) -> np.ndarray:
    """((x - mean) / sqrt(variance + epsilon) * norm_scale + norm_bias) * (1 + scale) + shift, in x's dtype."""
    return _modulated(x, norm).astype(x.dtype)


def _modulated(x: np.ndarray, norm: AdaptiveNorm) -> np.ndarray:
    """Float64."""
    shift, scale = (rows_of(_wide(value), x.shape[1], norm.text_length) for value in (norm.shift, norm.scale))
    centred, inverse = _centred(x, norm)
    return (centred * inverse * _wide(norm.norm_scale) + _wide(norm.norm_bias)) * (1 + scale) + shift


def _centred(x: np.ndarray, norm: AdaptiveNorm) -> tuple[np.ndarray, np.ndarray]:
    """(x - mean, 1 / sqrt(variance + epsilon)), float64."""
    centred = _wide(x) - _wide(x).mean(-1, keepdims=True)
    return centred, 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + float(np.float32(norm.epsilon)))


def _wide(value: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float64)


def rows_of(modulation: np.ndarray, tokens: int, text_length: int) -> np.ndarray:
    """[batch, 2, dim] to what each row takes, [batch, tokens, dim]."""
    return modulation[:, np.where(np.arange(tokens) < text_length, 0, 1)]


@np.errstate(over="ignore", invalid="ignore")
def modulation_bound(x: np.ndarray, norm: AdaptiveNorm) -> np.ndarray:
    """Largest |result - `modulate`| of each value, float64 of x's shape, to first order.

    What is computed in float32 is rounded to x's dtype: nearly always to what `modulate` rounds to, and to its
    neighbour where a midpoint of two lies between. Before that rounding, in units of 2^-24, with
    r = 1/sqrt(variance + epsilon): sums are added in blocks or trees of at most sqrt(dim) in depth. So a mean is off by
    (sqrt(dim) + 2) * mean|x|, which centring passes on, and a variance by (sqrt(dim) + 5) times itself, of which half
    moves the row. A reciprocal square root is off by 2. Eight products and sums follow, on values no larger than
    |normed * norm_scale| + |norm_bias|, times |1 + scale|, plus |shift|.
    """
    depth = np.sqrt(x.shape[-1])
    centred, inverse = _centred(x, norm)
    mean_error = (depth + 3) * np.abs(_wide(x)).mean(-1, keepdims=True) * inverse
    normed = np.abs(centred) * inverse
    shift, scale = (np.abs(rows_of(_wide(value), x.shape[1], norm.text_length)) for value in (norm.shift, norm.scale))
    # A mean that is off adds its square to the variance: beside 2^-24 * mean_error that is nothing.
    gain = np.abs(_wide(norm.norm_scale)) * (1 + scale)
    relative = (depth / 2 + 16) * normed + mean_error + normed * mean_error**2 * 2.0**-24
    room = 2.0**-24 * (relative * gain + 8 * (np.abs(_wide(norm.norm_bias)) * (1 + scale) + shift))
    exact = _modulated(x, norm)
    low, middle, high = (_wide((exact + off).astype(x.dtype)) for off in (-room, 0, room))
    return np.maximum(high - middle, middle - low)
