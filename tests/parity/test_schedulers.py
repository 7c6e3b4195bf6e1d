"""Scheduler steps against diffusers' float32 ones.

Tolerance 1e-6 relative L2: both sides make the coefficients in float64, so what differs is the rounding of a few
float32 multiply-adds (6e-8 each). A coefficient of the wrong timestep is off by over 1e-2.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sixbit_jax.config import SchedulerConfig
from sixbit_jax.sampling import schedulers

CASES, _, REFERENCE = common.load("schedulers")
TOLERANCE = 1e-6


def name(case):
    """The row of the table: the kind of scheduler."""
    return f"scheduler_{case.split('-')[0]}"


@pytest.mark.parametrize("case", CASES)
def test_every_step_matches(parity, case):
    config, steps = SchedulerConfig.from_dict(CASES[case]["scheduler"]), CASES[case]["steps"]
    schedule = schedulers.make_schedule(config, steps)
    timesteps, latents, estimates = (REFERENCE[f"{case}/{name}"] for name in ("timesteps", "latents", "estimates"))
    np.testing.assert_array_equal(schedule.timesteps, timesteps)

    step = jax.jit(lambda row, output, state, x, noise: schedulers.step(row, output, state, x, noise=noise))
    x = jnp.asarray(latents[0])
    state = schedulers.init_state(schedule, x)
    for i in range(steps):
        output = jnp.asarray(common.values(f"output.{i}", x.shape))
        noise = jnp.asarray(common.values(f"noise.{i}", x.shape))
        found, state = step(schedule.row(i), output, state, jnp.asarray(latents[i]), noise)
        parity.exact(f"{name(case)}, a step", found, latents[i + 1], TOLERANCE)
        if schedule.stochastic:
            estimate = state.old_pred_original_sample
            parity.exact(f"{name(case)}, an estimate", estimate, estimates[i], TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_whole_run_matches(parity, case):
    """Each step fed by our own last one: the steps contract, so errors stay below twice one step's."""
    config, steps = SchedulerConfig.from_dict(CASES[case]["scheduler"]), CASES[case]["steps"]
    schedule = schedulers.make_schedule(config, steps)
    x = jnp.asarray(REFERENCE[f"{case}/latents"][0])
    outputs, noises = (
        jnp.stack([jnp.asarray(common.values(f"{name}.{i}", x.shape)) for i in range(steps)])
        for name in ("output", "noise")
    )

    def body(carry, inputs):
        x, state = carry
        row, output, noise = inputs
        return schedulers.step(row, output, state, x, noise=noise), None

    (x, _), _ = jax.lax.scan(body, (x, schedulers.init_state(schedule, x)), (schedule, outputs, noises))
    parity.exact(f"{name(case)}, a run", x, REFERENCE[f"{case}/latents"][-1], 2 * TOLERANCE)


def test_forward_process_matches():
    alphas = schedulers.alphas_cumprod(SchedulerConfig.from_dict(CASES["ddim-2b-10"]["scheduler"]))
    assert common.relative_l2(alphas, REFERENCE["2b/alphas"]) <= TOLERANCE
    noised, velocity = REFERENCE["2b/noised"], REFERENCE["2b/velocity"]
    x0, noise = (jnp.asarray(common.values(name, noised.shape)) for name in ("x0", "noise"))
    t = jnp.array([0, 999])
    assert common.relative_l2(schedulers.add_noise(alphas, x0, noise, t), noised) <= TOLERANCE
    assert common.relative_l2(schedulers.get_velocity(alphas, x0, noise, t), velocity) <= TOLERANCE
