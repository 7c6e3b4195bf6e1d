"""Writes the scheduler references: trajectories of diffusers' two CogVideoX schedulers under synthetic model outputs.

Run as a script in the parity environment. The noise that DPM would draw is replaced by named values.
"""

from unittest import mock

import common
import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.schedulers import scheduling_dpm_cogvideox

SHAPE = (2, 3, 2, 5)
BASE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
VARIANTS = {
    "2b": {"snr_shift_scale": 3.0},
    "5b": {},
    "linspace": {"timestep_spacing": "linspace", "set_alpha_to_one": False},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": True},
    "epsilon": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "sample": {"prediction_type": "sample", "snr_shift_scale": 3.0},
}
CASES = {
    f"{kind}-{variant}-{steps}": ({"_class_name": f"CogVideoX{kind.upper()}Scheduler", **BASE, **changes}, steps)
    for kind in ("ddim", "dpm")
    for variant, changes in VARIANTS.items()
    for steps in (10, 50)
}


def trajectory(config: dict, steps: int) -> dict[str, np.ndarray]:
    """Timesteps, latents before and after each step, and each step's estimate of the clean sample."""
    kind = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler}
    scheduler = kind[config["_class_name"]].from_config(config)
    scheduler.set_timesteps(steps)
    latents, old = torch.from_numpy(common.values("latents", SHAPE)), None
    path, estimates = [latents], []
    for i, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(common.values(f"output.{i}", SHAPE))
        if isinstance(scheduler, CogVideoXDPMScheduler):
            noise = torch.from_numpy(common.values(f"noise.{i}", SHAPE))
            with mock.patch.object(scheduling_dpm_cogvideox, "randn_tensor", lambda *a, noise=noise, **k: noise):
                back = scheduler.timesteps[i - 1] if i else None
                latents, old = scheduler.step(output, old, t, back, latents)
        else:
            latents, old = scheduler.step(output, t, latents, return_dict=False)
        path.append(latents)
        estimates.append(old)
    return {
        "timesteps": scheduler.timesteps.numpy(),
        "latents": torch.stack(path).numpy(),
        "estimates": torch.stack(estimates).numpy(),
    }


def forward_process(config: dict) -> dict[str, np.ndarray]:
    """Alphas, and noised samples and velocities at a spread of timesteps."""
    scheduler = CogVideoXDDIMScheduler.from_config(config)
    t = torch.tensor([0, 999])
    x0, noise = (torch.from_numpy(common.values(name, SHAPE)) for name in ("x0", "noise"))
    return {
        "alphas": scheduler.alphas_cumprod.numpy(),
        "noised": scheduler.add_noise(x0, noise, t).numpy(),
        "velocity": scheduler.get_velocity(x0, noise, t).numpy(),
    }


def main() -> None:
    outputs = {}
    for case, (config, steps) in CASES.items():
        outputs |= {f"{case}/{name}": value for name, value in trajectory(config, steps).items()}
    outputs |= {f"2b/{name}": value for name, value in forward_process(CASES["ddim-2b-10"][0]).items()}
    common.save(
        "schedulers", config={k: {"scheduler": c, "steps": n} for k, (c, n) in CASES.items()}, shapes={}, **outputs
    )


if __name__ == "__main__":
    main()
