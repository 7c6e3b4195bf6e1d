"""CogVideoX DDIM and DPM sampling as a table of coefficients made on the host and one linear step on the device.

Both solvers are linear in the sample, the model output, the previous estimate and the noise, so everything that
depends on the configuration is computed once in NumPy float64, and a step is the same few multiply-adds for every
prediction type. Notation: x = sample at t, o = model output, x0 = estimate of the clean sample, a = cumulative product
of alphas at t, a_prev = that after the step.

Sources: `CogVideoXDDIMScheduler` and `CogVideoXDPMScheduler` of diffusers; DDIM (arXiv:2010.02502), DPM-Solver++ 2M in
its SDE form (arXiv:2211.01095), zero terminal SNR (arXiv:2305.08891), v-prediction (arXiv:2202.00512).
`clip_sample`, `clip_sample_range` and `sample_max_value` are in the published files, but neither scheduler of diffusers
reads them when it steps; the same holds here.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Integer, Key

from sixbit_jax.config import ConfigError, SchedulerConfig
from sixbit_jax.errors import ArgumentError

_Alphas = Float[Array, " train_steps"] | Float[np.ndarray, " train_steps"]


@flax.struct.dataclass(kw_only=True)
class Schedule:
    """One row per sampling step, to be scanned over: every array has shape [T], or [] in a single row.

    Attributes:
        timesteps: int32, descending; what the model is told.
        x0_sample, x0_output, x0_scale: float32; x0 = (x0_sample * x + x0_output * o) * x0_scale.
        blend_new, blend_old: float32; the estimate stepped to is blend_new * x0 + blend_old * (x0 of the last step).
            1 and 0 where a step is first order: DDIM, and the first and last step of DPM.
        next_sample, next_x0, next_noise: float32; next x = next_sample * x + next_x0 * estimate + next_noise * noise.
        stochastic: static; True for DPM, whose step draws noise and remembers the last x0.
    """

    timesteps: Int32[Array, "*steps"]
    x0_sample: Float32[Array, "*steps"]
    x0_output: Float32[Array, "*steps"]
    x0_scale: Float32[Array, "*steps"]
    blend_new: Float32[Array, "*steps"]
    blend_old: Float32[Array, "*steps"]
    next_sample: Float32[Array, "*steps"]
    next_x0: Float32[Array, "*steps"]
    next_noise: Float32[Array, "*steps"]
    stochastic: bool = flax.struct.field(pytree_node=False)

    def row(self, index: int) -> "Schedule":
        """The row of step `index`, as `jax.lax.scan` would hand it to its body."""
        return jax.tree.map(lambda column: column[index], self)


@flax.struct.dataclass(kw_only=True)
class SchedulerState:
    """What a solver carries from step to step.

    Attributes:
        old_pred_original_sample: x0 of the last step, shape of the latents, float32 (zeros before the first step, whose
            coefficient for it is 0); None, which adds nothing to the pytree, when the schedule is not stochastic.
    """

    old_pred_original_sample: Float[Array, "..."] | None


def alphas_cumprod(config: SchedulerConfig) -> Float[np.ndarray, " train_steps"]:
    """Cumulative product of alphas for every training timestep, after the SNR shift and the zero-SNR rescaling.

    Returns:
        [num_train_timesteps] float64, decreasing in (0, 1), the last exactly 0 with `rescale_betas_zero_snr`.
    """
    steps = config.num_train_timesteps
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return alphas


def _timesteps(config: SchedulerConfig, num_inference_steps: int) -> np.ndarray:
    """The training timesteps visited, [T] int64, descending.

    "trailing" spacing is cut to T entries: for 62 step counts (61, 103, ...) rounding in `arange` makes diffusers
    append a step at timestep -1, which reads the noisiest alpha for the cleanest sample.
    """
    if not 1 <= num_inference_steps <= config.num_train_timesteps:
        raise ArgumentError(
            f"{num_inference_steps=} must be between 1 and num_train_timesteps={config.num_train_timesteps}"
        )
    train = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        steps = np.linspace(0, train - 1, num_inference_steps).round()[::-1]
    elif config.timestep_spacing == "leading":
        steps = np.arange(num_inference_steps)[::-1] * (train // num_inference_steps) + config.steps_offset
    else:
        steps = np.arange(train, 0, -train / num_inference_steps)[:num_inference_steps].round() - 1
    steps = steps.astype(np.int64)
    if steps[0] >= train or steps[-1] < 0:
        raise ConfigError(
            f"SchedulerConfig: steps_offset={config.steps_offset} moves the timesteps to {steps[-1]}..{steps[0]}, "
            f"outside 0..{train - 1}, for {num_inference_steps=}"
        )
    return steps


def make_schedule(config: SchedulerConfig, num_inference_steps: int) -> Schedule:
    """Computes every coefficient of a sampling run on the host.

    Args:
        config: either scheduler.
        num_inference_steps: T, at least 1 and at most `num_train_timesteps`.

    Raises:
        ArgumentError: on a number of steps outside that range.
        ConfigError: if `steps_offset` leaves the training range, or a coefficient is not finite (epsilon-prediction
            visiting a timestep of zero SNR, where the clean sample cannot be recovered from the noise).
    """
    timesteps = _timesteps(config, num_inference_steps)
    table = alphas_cumprod(config)
    previous = timesteps - config.num_train_timesteps // num_inference_steps
    final = 1.0 if config.set_alpha_to_one else table[0]
    a, a_prev = table[timesteps], np.where(previous >= 0, table[previous], final)
    stochastic = config.class_name == "CogVideoXDPMScheduler"
    zero, one = np.zeros_like(a), np.ones_like(a)

    with np.errstate(divide="ignore", invalid="ignore"):
        match config.prediction_type:
            case "epsilon":
                x0_sample, x0_output, x0_scale = one, -np.sqrt(1 - a), 1 / np.sqrt(a)
            case "sample":
                x0_sample, x0_output, x0_scale = zero, one, one
            case _:  # "v_prediction"
                x0_sample, x0_output, x0_scale = np.sqrt(a), -np.sqrt(1 - a), one
        spread = np.sqrt((1 - a_prev) / (1 - a))
        if stochastic:
            # Half log-SNR: -inf at zero SNR and +inf at a_prev = 1. Both limits are exact in the multipliers below.
            half_log_snr, next_half_log_snr = np.log(np.sqrt(a / (1 - a))), np.log(np.sqrt(a_prev / (1 - a_prev)))
            h = next_half_log_snr - half_log_snr
            first_order = (np.arange(len(a)) == 0) | (previous < 0)
            extrapolation = np.where(first_order, 0, h / (2 * np.diff(half_log_snr, prepend=np.nan)))
            next_sample, next_x0 = spread * np.exp(-h), -np.expm1(-2 * h) * np.sqrt(a_prev)
            next_noise = np.sqrt(1 - a_prev) * np.sqrt(1 - np.exp(-2 * h))
        else:
            extrapolation = zero
            next_sample, next_x0, next_noise = spread, np.sqrt(a_prev) - np.sqrt(a) * spread, zero

    columns = {
        "x0_sample": x0_sample,
        "x0_output": x0_output,
        "x0_scale": x0_scale,
        "blend_new": 1 + extrapolation,
        "blend_old": -extrapolation,
        "next_sample": next_sample,
        "next_x0": next_x0,
        "next_noise": next_noise,
    }
    infinite = ~np.isfinite(list(columns.values())).all(axis=0)
    if infinite.any():
        raise ConfigError(
            f"SchedulerConfig: no finite step exists at timestep(s) {timesteps[infinite].tolist()} with "
            f"prediction_type={config.prediction_type!r} and rescale_betas_zero_snr={config.rescale_betas_zero_snr}; "
            "a timestep of zero SNR needs v_prediction or sample"
        )
    return Schedule(
        timesteps=jnp.asarray(timesteps, jnp.int32),
        stochastic=stochastic,
        **{name: jnp.asarray(column, jnp.float32) for name, column in columns.items()},
    )


def guidance_schedule(
    scale: float,
    timesteps: Integer[Array, " T"] | Integer[np.ndarray, " T"],
    num_inference_steps: int,
    use_dynamic_cfg: bool,
) -> Float32[Array, " T"]:
    """Classifier-free guidance scale of every step, as `CogVideoXPipeline` computes it.

    Guidance is on when `scale > 1`; otherwise every entry is 1, with which guidance changes nothing and the
    unconditional half of the batch need not be computed. The dynamic form is
    1 + scale (1 - cos(pi ((T - t) / T)^5)) / 2 with t the training timestep and T the number of inference steps.

    Args:
        scale: the user's guidance scale.
        timesteps: of `Schedule.timesteps`, concrete.
        num_inference_steps: T.
        use_dynamic_cfg: whether the scale follows the timestep.

    Returns:
        [T] float32.
    """
    timesteps = np.asarray(timesteps)
    if scale <= 1:
        return jnp.ones(len(timesteps), jnp.float32)
    if not use_dynamic_cfg:
        return jnp.full(len(timesteps), scale, jnp.float32)
    progress = (num_inference_steps - timesteps.astype(np.float64)) / num_inference_steps
    return jnp.asarray(1 + scale * (1 - np.cos(np.pi * progress**5)) / 2, jnp.float32)


def init_state(schedule: Schedule, latents: Float[Array, "*shape"]) -> SchedulerState:
    """The state before the first step.

    Args:
        schedule: that will be stepped through.
        latents: of the shape and dtype of all that follow.
    """
    return SchedulerState(old_pred_original_sample=jnp.zeros_like(latents) if schedule.stochastic else None)


def step(
    row: Schedule,
    model_output: Float[Array, "*shape"],
    state: SchedulerState,
    latents: Float[Array, "*shape"],
    key: Key[Array, ""] | None = None,
    *,
    noise: Float[Array, "*shape"] | None = None,
) -> tuple[Float[Array, "*shape"], SchedulerState]:
    """One denoising step.

    Args:
        row: one row of a `Schedule`.
        model_output: float32, the (guided) prediction at `row.timesteps`.
        state: from `init_state` or the last step.
        latents: float32, the sample at `row.timesteps`.
        key: of a stochastic schedule's noise; not read otherwise.
        noise: float32 standard normal values to use instead of drawing from `key`.

    Returns:
        The less noisy latents and the next state, in the dtype and shape of `latents`.

    Raises:
        ValueError: if the schedule is stochastic and neither `key` nor `noise` is given.
    """
    x0 = (row.x0_sample * latents + row.x0_output * model_output) * row.x0_scale
    if not row.stochastic:
        return row.next_sample * latents + row.next_x0 * x0, state
    if noise is None:
        if key is None:
            raise ValueError("step: a stochastic (DPM) schedule needs `key` or `noise`")
        noise = jax.random.normal(key, latents.shape, latents.dtype)
    assert state.old_pred_original_sample is not None
    estimate = row.blend_new * x0 + row.blend_old * state.old_pred_original_sample
    latents = row.next_sample * latents + row.next_x0 * estimate + row.next_noise * noise
    return latents, SchedulerState(old_pred_original_sample=x0)


def _signal_and_noise(alphas: _Alphas, t: Int[Array, "*batch"], like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(a) and sqrt(1 - a) at `t`, with trailing axes added to broadcast against `like`."""
    a = jnp.asarray(alphas, like.dtype)[t].reshape(t.shape + (1,) * (like.ndim - t.ndim))
    return jnp.sqrt(a), jnp.sqrt(1 - a)


def add_noise(
    alphas_cumprod: _Alphas, x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], t: Int[Array, "*batch"]
) -> Float[Array, "*shape"]:
    """The forward process: sqrt(a_t) x0 + sqrt(1 - a_t) noise.

    Args:
        alphas_cumprod: from `alphas_cumprod(config)`.
        x0: clean sample.
        noise: standard normal, as `x0`.
        t: training timesteps, of the leading axes of `x0` (one per example), or a scalar.
    """
    signal, sigma = _signal_and_noise(alphas_cumprod, t, x0)
    return signal * x0 + sigma * noise


def get_velocity(
    alphas_cumprod: _Alphas, x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], t: Int[Array, "*batch"]
) -> Float[Array, "*shape"]:
    """The v-prediction target sqrt(a_t) noise - sqrt(1 - a_t) x0.

    Args:
        alphas_cumprod: as in `add_noise`, like all that follow.
        x0: clean sample.
        noise: standard normal, as `x0`.
        t: training timesteps.
    """
    signal, sigma = _signal_and_noise(alphas_cumprod, t, x0)
    return signal * noise - sigma * x0
