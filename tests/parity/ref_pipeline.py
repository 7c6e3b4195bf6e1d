"""Writes whole-pipeline references with diffusers: guided DDIM steps from given latents, and the decoded video."""

import common
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

VAE = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["CogVideoXDownBlock3D"] * 3,
    "up_block_types": ["CogVideoXUpBlock3D"] * 3,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_height": 24,
    "sample_width": 32,
    "scaling_factor": 0.7,
}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "max_text_seq_length": 7,
    "sample_height": 6,
    "sample_width": 8,
    "sample_frames": 9,
}
SCHEDULER = {
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift_scale": 1.0,
}
ROTARY = {"use_rotary_positional_embeddings": True}

# case -> (transformer, scheduler, latent frames, call arguments)
CASES = {
    "pipeline_sincos": ({}, {"snr_shift_scale": 3.0, "timestep_spacing": "linspace"}, 3, {"num_frames": 9}),
    "pipeline_rotary_dynamic": (ROTARY, {}, 4, {"num_frames": 13, "use_dynamic_cfg": True}),
    "pipeline_patch_t": ({**ROTARY, "patch_size_t": 2, "patch_bias": False}, {}, 4, {"num_frames": 9}),
}


def filled(model: torch.nn.Module, prefix: str) -> tuple[torch.nn.Module, dict[str, tuple[int, ...]]]:
    """Fills a model from the names of its weights under a prefix, and lists their shapes under it."""
    shapes = {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = common.weights(shapes)
    model.load_state_dict({key.removeprefix(prefix): torch.from_numpy(value) for key, value in weights.items()})
    return model.eval(), shapes


@torch.no_grad()
def reference(case: str) -> None:
    transformer_changes, scheduler_changes, latent_frames, call = CASES[case]
    configs = {
        "transformer": {**TRANSFORMER, **transformer_changes},
        "vae": VAE,
        "scheduler": {**SCHEDULER, **scheduler_changes},
    }
    transformer, shapes = filled(CogVideoXTransformer3DModel(**configs["transformer"]), "transformer/")
    vae, vae_shapes = filled(AutoencoderKLCogVideoX(**VAE), "vae/")
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(**configs["scheduler"]),
    )
    pipe.set_progress_bar_config(disable=True)
    # The pipeline asks its text encoder for nothing when both embeddings are given.
    inputs = {
        "prompt_embeds": torch.from_numpy(common.values("prompt", (2, 7, 24))),
        "negative_prompt_embeds": torch.from_numpy(common.values("negative", (2, 7, 24))),
        "latents": torch.from_numpy(common.values("latents", (2, latent_frames, 4, 6, 8))),
    }
    call = {"height": 24, "width": 32, "num_inference_steps": 10, "guidance_scale": 6.0, **call}
    latents = pipe(**inputs, **call, output_type="latent").frames
    video = pipe(**inputs, **call, output_type="np").frames
    configs["call"] = call
    common.save(
        case,
        config=configs,
        shapes={**shapes, **vae_shapes},
        latents=latents.numpy(),
        video=np.asarray(video, np.float16),
    )


def main() -> None:
    for case in CASES:
        reference(case)


if __name__ == "__main__":
    main()
