"""Writes the autoencoder references with diffusers. Runs where torch and diffusers are installed."""

from collections.abc import Callable

import common
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX


def small(*widths: int, **more) -> dict:
    levels = len(widths)
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **more,
    }


# case -> (configuration, video shape [batch, frames, height, width], tiled)
CASES = {
    "vae_3_levels_17_frames": (small(8, 16, 16), (2, 17, 16, 12), False),
    "vae_4_levels_49_frames": (small(4, 4, 8, 8, norm_num_groups=2), (1, 49, 8, 16), False),
    "vae_image": (small(8, 16, 16, 16), (1, 1, 24, 16), False),
    "vae_13_frames": (small(8, 8, 16, norm_eps=1e-3), (1, 13, 8, 12), False),
    "vae_24_frames": (
        small(8, 16, norm_num_groups=8, layers_per_block=2, temporal_compression_ratio=2),
        (1, 24, 8, 4),
        False,
    ),
    "vae_quant": (
        small(8, 8, 8, latent_channels=3, use_quant_conv=True, use_post_quant_conv=True),
        (1, 9, 8, 8),
        False,
    ),
    "vae_tiled": (
        small(4, 8, temporal_compression_ratio=2, sample_height=24, sample_width=20),
        (1, 5, 22, 18),
        True,
    ),
}


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x.float().numpy(), 1, -1))


def finite(compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What `compute` returns, again if need be: torch on a CPU now and then leaves NaN in bfloat16 of small tiles."""
    for _ in range(5):
        found = compute()
        if np.isfinite(found).all():
            return found
        print("torch left values that are not finite; once more", flush=True)
    raise FloatingPointError("torch's bfloat16 autoencoder is not finite, five times over")


@torch.no_grad()
def reference(case: str) -> None:
    config, shape, tiled = CASES[case]
    model = AutoencoderKLCogVideoX(**config).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in common.weights(shapes).items()})
    if tiled:
        model.enable_tiling()
    video = to_torch(common.values("video", (*shape, 3)))
    moments = to_numpy(model.encode(video).latent_dist.parameters)
    latents = to_torch(common.values("latents", (*moments.shape[:-1], config["latent_channels"])))
    decoded = to_numpy(model.decode(latents).sample)
    model.bfloat16()
    half_moments = finite(lambda: to_numpy(model.encode(video.bfloat16()).latent_dist.parameters))
    half_decoded = finite(lambda: to_numpy(model.decode(latents.bfloat16()).sample))
    common.save(
        case,
        config=config,
        shapes=shapes,
        moments=moments,
        decoded=decoded,
        video_shape=np.array(shape),
        tiled=np.array(tiled),
        moments_bfloat16_error=np.float64(common.relative_l2(half_moments, moments)),
        decoded_bfloat16_error=np.float64(common.relative_l2(half_decoded, decoded)),
    )


def main() -> None:
    for case in CASES:
        reference(case)


if __name__ == "__main__":
    main()
