"""Time of each stage of a whole text-to-video call, for the mini model and for full-size CogVideoX shapes.

`python -m benchmarks.stages --models mini 2b 5b --out benchmarks/results/stages_<device>.json`

Full-size models have random weights, made on the device: the time of a dense product does not depend on what its
weights have learnt. One choice does: attention takes its faster kernel where the norms of queries and keys keep logits
small (`norm_rotary.logit_bound`). Random gains are near 1, which do; those of published models are assumed to.

Each stage is timed on its second call, synchronised; the first call's extra time is reported as compilation. Runs may
sample fewer steps than the 50 they are scaled to; the table says so.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import record
from benchmarks.video import latent_shape
from sixbit_jax import Pipeline
from sixbit_jax.config import SchedulerConfig, T5Config, TransformerConfig, VAEConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.pipeline import decode_latents, encode_text
from sixbit_jax.sampling import sampler, schedulers

COGVIDEOX_SCHEDULER = SchedulerConfig(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """One model's row.

    Attributes:
        frames, height, width: the video.
        steps: denoising steps that were run.
        text_encoder_s, sampling_s, vae_s: seconds of each stage, second call; sampling scaled to 50 steps.
        step_ms: one guided step.
        compilation_s: what the first call of the three stages took longer.
        peak_gib: highest device memory in use; None where the platform does not say.
    """

    model: str
    frames: int
    height: int
    width: int
    steps: int
    text_encoder_s: float
    step_ms: float
    sampling_s: float
    vae_s: float
    compilation_s: float
    peak_gib: float | None


def random_model(module, config) -> Split:
    """A model with random bfloat16 weights, those of norms about 1, made on the device one parameter at a time."""
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: module(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    leaves, structure = jax.tree.flatten_with_path(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        noise = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        arrays.append(1 + noise if "'scale'" in jax.tree_util.keystr(path) else noise)
    return Split(params=jax.tree.unflatten(structure, arrays), graph=graph)


def timed(run) -> tuple[float, float]:
    """(seconds of the second call, seconds the first took longer)."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds[1], max(0.0, seconds[0] - seconds[1])


def random_pipeline(transformer: TransformerConfig, vae: VAEConfig, text_encoder: T5Config) -> Pipeline:
    """A pipeline of `random_model`s without a tokenizer."""
    return Pipeline(
        transformer=random_model(CogVideoXTransformer3DModel, transformer),
        vae=random_model(AutoencoderKLCogVideoX, vae),
        text_encoder=random_model(T5EncoderModel, text_encoder),
        scheduler=COGVIDEOX_SCHEDULER,
    )


MODELS: dict[str, tuple[Callable[[], Pipeline], int]] = {
    "mini": (lambda: Pipeline.from_pretrained("mini"), 50),
    "2b": (lambda: random_pipeline(TransformerConfig.cogvideox_2b(), VAEConfig(), T5Config()), 10),
    "5b": (lambda: random_pipeline(TransformerConfig.cogvideox_5b(), VAEConfig(), T5Config()), 10),
}
"""Name -> (how to make it, the steps it is timed over unless others are asked for)."""


def sampling_arguments(
    transformer: Split, steps: int, *, scheduler: SchedulerConfig = COGVIDEOX_SCHEDULER, text: jax.Array | None = None
) -> tuple:
    """What `sampler.sample` takes for one video of the published size, guidance 6.

    Args:
        transformer: that samples.
        steps: denoising steps.
        scheduler: of the model.
        text: encoded, [2, tokens, features], of the prompt and of none; None for random values.
    """
    config = transformer.merge().config
    latents = jax.random.normal(jax.random.key(0), (1, *latent_shape(config)))
    if text is None:
        text = jax.random.normal(
            jax.random.key(1), (2, config.max_text_seq_length, config.text_embed_dim), jnp.bfloat16
        )
    schedule = schedulers.make_schedule(scheduler, steps)
    scale = schedulers.guidance_schedule(6.0, schedule.timesteps, steps, use_dynamic_cfg=False)
    conditioning = sampler.Conditioning(
        prompt_embeds=text[:1], negative_prompt_embeds=text[1:], keys=jax.random.split(jax.random.key(2), 1)
    )
    return transformer, schedule, scale, latents, conditioning


def measure(name: str, pipe: Pipeline, steps: int) -> Stages:
    """Times the three stages of one guided call with a batch of one."""
    assert pipe.vae is not None
    config, space = pipe.transformer.merge().config, pipe.vae.merge().config.spatial_compression_ratio
    ids = jnp.ones((2, config.max_text_seq_length), jnp.int32)
    text = encode_text(pipe.text_encoder, ids)
    arguments = sampling_arguments(pipe.transformer, steps, scheduler=pipe.scheduler, text=text)
    *_, latents, _ = arguments
    jax.clear_caches()
    encode_s, encode_compile = timed(lambda: encode_text(pipe.text_encoder, ids))
    pipe = dataclasses.replace(pipe, text_encoder=None)
    sample_s, sample_compile = timed(lambda: sampler.sample(*arguments))
    vae_s, vae_compile = timed(lambda: decode_latents(pipe.vae, latents))
    memory = jax.devices()[0].memory_stats() or {}
    peak = memory.get("peak_bytes_in_use")
    return Stages(
        model=name,
        frames=config.sample_frames,
        height=config.sample_height * space,
        width=config.sample_width * space,
        steps=steps,
        text_encoder_s=round(encode_s, 4),
        step_ms=round(sample_s / steps * 1000, 2),
        sampling_s=round(sample_s / steps * 50, 3),
        vae_s=round(vae_s, 4),
        compilation_s=round(encode_compile + sample_compile + vae_compile, 2),
        peak_gib=None if peak is None else round(peak / 2**30, 2),
    )


def table(rows: list[Stages]) -> str:
    """A markdown table, one row a model."""
    head = "| model | video | text encoder | step | 50 steps | VAE decode | compilation | peak memory |"
    lines = [head, "|" + "---|" * 8]
    for r in rows:
        steps = f"{r.sampling_s:.2f} s" + ("" if r.steps == 50 else f" (from {r.steps})")
        memory = "" if r.peak_gib is None else f"{r.peak_gib:.1f} GiB"
        video = f"{r.frames} x {r.height} x {r.width}"
        lines.append(
            f"| {r.model} | {video} | {r.text_encoder_s * 1000:.0f} ms | {r.step_ms:.1f} ms | {steps} "
            f"| {r.vae_s:.2f} s | {r.compilation_s:.0f} s | {memory} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Stages]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mini"])
    parser.add_argument("--steps", type=int, help="denoising steps; default: 50 of the mini model, 10 of others")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.models:
        make, steps = MODELS[name]
        rows.append(measure(name, make(), arguments.steps or steps))
    text = table(rows)
    print(text)
    record.save(arguments.out, record.describe(program="benchmarks.stages", argv=argv, rows=rows), text)
    return rows


if __name__ == "__main__":
    main()
