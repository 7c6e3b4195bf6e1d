"""Writes whole-pipeline references with diffusers: guided steps from given latents, and the decoded video.

The noise that DPM would draw is replaced by named values.
"""

from unittest import mock

import common
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.schedulers import scheduling_dpm_cogvideox

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
    "_class_name": "CogVideoXDDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift_scale": 1.0,
}
DPM = {"_class_name": "CogVideoXDPMScheduler"}
ROTARY = {"use_rotary_positional_embeddings": True}

SMALL = {"height": 16, "width": 24, "output_type": "latent"}

# case -> (transformer, scheduler, latent frames, call arguments)
CASES = {
    "pipeline_sincos": ({}, {"snr_shift_scale": 3.0, "timestep_spacing": "linspace"}, 3, {"num_frames": 9}),
    "pipeline_rotary_dynamic": (ROTARY, {}, 4, {"num_frames": 13, "use_dynamic_cfg": True}),
    "pipeline_patch_t": ({**ROTARY, "patch_size_t": 2, "patch_bias": False}, {}, 4, {"num_frames": 9}),
    "pipeline_dpm": (ROTARY, DPM, 5, {**SMALL, "num_frames": 17, "use_dynamic_cfg": True}),
    "pipeline_dpm_49_frames": ({}, {**DPM, "snr_shift_scale": 3.0}, 13, {**SMALL, "num_frames": 49}),
}


class NamedNoiseDPM(CogVideoXDPMScheduler):
    """Draws `common.values("noise.<step>")`."""

    def step(self, model_output, old_pred_original_sample, timestep, timestep_back, sample, **kwargs):
        step = self.timesteps.tolist().index(timestep)
        noise = torch.from_numpy(common.values(f"noise.{step}", tuple(sample.shape))).to(sample.dtype)
        with mock.patch.object(scheduling_dpm_cogvideox, "randn_tensor", return_value=noise):
            return super().step(model_output, old_pred_original_sample, timestep, timestep_back, sample, **kwargs)


SCHEDULERS = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": NamedNoiseDPM}


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
        scheduler=SCHEDULERS[configs["scheduler"]["_class_name"]].from_config(configs["scheduler"]),
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 24, "width": 32, "output_type": "np", "num_inference_steps": 10, "guidance_scale": 6.0, **call}
    # The pipeline asks its text encoder for nothing when both embeddings are given.
    latents_shape = (2, latent_frames, 4, call["height"] // 4, call["width"] // 4)
    inputs = {
        "prompt_embeds": torch.from_numpy(common.values("prompt", (2, 7, 24))),
        "negative_prompt_embeds": torch.from_numpy(common.values("negative", (2, 7, 24))),
        "latents": torch.from_numpy(common.values("latents", latents_shape)),
    }
    outputs = {"latents": pipe(**inputs, **{**call, "output_type": "latent"}).frames.numpy()}
    if call["output_type"] == "np":
        outputs["video"] = np.asarray(pipe(**inputs, **call).frames, np.float16)
    common.save(case, config={**configs, "call": call}, shapes={**shapes, **vae_shapes}, **outputs)


def main() -> None:
    for case in CASES:
        reference(case)


if __name__ == "__main__":
    main()
