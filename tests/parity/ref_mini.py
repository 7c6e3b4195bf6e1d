"""Writes references of the trained mini model, which diffusers and transformers load themselves from its folder."""

import common
import numpy as np
import torch
from diffusers import CogVideoXPipeline

PROMPTS = ["a red 3 moves left slowly", "a blue 7 moves up fast and a green 1 moves right slowly"]
TOO_LONG = " and ".join(PROMPTS * 3)
CALL = {"num_inference_steps": 10, "guidance_scale": 6.0}
TEXT_LENGTH = 32  # the model's own; diffusers pads to 226 unless told
PIXELS = 3  # Every third pixel of a decoded video is kept, which meets every place within a 4x4 latent position.


def load(**kwargs) -> CogVideoXPipeline:
    pipe = CogVideoXPipeline.from_pretrained(common.MINI_MODEL, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.float().numpy(), 1, -1)


@torch.no_grad()
def outputs(pipe: CogVideoXPipeline, denoised: np.ndarray | None) -> dict[str, np.ndarray]:
    """Everything compared; `denoised` are the latents [2, 5, 8, 16, 16] to decode the first of, None for its own."""
    dtype = pipe.transformer.dtype
    text = pipe.encode_prompt(
        [*PROMPTS, TOO_LONG, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )[0]
    latents = torch.from_numpy(common.values("latents", (2, 5, 8, 16, 16))).to(dtype)
    latents = pipe(PROMPTS, latents=latents, max_sequence_length=TEXT_LENGTH, output_type="latent", **CALL).frames
    latents = latents.float().numpy()
    first = torch.from_numpy((latents if denoised is None else denoised)[:1]).to(dtype)
    video = torch.from_numpy(np.moveaxis(common.moving_square(17, 64), -1, 1).copy()).to(dtype)
    return {
        "text": text.float().numpy(),
        "latents": latents,
        "moments": channels_last(pipe.vae.encode(video).latent_dist.parameters),
        "decoded": channels_last(pipe.decode_latents(first))[:, :, ::PIXELS, ::PIXELS],
    }


def main() -> None:
    pipe = load()
    dtypes = {name: getattr(pipe, name).dtype for name in ("transformer", "vae", "text_encoder")}
    if set(dtypes.values()) != {torch.float32}:
        raise RuntimeError(f"{common.MINI_MODEL}: without a dtype, everything must load in float32, not {dtypes}")
    tokens = pipe.tokenizer(
        [*PROMPTS, TOO_LONG, ""], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="np"
    )
    exact = outputs(pipe, None)
    half = outputs(load(dtype=torch.bfloat16), exact["latents"])
    common.save(
        "mini",
        config={"prompts": PROMPTS, "too_long": TOO_LONG, "call": CALL, "model": common.checksums(common.MINI_MODEL)},
        shapes={},
        tokens=tokens.input_ids.astype(np.int32),
        **exact,
        **{f"{name}_bfloat16_error": np.float64(common.relative_l2(half[name], exact[name])) for name in exact},
    )


if __name__ == "__main__":
    main()
