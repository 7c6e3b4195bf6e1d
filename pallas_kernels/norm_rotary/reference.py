"""The definition of `norm_rotary`, in NumPy.

Layer norm is what it is in exact arithmetic, rounded to the rows' dtype; the rotation of that, in exact arithmetic, is
rounded again. An implementation in float32 is off by a rounding at most where a midpoint lies between.
"""

import numpy as np


def norm_rotary(
    qkv: np.ndarray,
    *,
    query: tuple[np.ndarray, np.ndarray],
    key: tuple[np.ndarray, np.ndarray],
    rotary: tuple[np.ndarray, np.ndarray] | None,
    epsilon: float,
) -> np.ndarray:
    """See `api.norm_rotary`."""
    heads = qkv.shape[2] // 3
    thirds = [qkv[:, :, i * heads : (i + 1) * heads] for i in range(3)]
    done = [_rotated(_normed(x, *norm, epsilon), rotary) for x, norm in zip(thirds, (query, key), strict=False)]
    return np.concatenate([*done, thirds[2]], axis=2)


def _normed(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return (normed * scale.astype(np.float64) + bias.astype(np.float64)).astype(x.dtype)


def _rotated(x: np.ndarray, rotary: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """(a, b) of neighbouring features to (a cos - b sin, b cos + a sin)."""
    if rotary is None:
        return x
    cos, sin = (table.astype(np.float64)[None, :, None] for table in rotary)
    wide = x.astype(np.float64)
    turned = np.stack([-wide[..., 1::2], wide[..., 0::2]], -1).reshape(wide.shape)
    return (wide * cos + turned * sin).astype(x.dtype)
