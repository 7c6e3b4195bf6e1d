"""Metrics against scikit-image and closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sixbit_jax import metrics

RNG = np.random.default_rng(0)
SHAPE = (3, 2, 24, 30, 3)


def videos(noise):
    """A smooth video, dark and bright, and the same with noise of a standard deviation that grows by the video."""
    ramp = np.linspace(0, 255, SHAPE[3])[:, None] * np.linspace(0.2, 1, SHAPE[2])[:, None, None]
    wanted = np.broadcast_to(ramp, SHAPE)
    found = wanted + noise * np.arange(1, 4).reshape(3, 1, 1, 1, 1) * RNG.standard_normal(SHAPE)
    return tuple(np.clip(np.round(v), 0, 255).astype(np.uint8) for v in (found, wanted))


@pytest.mark.parametrize("noise", [0.3, 5.0, 60.0])
def test_psnr_and_ssim_are_those_of_scikit_image(noise):
    found, wanted = videos(noise)
    for i in range(3):
        assert float(metrics.psnr(found, wanted)[i]) == pytest.approx(
            peak_signal_noise_ratio(wanted[i], found[i], data_range=255), abs=1e-4
        )
        frames = [
            structural_similarity(
                a, b, data_range=255, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
            )
            for a, b in zip(found[i], wanted[i], strict=True)
        ]
        # Sums of 121 float32 products; sample covariances, another window or a padded border differ by 1e-3 or more.
        assert float(metrics.ssim(found, wanted)[i]) == pytest.approx(np.mean(frames), abs=2e-5)


def test_equal_videos():
    _, video = videos(0.0)
    assert (metrics.psnr(video, video) == jnp.inf).all()
    np.testing.assert_allclose(metrics.ssim(video, video), 1, atol=1e-6)
    assert (metrics.relative_error(video.astype(np.float32), video.astype(np.float32)) == 0).all()


def test_flat_frames_have_a_similarity():
    black, white = np.zeros(SHAPE, np.uint8), np.full(SHAPE, 255, np.uint8)
    np.testing.assert_allclose(metrics.ssim(black, white), 1e-4 / (1 + 1e-4), rtol=1e-3)
    np.testing.assert_allclose(metrics.psnr(black, white), 0, atol=1e-6)


def test_relative_error_of_each_video():
    wanted = RNG.standard_normal((3, 4, 5)).astype(np.float32)
    scale = np.array([1.0, 1.5, 0.0], np.float32)[:, None, None]
    np.testing.assert_allclose(metrics.relative_error(wanted * scale, wanted), [0, 0.5, 1], rtol=1e-6)
    found = metrics.relative_error(jnp.asarray(wanted * scale, jnp.bfloat16), jnp.asarray(wanted, jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [0, 0.5, 1], rtol=1e-2)


def test_wrong_shapes_are_refused():
    found, wanted = videos(1.0)
    for metric, dtype in ((metrics.psnr, np.uint8), (metrics.ssim, np.uint8), (metrics.relative_error, np.float32)):
        with pytest.raises(ValueError, match="must be equal"):
            metric(found[:2].astype(dtype), wanted.astype(dtype))
    with pytest.raises(ValueError, match="window"):
        metrics.ssim(found[:, :, :10], wanted[:, :, :10])
