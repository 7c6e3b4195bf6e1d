"""Writes the transformer references with diffusers. Runs where torch and diffusers are installed."""

import common
import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "max_text_seq_length": 7,
    "sample_height": 6,
    "sample_width": 10,
    "sample_frames": 9,
}
ROTARY = {**SMALL, "use_rotary_positional_embeddings": True}
TEMPORAL_PATCHES = {**ROTARY, "patch_size_t": 2, "patch_bias": False}

# case -> (configuration, latents shape [batch, frames, channels, height, width])
CASES = {
    "transformer_sincos": (
        {**SMALL, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 3},
        (2, 3, 4, 6, 10),
    ),
    "transformer_sincos_49_frames": (
        {**SMALL, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1},
        (1, 13, 4, 4, 6),
    ),
    "transformer_rotary": (
        {**ROTARY, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2},
        (2, 4, 4, 6, 10),
    ),
    "transformer_rotary_tall": (
        {**ROTARY, "num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 1},
        (1, 5, 4, 14, 4),
    ),
    "transformer_patch_t": (
        {**TEMPORAL_PATCHES, "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 4},
        (1, 6, 4, 6, 8),
    ),
    "transformer_ofs": (
        {**TEMPORAL_PATCHES, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ofs_embed_dim": 32},
        (2, 4, 4, 4, 6),
    ),
}


def rotary(config: dict, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not config.get("use_rotary_positional_embeddings"):
        return None
    grid, base = (shape[3] // 2, shape[4] // 2), (config["sample_height"] // 2, config["sample_width"] // 2)
    common_arguments = {"embed_dim": config["attention_head_dim"], "grid_size": grid}
    if "patch_size_t" in config:
        return get_3d_rotary_pos_embed(
            crops_coords=None, temporal_size=shape[1] // 2, grid_type="slice", max_size=base, **common_arguments
        )
    crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
    return get_3d_rotary_pos_embed(crops_coords=crop, temporal_size=shape[1], **common_arguments)


@torch.no_grad()
def reference(case: str) -> None:
    config, shape = CASES[case]
    model = CogVideoXTransformer3DModel(**config).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in common.weights(shapes).items()})
    inputs = {
        "hidden_states": torch.from_numpy(common.values("latents", shape)),
        "encoder_hidden_states": torch.from_numpy(common.values("text", (shape[0], 7, config["text_embed_dim"]))),
    }
    more = {"timestep": torch.tensor([999, 321][: shape[0]]), "image_rotary_emb": rotary(config, shape)}
    if "ofs_embed_dim" in config:
        more["ofs"] = torch.full((shape[0],), 2.0)
    exact = model(**inputs, **more).sample.numpy()
    half = model.bfloat16()(**{k: v.bfloat16() for k, v in inputs.items()}, **more).sample.float().numpy()
    common.save(
        case, config=config, shapes=shapes, output=exact, bfloat16_error=np.float64(common.relative_l2(half, exact))
    )


def main() -> None:
    for case in CASES:
        reference(case)


if __name__ == "__main__":
    main()
