"""The denoising loop: one jit around one `lax.scan` over steps, its Python twin, and the step that both share."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.sampling import schedulers
from sixbit_jax.sampling.schedulers import Schedule, SchedulerState

PerStep = Float32[Array, " steps"] | Float32[np.ndarray, " steps"]


@flax.struct.dataclass(kw_only=True)
class SamplerState:
    """Everything that changes from step to step: the carry of the scan.

    Attributes:
        latents: the sample at the timestep about to be visited, [batch, frames, channels, height, width].
        scheduler: what the solver remembers.
    """

    latents: Float32[Array, "batch frames channels height width"]
    scheduler: SchedulerState


@flax.struct.dataclass(kw_only=True)
class StepInputs:
    """What differs between steps and is known before the loop: scanned over, leading axis [steps].

    Attributes:
        index: position of the step, counted from 0.
        schedule: coefficients and timestep.
        guidance_scale: classifier-free guidance scale; not read without a negative prompt.
    """

    index: Int32[Array, "*steps"]
    schedule: Schedule
    guidance_scale: Float32[Array, "*steps"]


@flax.struct.dataclass(kw_only=True)
class Trace:
    """What each step did, for the user: leading axis [steps] after the loop, on the device or fetched from it.

    Attributes:
        timestep: training timestep visited, int32 [].
        guidance_scale: guidance scale used, float32 [].
        latents_rms: root mean square of each video's latents after the step, float32 [batch].
        finite: whether all of a video's latents were finite after the step, bool [batch].
    """

    timestep: jax.Array | np.ndarray
    guidance_scale: jax.Array | np.ndarray
    latents_rms: jax.Array | np.ndarray
    finite: jax.Array | np.ndarray


@flax.struct.dataclass(kw_only=True)
class Conditioning:
    """What is constant over a run.

    Attributes:
        prompt_embeds: text features, [batch, text, text_dim].
        negative_prompt_embeds: text features to guide away from, same shape; None turns guidance off.
        keys: one key a video. A stochastic step's noise depends on the video's own key and the step alone, so a
            video does not depend on its neighbours in the batch.
    """

    prompt_embeds: Float[Array, "batch text text_dim"]
    negative_prompt_embeds: Float[Array, "batch text text_dim"] | None
    keys: Key[Array, " batch"]


def step(
    transformer: CogVideoXTransformer3DModel, state: SamplerState, inputs: StepInputs, conditioning: Conditioning
) -> tuple[SamplerState, Trace]:
    """One denoising step: predict (both halves of guidance as one batch), guide, and move by the scheduler.

    The transformer runs in its own dtype; guidance, the scheduler and the latents are float32.
    """
    guided = conditioning.negative_prompt_embeds is not None
    latents, text = state.latents, conditioning.prompt_embeds
    if guided:
        latents = jnp.concatenate([latents, latents])
        text = jnp.concatenate([conditioning.negative_prompt_embeds, text])
    timestep = jnp.broadcast_to(inputs.schedule.timesteps, (latents.shape[0],))
    prediction = transformer(latents, text, timestep).astype(jnp.float32)
    if guided:
        unconditional, conditional = jnp.split(prediction, 2)
        prediction = unconditional + inputs.guidance_scale * (conditional - unconditional)

    noise = None
    if inputs.schedule.stochastic:
        shape = state.latents.shape[1:]
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, inputs.index), shape))(conditioning.keys)
    latents, scheduler = schedulers.step(inputs.schedule, prediction, state.scheduler, state.latents, noise=noise)
    per_video = tuple(range(1, latents.ndim))
    trace = Trace(
        timestep=inputs.schedule.timesteps,
        guidance_scale=inputs.guidance_scale,
        latents_rms=jnp.sqrt(jnp.mean(latents * latents, axis=per_video)),
        finite=jnp.isfinite(latents).all(axis=per_video),
    )
    return SamplerState(latents=latents, scheduler=scheduler), trace


def prepare(
    schedule: Schedule, guidance_scale: PerStep, latents: Float32[Array, "..."]
) -> tuple[SamplerState, StepInputs]:
    """The carry before the first step, and the rows to scan over."""
    state = SamplerState(latents=latents, scheduler=schedulers.init_state(schedule, latents))
    index = jnp.arange(len(schedule.timesteps), dtype=jnp.int32)
    return state, StepInputs(index=index, schedule=schedule, guidance_scale=jnp.asarray(guidance_scale))


@jax.jit(static_argnames="on_step")
def sample(
    transformer: Split[CogVideoXTransformer3DModel],
    schedule: Schedule,
    guidance_scale: PerStep,
    latents: Float32[Array, "batch frames channels height width"],
    conditioning: Conditioning,
    *,
    on_step: Callable[[jax.Array], None] | None = None,
) -> tuple[Float32[Array, "batch frames channels height width"], Trace]:
    """Runs every step of a schedule in one compiled program.

    Compiles once per shape, schedule kind, guidance on or off, and `on_step`. Works under vmap (over keys, latents,
    guidance or prompts) and with sharded arguments.

    Args:
        transformer: the denoiser.
        schedule: from `schedulers.make_schedule`.
        guidance_scale: one scale a step, from `schedulers.guidance_schedule`.
        latents: starting noise.
        conditioning: text features and keys.
        on_step: called on the host, in order, with the index of each finished step. Keep one function object for
            many calls: it is part of the compilation key.

    Returns:
        The denoised latents and the trace of every step.
    """
    model = transformer.merge()

    def body(state: SamplerState, inputs: StepInputs) -> tuple[SamplerState, Trace]:
        state, trace = step(model, state, inputs, conditioning)
        if on_step is not None:
            # The dependency on the trace holds the report back until the step's latents exist.
            jax.debug.callback(on_step, inputs.index + 0 * trace.finite.any().astype(jnp.int32), ordered=True)
        return state, trace

    state, trace = jax.lax.scan(body, *prepare(schedule, guidance_scale, latents))
    return state.latents, trace


@jax.jit
def _jitted_step(
    transformer: Split[CogVideoXTransformer3DModel], state: SamplerState, inputs: StepInputs, conditioning: Conditioning
) -> tuple[SamplerState, Trace]:
    return step(transformer.merge(), state, inputs, conditioning)


def sample_python_loop(
    transformer: Split[CogVideoXTransformer3DModel],
    schedule: Schedule,
    guidance_scale: PerStep,
    latents: Float32[Array, "batch frames channels height width"],
    conditioning: Conditioning,
) -> tuple[Float32[Array, "batch frames channels height width"], Trace]:
    """`sample` as a Python loop over the same step, for looking at states between steps and for testing the scan."""
    state, inputs = prepare(schedule, guidance_scale, latents)
    traces = []
    for index in range(len(schedule.timesteps)):
        state, trace = _jitted_step(transformer, state, jax.tree.map(lambda x, i=index: x[i], inputs), conditioning)
        traces.append(trace)
    return state.latents, jax.tree.map(lambda *rows: jnp.stack(rows), *traces)
