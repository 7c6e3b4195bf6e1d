"""The denoising loop: one jit around one `lax.scan` over steps, its Python twin, and the step that both share."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.precision.blocks import PrecisionPolicy, PrecisionState, PrecisionTrace, init_state, run_blocks
from sixbit_jax.precision.types import Progress
from sixbit_jax.sampling import schedulers
from sixbit_jax.sampling.schedulers import Schedule, SchedulerState

PerStep = Float32[Array, " steps"] | Float32[np.ndarray, " steps"]


@flax.struct.dataclass(kw_only=True)
class SamplerState:
    """Everything that changes from step to step: the carry of the scan.

    Attributes:
        latents: the sample at the timestep about to be visited, [batch, frames, channels, height, width].
        scheduler: what the solver remembers.
        precision: what the precision policy remembers, the delta cache included; None without a policy.
    """

    latents: Float32[Array, "batch frames channels height width"]
    scheduler: SchedulerState
    precision: PrecisionState | None = None


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
        precision: what the precision policy decided and measured; None without one.
    """

    timestep: jax.Array | np.ndarray
    guidance_scale: jax.Array | np.ndarray
    latents_rms: jax.Array | np.ndarray
    finite: jax.Array | np.ndarray
    precision: PrecisionTrace | None = None


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
    transformer: CogVideoXTransformer3DModel,
    state: SamplerState,
    inputs: StepInputs,
    conditioning: Conditioning,
    *,
    policy: PrecisionPolicy | None = None,
    steps: int,
) -> tuple[SamplerState, Trace]:
    """One denoising step of `steps`: predict (both halves of guidance as one batch), guide, and move by the scheduler.

    The transformer runs in its own dtype, its blocks under the policy if there is one; guidance, the scheduler and the
    latents are float32.

    Args:
        transformer: the denoiser.
        state: from `prepare` or the last step.
        inputs: one row of what `prepare` gives.
        conditioning: text features and keys.
        policy: the one that `state` was prepared for.
        steps: of the whole run.

    Returns:
        The next state, and what this step did.
    """
    latents, text, timestep = forward_inputs(state, inputs, conditioning)
    precision, decided = state.precision, None
    if policy is None:
        prediction = transformer(latents, text, timestep)
    else:
        assert precision is not None
        x, context = transformer.embed(latents, text, timestep)
        progress = Progress(step=inputs.index, steps=steps)
        x, precision, decided = run_blocks(transformer, x, context, policy, precision, progress)
        prediction = transformer.project(x, context, latents.shape)
    return advance(dataclasses.replace(state, precision=precision), inputs, conditioning, prediction, decided)


def forward_inputs(
    state: SamplerState, inputs: StepInputs, conditioning: Conditioning
) -> tuple[Float32[Array, "samples ..."], Float[Array, "samples text text_dim"], Int32[Array, " samples"]]:
    """Latents, text features and timesteps of a step's forward pass; with guidance, [branches x videos] samples."""
    latents, text = state.latents, conditioning.prompt_embeds
    if conditioning.negative_prompt_embeds is not None:
        latents = jnp.concatenate([latents, latents])
        text = jnp.concatenate([conditioning.negative_prompt_embeds, text])
    return latents, text, jnp.broadcast_to(inputs.schedule.timesteps, (latents.shape[0],))


def advance(
    state: SamplerState,
    inputs: StepInputs,
    conditioning: Conditioning,
    prediction: Float[Array, "samples frames channels height width"],
    decided: PrecisionTrace | None = None,
) -> tuple[SamplerState, Trace]:
    """What follows the forward pass: guide, and move by the scheduler."""
    prediction = prediction.astype(jnp.float32)
    if conditioning.negative_prompt_embeds is not None:
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
        precision=decided,
    )
    return dataclasses.replace(state, latents=latents, scheduler=scheduler), trace


