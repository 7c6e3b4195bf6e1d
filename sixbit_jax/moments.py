"""Second moments of what a transformer's linears see over whole runs: what `rounding.round_to_inputs` needs.

They are summed on the device while prompts are sampled in the model's own dtype; no activation is kept.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES, PlainLinears
from sixbit_jax.models.split import Split
from sixbit_jax.pipeline import Pipeline, prompt_list
from sixbit_jax.precision.blocks import blocks_of
from sixbit_jax.rounding import group_size
from sixbit_jax.sampling import sampler, schedulers

Moments = dict[str, Float32[Array, "blocks groups size size"]]
"""By dotted path of the linear in the transformer, such as "blocks.attn_in"."""


class RecordingLinears(PlainLinears):
    """Plain linears of one block; `found` then holds the moment of each one's inputs, by site."""

    def __init__(self) -> None:
        self.found: dict[str, Float32[Array, "groups size size"]] = {}

    def __call__(self, site: str, linear: Any, x: Float[Array, "batch tokens k"]) -> jax.Array:
        size = group_size(x.shape[-1])
        rows = x.reshape(-1, x.shape[-1] // size, size)
        self.found[site] = jnp.einsum("ngi,ngj->gij", rows, rows, preferred_element_type=jnp.float32)
        return super().__call__(site, linear, x)


@jax.jit(donate_argnames="moments")
def sample(
    transformer: Split[CogVideoXTransformer3DModel],
    moments: Moments,
    schedule: schedulers.Schedule,
    guidance_scale: sampler.PerStep,
    latents: Float32[Array, "batch frames channels height width"],
    conditioning: sampler.Conditioning,
) -> tuple[Float32[Array, "batch frames channels height width"], Moments]:
    """`sampler.sample` without a policy -> its latents, and the moments with those of this run added.

    Args:
        transformer: not quantised.
        moments: from `init`, or from the last run; given up.
        schedule: as in `sampler.sample`, like all that follow.
        guidance_scale: one scale a step.
        latents: starting noise.
        conditioning: text features and keys.
    """
    model = transformer.merge()

    def body(carry: tuple, inputs: sampler.StepInputs) -> tuple[tuple, None]:
        state, moments = carry
        samples, text, timestep = sampler.forward_inputs(state, inputs, conditioning)
        x, context = model.embed(samples, text, timestep)
        block, params = blocks_of(model, context)

        def one_block(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            x, moments = carry
            params, index = inputs
            linears = RecordingLinears()
            x = block(params, x, context.temb, linears)
            added = {path: moments[path].at[index].add(linears.found[path.rpartition(".")[2]]) for path in moments}
            return (x, added), None

        order = jnp.arange(model.config.num_layers, dtype=jnp.int32)
        (x, moments), _ = jax.lax.scan(one_block, (x, moments), (params, order))
        state, _ = sampler.advance(state, inputs, conditioning, model.project(x, context, samples.shape))
        return (state, moments), None

    state, inputs = sampler.prepare(model, schedule, guidance_scale, latents, conditioning, None)
    (state, moments), _ = jax.lax.scan(body, (state, moments), inputs)
    return state.latents, moments


def init(transformer: Split[CogVideoXTransformer3DModel]) -> Moments:
    """Zeros, for a transformer that is not quantised.

    Raises:
        ArgumentError: if it is.
    """
    blocks, found = transformer.merge().blocks, {}
    for site in SITES:
        if not isinstance(linear := getattr(blocks, site), nnx.Linear):
            raise ArgumentError("the weights are quantised already: moments are gathered of the original model")
        layers, k, _ = linear.kernel.get_value().shape
        found[f"blocks.{site}"] = jnp.zeros((layers, k // group_size(k), *[group_size(k)] * 2), jnp.float32)
    return found


def gather(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    seed: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[], Any] | None = None,
) -> Moments:
    """Samples each prompt alone, and sums what the linears of the blocks see.

    Takes the memory of the moments beside that of sampling: 13 GB for CogVideoX-5B, 5 GB for 2B.

    Args:
        pipe: not quantised.
        prompts: typical of what will be generated; eight were enough on the mini model.
        num_inference_steps, guidance_scale: of the runs that will be made.
        seed: of the noise.
        num_frames, height, width: of the runs that will be made; None for the model's own size.
        progress: called after each prompt.

    Raises:
        ArgumentError: on a bad argument, or if the weights are quantised.
    """
    prompts = prompt_list("prompts", prompts)
    size = pipe.size(num_frames=num_frames, height=height, width=width)
    run_inputs = pipe.separate_runs(
        prompts, size, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed
    )
    moments = init(pipe.transformer)
    for index, prompt in enumerate(prompts):
        latents, moments = sample(pipe.transformer, moments, *run_inputs(index))
        while not latents.is_ready():  # Ctrl-C does not reach a main thread that waits in XLA
            time.sleep(0.02)
        if not bool(jnp.isfinite(latents).all()):
            raise ArgumentError(f"latents of {prompt!r} became NaN or Inf; gather in a wider dtype")
        if progress is not None:
            progress()
    return moments
