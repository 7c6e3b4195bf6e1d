"""Positions of CogVideoX tokens: timestep sinusoids, 3D sincos embeddings (2B) and 3D rotary tables (5B, 1.5).

The one-dimensional tables are NumPy constants computed in the precision order of diffusers; the three-dimensional ones
are assembled from them inside the compiled program, so that no token-sized constant is embedded in it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from sixbit_jax.config import TransformerConfig


def timestep_embedding(
    timestep: Array, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float32[Array, "batch {dim}"]:
    """Sinusoids of a timestep (`Timesteps` of diffusers).

    Args:
        timestep: integer or float array [batch].
        dim: an even width.
        flip_sin_to_cos: cosines first.
        freq_shift: subtracted from dim / 2 where the frequencies' exponents are normalised.
    """
    half = dim // 2
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)  # rounded once, as torch does
    angle = timestep.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(parts, axis=-1)


def _outer_3d(t: np.ndarray, h: np.ndarray, w: np.ndarray, *, order: str) -> Float32[Array, "tokens features"]:
    """Broadcasts per-axis tables [n_axis, d_axis] to every (t, h, w) token and concatenates them in the given order."""
    grid = (len(t), len(h), len(w))
    tables = {"t": t[:, None, None, :], "h": h[None, :, None, :], "w": w[None, None, :, :]}
    parts = [jnp.broadcast_to(jnp.asarray(tables[axis]), (*grid, tables[axis].shape[-1])) for axis in order]
    return jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)


def _sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = np.outer(positions, omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def sincos_3d(config: TransformerConfig, grid: tuple[int, int, int]) -> Float32[Array, "tokens {config.inner_dim}"]:
    """Fixed position embeddings of the video tokens (`get_3d_sincos_pos_embed` of diffusers).

    Args:
        config: gives the width and the interpolation scales.
        grid: tokens along time, height and width.
    """
    frames, height, width = grid
    space = np.float32(config.spatial_interpolation_scale)
    time = np.float32(config.temporal_interpolation_scale)
    d = config.inner_dim
    return _outer_3d(
        _sincos_1d(d // 4, np.arange(frames, dtype=np.float32) / time),
        _sincos_1d(3 * d // 8, np.arange(height, dtype=np.float32) / space),
        _sincos_1d(3 * d // 8, np.arange(width, dtype=np.float32) / space),
        order="twh",
    )


def _crop_region(height: int, width: int, base_height: int, base_width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid's place in the base grid after an aspect-preserving resize: ((top, bottom), (left, right))."""
    if height / width > base_height / base_width:
        resized_h, resized_w = base_height, round(base_height / height * width)
    else:
        resized_h, resized_w = round(base_width / width * height), base_width
    top, left = round((base_height - resized_h) / 2), round((base_width - resized_w) / 2)
    return (top, top + resized_h), (left, left + resized_w)


def rotary_3d(
    config: TransformerConfig, grid: tuple[int, int, int]
) -> tuple[Float32[Array, "tokens head"], Float32[Array, "tokens head"]]:
    """Rotary tables (cos, sin) of the video tokens (`get_3d_rotary_pos_embed` of diffusers).

    CogVideoX 1.0 stretches the grid over the training resolution; 1.5 (`patch_size_t` set) uses integer positions.
    Each frequency stands twice in a row, for the two halves of a rotated pair.

    Args:
        config: gives the width of a head and the training resolution.
        grid: tokens along time, height and width.
    """
    frames, height, width = grid
    head = config.attention_head_dim
    if config.patch_size_t is None:
        base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        (top, bottom), (left, right) = _crop_region(height, width, *base)
        rows = np.linspace(top, bottom * (height - 1) / height, height, dtype=np.float32)
        columns = np.linspace(left, right * (width - 1) / width, width, dtype=np.float32)
    else:
        rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)

    def angles(dim: int, positions: np.ndarray) -> np.ndarray:
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = np.float32(1.0) / np.float32(10000.0) ** exponent
        return np.repeat(np.outer(positions, frequencies), 2, axis=1)

    tables = (
        angles(head // 4, np.arange(frames, dtype=np.float32)),
        angles(head // 8 * 3, rows),
        angles(head // 8 * 3, columns),
    )
    return (
        _outer_3d(*(np.cos(a) for a in tables), order="thw"),
        _outer_3d(*(np.sin(a) for a in tables), order="thw"),
    )


def prepend_identity(
    tables: tuple[jax.Array, jax.Array], rows: int
) -> tuple[Float32[Array, "all head"], Float32[Array, "all head"]]:
    """Rotary tables with unrotated positions, the text tokens, in front.

    Args:
        tables: (cos, sin), from `rotary_3d`.
        rows: number of text tokens.
    """
    cos, sin = tables
    return jnp.pad(cos, ((rows, 0), (0, 0)), constant_values=1.0), jnp.pad(sin, ((rows, 0), (0, 0)))
