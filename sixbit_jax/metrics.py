"""How far a video is from another of the same prompt and noise: PSNR, SSIM and the relative error of its latents."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

SIGMA = 1.5
RADIUS = 5
"""SSIM weighs pixels by a Gaussian of this standard deviation, cut to 11 by 11 pixels (Wang et al., 2004)."""
K1, K2 = 0.01, 0.03
"""SSIM's constants are (255 K)^2."""

Video = UInt8[Array, "..."] | UInt8[np.ndarray, "..."]
"""[videos, frames, height, width, 3]."""
Latents = Float[Array, "..."] | Float[np.ndarray, "..."]
"""[videos, ...]."""


def psnr(found: Video, wanted: Video) -> Float32[Array, " videos"]:
    """Peak signal-to-noise ratio of each video in dB, over all of its pixels; infinite where they are equal.

    Args:
        found: uint8 [videos, frames, height, width, 3].
        wanted: likewise; the reference.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(found, wanted)
    return _psnr(found, wanted)


def ssim(found: Video, wanted: Video) -> Float32[Array, " videos"]:
    """Structural similarity of each video (Wang et al., 2004): mean over frames, channels and pixels; 1 if equal.

    Each channel of each frame on its own, in a Gaussian window, population variances, only where the window lies
    inside the frame: as `skimage.metrics.structural_similarity` with `gaussian_weights=True` and
    `use_sample_covariance=False`.

    Args:
        found: uint8 [videos, frames, height, width, 3].
        wanted: likewise; the reference.

    Raises:
        ValueError: if the shapes differ, or a frame is smaller than the window.
    """
    _check_shapes(found, wanted)
    if min(wanted.shape[2:4]) <= 2 * RADIUS:
        raise ValueError(f"frames must be larger than the window of {2 * RADIUS + 1}, found {wanted.shape[2:4]}")
    return _ssim(found, wanted)


def relative_error(found: Latents, wanted: Latents) -> Float32[Array, " videos"]:
    """|found - wanted| / |wanted| of each video, in the L2 norm, float32.

    Args:
        found: latents [videos, ...] of any float dtype.
        wanted: likewise; the reference.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(found, wanted)
    return _relative_error(found, wanted)


def _check_shapes(found: jax.Array | np.ndarray, wanted: jax.Array | np.ndarray) -> None:
    if found.shape != wanted.shape:
        raise ValueError(f"{found.shape} is compared with {wanted.shape}; the shapes must be equal")


@jax.jit
def _psnr(found: Video, wanted: Video) -> Float32[Array, " videos"]:
    difference = jnp.abs(found.astype(jnp.int32) - wanted.astype(jnp.int32)).astype(jnp.float32) / 255
    return -10 * jnp.log10(jnp.square(difference).mean(range(1, found.ndim)))


@jax.jit
def _ssim(found: Video, wanted: Video) -> Float32[Array, " videos"]:
    # Centred values keep the differences of squares below exact enough in float32; variances do not depend on it.
    x, y = (jnp.asarray(video, jnp.float32) - 127.5 for video in (found, wanted))
    mean_x, mean_y, xx, yy, xy = (_window(values) for values in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.mean(range(1, similarity.ndim))


def _window(
    values: Float32[Array, "videos frames height width 3"],
) -> Float32[Array, "videos frames inner_height inner_width 3"]:
    """Weighted means over the windows that lie inside the frame."""
    weights = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-RADIUS, RADIUS + 1)]
    weights = [weight / sum(weights) for weight in weights]
    for axis in (2, 3):
        inner = values.shape[axis] - 2 * RADIUS
        parts = [weight * jax.lax.slice_in_dim(values, i, i + inner, axis=axis) for i, weight in enumerate(weights)]
        values = functools.reduce(jnp.add, parts)
    return values


@jax.jit
def _relative_error(found: Latents, wanted: Latents) -> Float32[Array, " videos"]:
    found, wanted = (latents.astype(jnp.float32).reshape(latents.shape[0], -1) for latents in (found, wanted))
    return jnp.linalg.norm(found - wanted, axis=1) / jnp.linalg.norm(wanted, axis=1)