def prepare(
    transformer: CogVideoXTransformer3DModel,
    schedule: Schedule,
    guidance_scale: PerStep,
    latents: Float32[Array, "..."],
    conditioning: Conditioning,
    policy: PrecisionPolicy | None,
) -> tuple[SamplerState, StepInputs]:
    """The carry before the first step, and the rows to scan over.

    Args:
        transformer: the denoiser.
        schedule: from `schedulers.make_schedule`.
        guidance_scale: one scale a step.
        latents: starting noise, [batch, frames, channels, height, width].
        conditioning: text features and keys.
        policy: None runs the model as it is.

    Raises:
        ArgumentError: if the policy does not fit the model.
    """
    precision = None
    if policy is not None:
        guided = conditioning.negative_prompt_embeds is not None
        text = conditioning.prompt_embeds.shape[1]
        precision = init_state(policy, transformer, latents.shape, text, guided)
    scheduler = schedulers.init_state(schedule, latents)
    state = SamplerState(latents=latents, scheduler=scheduler, precision=precision)
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
    policy: PrecisionPolicy | None = None,
    on_step: Callable[[jax.Array], None] | None = None,
) -> tuple[Float32[Array, "batch frames channels height width"], Trace]:
    """Runs every step of a schedule in one compiled program.

    Compiles once per shape, schedule kind, guidance on or off, kind of policy (its thresholds may change), and
    `on_step`. Works under vmap (over keys, latents, guidance or prompts) and with sharded arguments.

    Args:
        transformer: the denoiser.
        schedule: from `schedulers.make_schedule`.
        guidance_scale: one scale a step, from `schedulers.guidance_schedule`.
        latents: starting noise.
        conditioning: text features and keys.
        policy: which precision each linear takes and which blocks are skipped; None runs the model as it is.
        on_step: called on the host, in order, with the index of each finished step. Keep one function object for
            many calls: it is part of the compilation key. Not with arguments on several devices: JAX keeps callbacks in
            order on one alone.

    Returns:
        The denoised latents and the trace of every step.

    Raises:
        ArgumentError: if the policy does not fit the model; while it is traced.
    """
    model = transformer.merge()

    def body(state: SamplerState, inputs: StepInputs) -> tuple[SamplerState, Trace]:
        state, trace = step(model, state, inputs, conditioning, policy=policy, steps=len(schedule.timesteps))
        if on_step is not None:
            # The dependency on the trace holds the report back until the step's latents exist.
            jax.debug.callback(on_step, inputs.index + 0 * trace.finite.any().astype(jnp.int32), ordered=True)
        return state, trace

    state, trace = jax.lax.scan(body, *prepare(model, schedule, guidance_scale, latents, conditioning, policy))
    return state.latents, trace


@jax.jit(static_argnames="steps")
def _jitted_step(
    transformer: Split[CogVideoXTransformer3DModel],
    state: SamplerState,
    inputs: StepInputs,
    conditioning: Conditioning,
    policy: PrecisionPolicy | None,
    *,
    steps: int,
) -> tuple[SamplerState, Trace]:
    return step(transformer.merge(), state, inputs, conditioning, policy=policy, steps=steps)


def sample_python_loop(
    transformer: Split[CogVideoXTransformer3DModel],
    schedule: Schedule,
    guidance_scale: PerStep,
    latents: Float32[Array, "batch frames channels height width"],
    conditioning: Conditioning,
    *,
    policy: PrecisionPolicy | None = None,
) -> tuple[Float32[Array, "batch frames channels height width"], Trace]:
    """`sample` as a Python loop over the same step, for looking at states between steps and for testing the scan.

    Args:
        transformer: as in `sample`, like all that follow.
        schedule: with one row a step.
        guidance_scale: one scale a step.
        latents: starting noise.
        conditioning: text features and keys.
        policy: None runs the model as it is.

    Returns:
        The denoised latents and the trace of every step.
    """
    steps = len(schedule.timesteps)
    state, inputs = prepare(transformer.merge(), schedule, guidance_scale, latents, conditioning, policy)
    traces = []
    for index in range(steps):
        row = jax.tree.map(lambda x, i=index: x[i], inputs)
        state, trace = _jitted_step(transformer, state, row, conditioning, policy, steps=steps)
        traces.append(trace)
    return state.latents, jax.tree.map(lambda *rows: jnp.stack(rows), *traces)
