"""Calibration: what a model's blocks do over a run and what each route costs them, measured once and kept in one file.

`calibrate` runs prompts on the 16-bit route of the quantised model and measures (`precision/measuring.py`), fits the
router's predictor, and then runs some of the prompts at a grid of operating points, which `precision/targets.py` needs
to know what its simulations miss, and what PSNR to expect. The result and its file are in `precision/calibration.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sixbit_jax import metrics
from sixbit_jax.errors import ArgumentError
from sixbit_jax.pipeline import Pipeline, prompt_list
from sixbit_jax.precision import PrecisionPolicy, measuring
from sixbit_jax.precision.accounting import site_weights, summary
from sixbit_jax.precision.calibration import Calibration, Fingerprint, OperatingPoints, fit
from sixbit_jax.precision.measuring import LOW_BIT, Measured
from sixbit_jax.precision.targets import (
    QuantizationConfig,
    Simulator,
    bisect,
    largest_change,
    policy_of,
    with_thresholds,
)
from sixbit_jax.sampling import sampler

__all__ = ["Calibration", "calibrate", "read_prompts", "work"]

MOST = 100.0
"""dB of two videos that are the same."""
SKIP_LEVELS = (0.0, 0.25, 0.5, 0.95)
"""Of the operating points: skip share, as a part of the largest possible."""
ROUTE_LEVELS = (0.0, 0.5, 1.0)
"""Of the operating points: share of the predicted errors that the router's threshold lets pass to NVFP4."""


def calibrate(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    seed: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    points: int = 4,
    cache_format: str = "int8",
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Measures a model on prompts, each video alone, the first of `seed`, the second of its next position, and so on.

    Args:
        pipe: its transformer is quantised as `QuantizationConfig` has it by default, unless it is already.
        prompts: typical of what will be generated; a dozen is a start, the paper takes 100.
        num_inference_steps, guidance_scale: of the runs that will be made.
        seed: of the noise.
        num_frames, height, width: of the runs that will be made; None for the model's own size.
        points: how many of the prompts are run at each operating point; 0 measures none, and targets then rest on
            simulation alone.
        cache_format: of the delta cache in those runs.
        progress: called with what has been done, after each of `work(prompts, points)` runs.

    Raises:
        ArgumentError: on a bad argument.
    """
    prompts = prompt_list("prompts", prompts)
    if points < 0:
        raise ArgumentError(f"{points=} must not be negative")
    if num_inference_steps < 2:
        raise ArgumentError(f"{num_inference_steps=} must be at least 2: the predictor looks one step back")
    config = QuantizationConfig(activations="16bit", cache_format=cache_format)
    pipe = pipe.quantized()
    report = progress or (lambda what: None)
    size = num_frames, height, width = pipe.size(num_frames=num_frames, height=height, width=width)
    run_inputs = pipe.separate_runs(
        prompts, size, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed
    )

    def seen(latents: np.ndarray) -> np.ndarray:
        return latents if pipe.vae is None else pipe.decode(jnp.asarray(latents), num_frames)

    traces, references = [], []
    for index in range(len(prompts)):
        latents, measured = jax.device_get(measuring.sample(pipe.transformer, *run_inputs(index)))
        finite = measured.replace(delta_change=measured.delta_change[1:])
        for field in dataclasses.fields(Measured):
            if not np.isfinite(getattr(finite, field.name)).all():
                raise ArgumentError(
                    f"{field.name} became NaN or Inf with {prompts[index]!r}; calibrate in a wider dtype"
                )
        traces.append(measured)
        if index < points:
            references.append(seen(latents))
        report("measured")
    trace = jax.tree.map(lambda *values: np.stack(values), *traces)
    fitted = fit(trace.volatility, trace.error[..., LOW_BIT.index("nvfp4")])
    made = Calibration(
        alpha=fitted["alpha"],
        beta=fitted["beta"],
        correlation=fitted["correlation"],
        site_correlation=fitted["site_correlation"],
        trace=jax.tree.map(_half, trace),
        points=OperatingPoints.none(),
        fingerprint=Fingerprint.of(pipe.transformer),
        prompts=tuple(prompts),
        settings={
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "scheduler": pipe.scheduler.to_dict(),
            "dtype": pipe.transformer.merge().dtype.name,
            "points": min(points, len(prompts)),
            "points_cache_format": cache_format,
        },
    )
    if not references:
        return made

    def measure(policy: PrecisionPolicy) -> tuple[float, float, float]:
        """Mean bits, skip share and PSNR of runs under a policy, mean over prompts."""
        found = []
        for index, reference in enumerate(references):
            latents, ran = jax.device_get(sampler.sample(pipe.transformer, *run_inputs(index), policy=policy))
            spent = summary(ran.precision.bits, site_weights(made.transformer_config))
            found.append((spent.mean_bits, spent.skip_share, psnr(seen(latents), reference)))
            report("ran")
        return tuple(np.mean(found, axis=0))

    return dataclasses.replace(made, points=_operating_points(made, config, num_inference_steps, measure))


def work(prompts: int, points: int) -> int:
    """How many runs `calibrate` makes.

    Args:
        prompts: number of prompts.
        points: as there.
    """
    return prompts + min(prompts, points) * len(SKIP_LEVELS) * len(ROUTE_LEVELS)


def _operating_points(
    calibration: Calibration,
    config: QuantizationConfig,
    steps: int,
    measure: Callable[[PrecisionPolicy], tuple[float, ...]],
) -> OperatingPoints:
    """Solves for each point of the grid by simulation alone, and measures there."""
    simulator = Simulator(calibration, steps)
    routed = dataclasses.replace(config, activations="routed", error_threshold=0.0)
    grid = np.zeros((5, len(SKIP_LEVELS), len(ROUTE_LEVELS)))
    for i, share in enumerate(SKIP_LEVELS):
        policy = policy_of(routed, calibration, skips=share > 0)
        for j, error in enumerate(simulator.predicted(*ROUTE_LEVELS)):

            def skipped(threshold: float, policy: PrecisionPolicy = policy, error: float = error) -> float:
                return simulator.raw(with_thresholds(policy, skip=threshold, error=error)).skip_share

            most = largest_change(config)
            skip = bisect(skipped, (0.0, most), share * skipped(most), "target_skip") if share else 0.0
            grid[:, i, j] = error, skip, *measure(with_thresholds(policy, skip=skip, error=error))
    return OperatingPoints(
        error_threshold=grid[0], skip_threshold=grid[1], mean_bits=grid[2], skip_share=grid[3], psnr=grid[4]
    )


def _half(values: np.ndarray) -> np.ndarray:
    """float16; what is beyond its range becomes its largest number, infinities stay."""
    return np.where(np.isinf(values), values, np.minimum(values, 65504)).astype(np.float16)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """dB, at most `MOST`: of 8-bit video, or of latents, whose peak is the largest magnitude of `wanted`."""
    if wanted.dtype == np.uint8:
        return min(MOST, float(metrics.psnr(found, wanted).mean()))
    squared = np.mean((found.astype(np.float64) - wanted) ** 2)
    return MOST if squared == 0 else min(MOST, 10 * math.log10(float(np.abs(wanted).max()) ** 2 / squared))


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines are left out.

    Raises:
        ArgumentError: if there is none, or the file is not UTF-8 text.
        OSError: if the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ArgumentError(f"{path}: holds no prompt; write one a line")
    return prompts
