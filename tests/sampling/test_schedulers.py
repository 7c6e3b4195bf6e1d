"""The schedule tables and the step as pure functions: exact identities, limits, transformations, bad input."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sixbit_jax.config import ConfigError, SchedulerConfig
from sixbit_jax.sampling import schedulers

DDIM = SchedulerConfig(
    prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
)
DPM = dataclasses.replace(DDIM, class_name="CogVideoXDPMScheduler", snr_shift_scale=1.0)
SHAPE = (2, 3, 4)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def run(schedule, latents, key):
    """A scan in which the "model" is a fixed nonlinear function."""

    def body(carry, inputs):
        latents, state = carry
        row, key = inputs
        latents, state = schedulers.step(row, jnp.sin(latents), state, latents, key)
        return (latents, state), latents

    steps = len(schedule.timesteps)
    carry = latents, schedulers.init_state(schedule, latents)
    return jax.lax.scan(body, carry, (schedule, jax.random.split(key, steps)))[1]


@pytest.mark.parametrize("change", [{"beta_schedule": "linear"}, {"trained_betas": (0.1, 0.2)}])
def test_betas_of_another_kind_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(DDIM, **change)


@pytest.mark.parametrize("config", [DDIM, DPM], ids=["ddim", "dpm"])
def test_scan_equals_python_loop(config):
    schedule = schedulers.make_schedule(config, 5)
    latents, key = normal(0), jax.random.key(1)
    state = schedulers.init_state(schedule, latents)
    step = jax.jit(lambda row, state, x, key: schedulers.step(row, jnp.sin(x), state, x, key))
    scanned = run(schedule, latents, key)
    for i, step_key in enumerate(jax.random.split(key, 5)):
        latents, state = step(schedule.row(i), state, latents, step_key)
        # Two compilations of the same arithmetic: a few float32 roundings apart.
        np.testing.assert_allclose(scanned[i], latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [DDIM, DPM], ids=["ddim", "dpm"])
def test_vmap_equals_separate_runs(config):
    schedule = schedulers.make_schedule(config, 5)
    latents, keys = normal(0, (3, *SHAPE)), jax.random.split(jax.random.key(1), 3)
    together = jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))(schedule, latents, keys)
    for i in range(3):
        np.testing.assert_allclose(together[i], run(schedule, latents[i], keys[i]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [DDIM, DPM], ids=["ddim", "dpm"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("alpha_to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 1000])
def test_every_coefficient_is_finite(config, spacing, alpha_to_one, steps):
    config = dataclasses.replace(config, timestep_spacing=spacing, set_alpha_to_one=alpha_to_one)
    schedule = schedulers.make_schedule(config, steps)
    for leaf in jax.tree.leaves(schedule):
        assert leaf.shape == (steps,)
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("config", [DDIM, DPM], ids=["ddim", "dpm"])
def test_perfect_model_recovers_the_clean_sample(config):
    """With the true velocity at every step, the first estimate of x0 and the end of the run are x0."""
    alphas, schedule = schedulers.alphas_cumprod(config), schedulers.make_schedule(config, 5)
    x0, latents = normal(0), normal(1)
    state = schedulers.init_state(schedule, latents)
    for i, key in enumerate(jax.random.split(jax.random.key(2), 5)):
        a = jnp.float32(alphas[schedule.timesteps[i]])
        noise = (latents - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        velocity = schedulers.get_velocity(alphas, x0, noise, schedule.timesteps[i])
        latents, state = schedulers.step(schedule.row(i), velocity, state, latents, key)
    # x0 is recovered through float32 square roots: about ten roundings of 6e-8.
    np.testing.assert_allclose(latents, x0, rtol=0, atol=2e-6)


def test_last_step_lands_on_the_estimate_and_first_ignores_zero_snr_sample():
    for config in (DDIM, DPM):
        schedule = schedulers.make_schedule(config, 10)
        assert schedule.x0_sample[0] == 0
        assert schedule.x0_output[0] == -1
        assert (schedule.next_sample[-1], schedule.next_x0[-1], schedule.next_noise[-1]) == (0, 1, 0)
        assert (schedule.blend_new[0], schedule.blend_old[0]) == (1, 0)
        assert (schedule.blend_new[-1], schedule.blend_old[-1]) == (1, 0)


def test_dpm_extrapolates_between_first_and_last_step():
    schedule = schedulers.make_schedule(DPM, 10)
    np.testing.assert_allclose(schedule.blend_new + schedule.blend_old, 1, atol=1e-6)
    # The step after the one at zero SNR looks back over an infinite log-SNR distance: no extrapolation.
    assert schedule.blend_old[1] == 0
    assert (np.asarray(schedule.blend_old)[2:-1] < -0.1).all()
    # With x0 = 0 the sample is all noise, and a step must turn its variance 1 - a into 1 - a_prev.
    alphas = schedulers.alphas_cumprod(DPM)
    t = np.asarray(schedule.timesteps)
    kept = np.asarray(schedule.next_sample) ** 2 * (1 - alphas[t]) + np.asarray(schedule.next_noise) ** 2
    np.testing.assert_allclose(kept[:-1], 1 - alphas[t[:-1] - 100], rtol=1e-5)


@pytest.mark.parametrize("config", [DDIM, DPM], ids=["ddim", "dpm"])
def test_first_row_at_pure_noise_is_float32_and_int32(config):
    schedule = schedulers.make_schedule(config, 3)
    assert schedule.timesteps.dtype == jnp.int32
    assert schedule.next_noise.dtype == jnp.float32
    latents, state = schedulers.step(
        schedule.row(0), normal(0), schedulers.init_state(schedule, normal(1)), normal(1), jax.random.key(0)
    )
    assert latents.dtype == jnp.float32
    assert (state.old_pred_original_sample is None) == (config is DDIM)


def test_dpm_noise_comes_from_the_key():
    row, state = schedulers.make_schedule(DPM, 4).row(1), schedulers.SchedulerState(old_pred_original_sample=normal(2))
    key = jax.random.key(7)
    drawn, _ = schedulers.step(row, normal(0), state, normal(1), key)
    given, _ = schedulers.step(row, normal(0), state, normal(1), noise=jax.random.normal(key, SHAPE))
    other, _ = schedulers.step(row, normal(0), state, normal(1), jax.random.key(8))
    np.testing.assert_array_equal(drawn, given)
    assert np.abs(drawn - other).max() > 0.1
    with pytest.raises(ValueError, match="needs `key` or `noise`"):
        schedulers.step(row, normal(0), state, normal(1))


def test_timesteps():
    timesteps = {
        spacing: schedulers.make_schedule(dataclasses.replace(DDIM, timestep_spacing=spacing), 4).timesteps.tolist()
        for spacing in ("trailing", "linspace", "leading")
    }
    assert timesteps == {
        "trailing": [999, 749, 499, 249],
        "linspace": [999, 666, 333, 0],
        "leading": [750, 500, 250, 0],
    }
    # 1000 / 61 rounds so that arange yields a 62nd value, which would become timestep -1.
    assert schedulers.make_schedule(DDIM, 61).timesteps.shape == (61,)
    assert schedulers.make_schedule(DDIM, 61).timesteps[-1] == 15


def test_guidance_schedule():
    schedule = schedulers.make_schedule(DDIM, 50)
    np.testing.assert_array_equal(schedulers.guidance_schedule(6.0, schedule.timesteps, 50, False), np.full(50, 6.0))
    for scale in (1.0, 0.5):
        np.testing.assert_array_equal(schedulers.guidance_schedule(scale, schedule.timesteps, 50, True), np.ones(50))
    dynamic = schedulers.guidance_schedule(6.0, schedule.timesteps, 50, True)
    assert dynamic.dtype == np.float32
    for t, found in zip(schedule.timesteps.tolist(), dynamic, strict=True):
        wanted = 1 + 6.0 * ((1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2)
        # The phase reaches 8e6 radians, where one float64 rounding of the power moves the cosine by 1e-9.
        assert found == pytest.approx(wanted, abs=1e-6)


def test_zero_terminal_snr_and_shift():
    assert schedulers.alphas_cumprod(DDIM)[-1] == 0
    plain = dataclasses.replace(DDIM, rescale_betas_zero_snr=False, snr_shift_scale=1.0)
    alphas = schedulers.alphas_cumprod(plain)
    assert alphas[-1] == pytest.approx(0.0047, abs=1e-4)
    shifted = schedulers.alphas_cumprod(dataclasses.replace(plain, snr_shift_scale=3.0))
    np.testing.assert_allclose(shifted / (1 - shifted), alphas / (1 - alphas) / 3, rtol=1e-9)


def test_forward_process_per_example_and_gradient():
    alphas = schedulers.alphas_cumprod(DDIM)
    x0, noise, t = normal(0), normal(1), jnp.array([0, 999])
    noised = schedulers.add_noise(alphas, x0, noise, t)
    np.testing.assert_array_equal(noised[1], noise[1])
    np.testing.assert_array_equal(schedulers.get_velocity(alphas, x0, noise, t)[1], -x0[1])
    np.testing.assert_allclose(noised[0], schedulers.add_noise(alphas, x0[0], noise[0], t[0]), rtol=1e-6)
    gradient = jax.grad(lambda x: schedulers.add_noise(alphas, x, noise, t).sum())(x0)
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be between 1 and num_train_timesteps=1000"):
        schedulers.make_schedule(DDIM, steps)


@pytest.mark.parametrize("config", [DDIM, DPM], ids=["ddim", "dpm"])
def test_epsilon_at_zero_snr_is_refused(config):
    epsilon = dataclasses.replace(config, prediction_type="epsilon")
    with pytest.raises(ConfigError, match=r"timestep\(s\) \[999\] with prediction_type='epsilon'"):
        schedulers.make_schedule(epsilon, 10)
    schedulers.make_schedule(dataclasses.replace(epsilon, timestep_spacing="leading"), 10)


def test_offset_out_of_range():
    config = dataclasses.replace(DDIM, timestep_spacing="leading", steps_offset=101)
    with pytest.raises(ConfigError, match="steps_offset=101"):
        schedulers.make_schedule(config, 10)
