"""The size of the video that a published model is for, without JAX."""

from typing import Any


def latent_shape(config: Any) -> tuple[int, int, int, int]:
    """(frames, channels, height, width) of its latents, from a transformer's configuration: ours or diffusers'."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return frames, config.in_channels, config.sample_height, config.sample_width
