"""From what a user wants (mean bits, a share of skipped blocks, a PSNR) to the thresholds of a policy.

A run's decisions are simulated on the trace that calibration recorded, with the very functions that decide in a run
(`routers.py`, `skippers.py`), and thresholds are bisected until the simulation spends what was asked for. Three things
a trace of an undisturbed run does not hold, and how they are modelled:

- d after a skip compares deltas that are several steps apart. Deltas are taken to move along a path whose length adds
  up over steps: d is the length between the two steps, or `SHORTCUT` of it if there is a step between them.
- Deltas computed on low-bit routes, or read from a low-bit cache, carry noise. Its measured size, site by site, is
  added to d in quadrature. INT8's is taken to be to NVFP4's as the errors of the site's product are.
- A trace of another number of steps is interpolated over the course of the run, path lengths included.

What then remains between simulation and runs was measured by calibration at a grid of operating points, and is taken
off by interpolation between them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import device
from sixbit_jax.errors import ArgumentError
from sixbit_jax.precision import delta_cache
from sixbit_jax.precision.accounting import site_weights
from sixbit_jax.precision.blocks import PrecisionPolicy
from sixbit_jax.precision.calibration import Calibration, OperatingPoints
from sixbit_jax.precision.linears import BITS
from sixbit_jax.precision.measuring import LOW_BIT, STORED, Measured
from sixbit_jax.precision.routers import ConstantRouter, CostAwareRouter, VolatilityRouter
from sixbit_jax.precision.skippers import DeltaSkipper, EveryNth, NeverSkip
from sixbit_jax.precision.types import Observation, Progress, nothing_observed
from sixbit_jax.qtensor import ROUTES

SHORTCUT = 0.93
"""Measured on the mini model: 0.92 over two steps, 0.92 to 0.95 over three."""
ALMOST = 0.005
"""Bits, or share of blocks, by which the simulation may miss a target before it counts as out of reach."""
SAME_SKIP = 0.01
"""How far an operating point's skip share may be from `target_skip` to count for it."""
BISECTIONS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How a pipeline's transformer is quantised and run: the weights of its block linears in NVFP4.

    Attributes:
        hadamard: block of the rotation, as in `quantize_model`; None for the largest that fits, 0 for none.
        four_over_six: let each block of weights take the better of two scales.
        activations: "routed" (the paper's router), or one route everywhere: "int8", "nvfp4" or "16bit".
        target_mean_bits: mean activation width, weighted by multiply-adds, skipped blocks counted as zero.
        error_threshold: of the router, instead of a target.
        target_skip: share of all blocks of all steps that are skipped; 0 for none.
        skip_threshold: of the delta cache, instead of a target.
        skip_every: n, at least 2, to skip all blocks at every n-th step instead, whatever the activations do
            (`EveryNth`); what they add together is kept in 16 bits. Without any of the three nothing is skipped.
        target_psnr: dB against the 16-bit route: the fewest bits that reach it, of what calibration measured.
        max_skips, warm_up, cool_down: of the delta cache, see `DeltaSkipper`.
        outlier_limit: of the purified refresh, see `PrecisionPolicy`; None turns it off.
        cache_format: of the deltas of single blocks: "16bit", "int8" or "nvfp4".
        carrier: what NVFP4 operands are multiplied in where there are no FP4 tensor cores: "exact" or "fp8".
        joint: decide for all videos of a batch together.
        hardware_aware: never take NVFP4 where INT8 costs no more on this device. On a GPU without FP4 tensor cores
            that leaves INT8 alone, and mean bits to be met by skipping: without a skip setting beside them.

    Raises:
        ArgumentError: on an unknown name, a value out of range, or settings that exclude each other.
    """

    hadamard: int | None = None
    four_over_six: bool = False
    activations: str = "routed"
    target_mean_bits: float | None = None
    error_threshold: float | None = None
    target_skip: float | None = None
    skip_threshold: float | None = None
    skip_every: int | None = None
    target_psnr: float | None = None
    max_skips: int = 2
    warm_up: int = 5
    cool_down: int = 2
    outlier_limit: float | None = 25.0
    cache_format: str = "int8"
    carrier: str = "exact"
    joint: bool = False
    hardware_aware: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("activations", ("routed", *ROUTES)),
            ("cache_format", delta_cache.FORMATS),
            ("carrier", ("exact", "fp8")),
        ):
            if (found := getattr(self, name)) not in known:
                raise ArgumentError(f"{name}={found!r} is not one of {', '.join(known)}")
        for name, low, high in (("target_mean_bits", 0, 16), ("target_skip", 0, 1)):
            if (found := getattr(self, name)) is not None and not low <= found <= high:
                raise ArgumentError(f"{name}={found} must be between {low} and {high}")
        routed = self.activations == "routed"
        free = self.target_skip is None and self.skip_threshold is None and self.skip_every is None
        for one, other in (
            ("target_skip", "skip_threshold"),
            ("target_skip", "skip_every"),
            ("skip_threshold", "skip_every"),
            ("target_psnr", "target_mean_bits"),
            ("target_psnr", "error_threshold"),
            ("target_psnr", "skip_threshold"),
            ("target_psnr", "skip_every"),
            ("target_mean_bits", "error_threshold"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ArgumentError(f"give {one} or {other}, not both")
        if routed and self.target_mean_bits is None and self.error_threshold is None and self.target_psnr is None:
            raise ArgumentError(
                'activations="routed" needs target_mean_bits, target_psnr or error_threshold to decide between routes'
            )
        if not routed and self.error_threshold is not None:
            raise ArgumentError(f'error_threshold is for activations="routed", not {self.activations!r}')
        if not routed and self.target_psnr is not None:
            raise ArgumentError(f'target_psnr is for activations="routed", not {self.activations!r}')
        if not routed and self.target_mean_bits is not None and not free:
            raise ArgumentError(
                f"with activations={self.activations!r}, target_mean_bits is met by skipping: give no target_skip,"
                " skip_threshold or skip_every beside it"
            )
        if self.skip_every is not None and self.skip_every < 2:
            raise ArgumentError(f"skip_every={self.skip_every} must be at least 2: a block is computed, then reused")
        if self.max_skips < 1 or self.warm_up < 1 or self.cool_down < 0:
            raise ArgumentError(
                f"max_skips={self.max_skips} and warm_up={self.warm_up} must be at least 1, cool_down={self.cool_down}"
                " at least 0"
            )

    @classmethod
    def named(cls, name: str) -> "QuantizationConfig":
        """One of `NAMED`.

        Raises:
            ArgumentError: on another name.
        """
        if name not in NAMED:
            raise ArgumentError(f"unknown quantization {name!r}; there are {', '.join(NAMED)}")
        return NAMED[name]

    @property
    def needs_calibration(self) -> bool:
        """Whether a policy cannot be built from the settings alone."""
        return self.activations == "routed" or bool(self.target_skip) or self.target_mean_bits is not None


NAMED = {
    "w4a16": QuantizationConfig(activations="16bit"),
    "int8": QuantizationConfig(activations="int8"),
    "nvfp4": QuantizationConfig(activations="nvfp4"),
    "int8-reuse": QuantizationConfig(activations="int8", skip_every=2, outlier_limit=None),
    "sixbit": QuantizationConfig(target_mean_bits=6.0, target_skip=0.3),
}
"""What `Pipeline.from_pretrained(quantization=...)` knows by name: weights only, W4A8, W4A4, W4A8 with every second
step reused, and the paper's method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run, simulated or real, spends.

    Attributes:
        mean_bits: mean activation width, skipped blocks counted as zero.
        skip_share: share of the blocks that were skipped.
    """

    mean_bits: float
    skip_share: float


@jax.jit
def simulated_bits(policy: PrecisionPolicy, trace: Measured) -> jax.Array:
    """Decides every step as a run would, on what an undisturbed run measured.

    Args:
        policy: what decides; thresholds may change without compiling again.
        trace: [steps, blocks, prompts, ...].

    Returns:
        Activation bits, uint8 [steps, blocks, prompts, sites].
    """
    steps, blocks, groups = trace.volatility.shape
    path = jnp.cumsum(jnp.asarray(trace.delta_change).at[0].set(0.0), axis=0)
    scale = trace.error / trace.error[..., LOW_BIT.index("nvfp4"), None]
    noise = [(trace.delta_error * scale[..., LOW_BIT.index(route)]) ** 2 for route in LOW_BIT]
    by_route = dict(zip(LOW_BIT, noise, strict=True)) | {"16bit": jnp.zeros_like(trace.delta_error)}
    noise = jnp.stack([by_route[route] for route in ROUTES], axis=-1)
    stored = jnp.zeros((steps, blocks, groups), jnp.float32)
    if policy.cache_format in STORED:
        stored = trace.cache_error[..., STORED.index(policy.cache_format)] ** 2

    def body(carry: tuple, step: jax.Array) -> tuple[tuple, jax.Array]:
        router, skipper, observation, last, held = carry
        progress = Progress(step=step, steps=steps)
        routes, _, router = policy.router.decide(router, observation, progress)
        skip, refresh, skipper = policy.skipper.decide(skipper, observation, progress)
        if not policy.skipper.never and policy.outlier_limit is not None:
            purified = refresh[..., None] & (trace.outlier[step] > policy.outlier_limit) & (routes < len(ROUTES) - 1)
            routes = jnp.where(purified, ROUTES.index("16bit"), routes)
        bits = jnp.where(skip[..., None], 0, jnp.asarray(BITS, jnp.int32)[routes])
        own = jnp.take_along_axis(noise[step], routes[..., None], axis=-1).sum((-2, -1))
        moved = path[step] - jnp.take_along_axis(path, last[None], axis=0)[0]
        moved = jnp.where(step - last > 1, SHORTCUT, 1.0) * moved
        change = jnp.where(step == 0, jnp.inf, jnp.sqrt(moved**2 + own + held))
        observation = Observation(
            computed=~skip,
            volatility=jnp.where(skip, jnp.nan, trace.volatility[step]),
            delta_change=jnp.where(skip, jnp.nan, change),
        )
        last, held = jnp.where(skip, last, step), jnp.where(skip, held, own + stored[step])
        return (router, skipper, observation, last, held), bits.astype(jnp.uint8)

    carry = (
        policy.router.init(blocks, groups, trace.error.shape[-2]),
        policy.skipper.init(blocks, groups),
        nothing_observed(blocks, groups),
        jnp.zeros((blocks, groups), jnp.int32),
        jnp.zeros((blocks, groups), jnp.float32),
    )
    return jax.lax.scan(body, carry, jnp.arange(steps, dtype=jnp.int32))[1]


def resampled(trace: Measured, steps: int) -> Measured:
    """A recorded trace as `simulated_bits` takes it.

    Args:
        trace: [prompts, steps, blocks, ...], as `Calibration` has it.
        steps: of the run to simulate; the trace is interpolated over its course.

    Returns:
        Float32 [steps, blocks, prompts, ...].
    """
    recorded = trace.volatility.shape[1]

    def at(values: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Rows at fractional times, linearly between the recorded ones."""
        low = np.clip(np.floor(times).astype(int), 0, recorded - 2) if recorded > 1 else np.zeros(len(times), int)
        share = (times - low).reshape(-1, *[1] * (values.ndim - 1))
        return values[low] * (1 - share) + values[np.minimum(low + 1, recorded - 1)] * share

    times = np.linspace(0, recorded - 1, steps)
    by_step = jax.tree.map(lambda v: np.moveaxis(np.asarray(v, np.float32), 0, 2), trace)
    change = by_step.delta_change.copy()
    change[0] = 0
    length = at(np.cumsum(change, axis=0), times)
    made = jax.tree.map(lambda v: at(v, times), by_step.replace(delta_change=change))
    return jax.tree.map(
        lambda v: jnp.asarray(v, jnp.float32), made.replace(delta_change=np.diff(length, axis=0, prepend=length[:1]))
    )


class Simulator:
    """What policies spend on a calibration's trace, in runs of a number of steps."""

    def __init__(self, calibration: Calibration, steps: int):
        self._trace = resampled(calibration.trace, steps)
        self._weights = tuple(site_weights(calibration.transformer_config).values())
        self._misses = misses(calibration)
        self._alpha, self._beta = calibration.alpha, calibration.beta

    def raw(self, policy: PrecisionPolicy) -> Spent:
        """As simulated."""
        return _spent(policy, self._trace, self._weights)

    def __call__(self, policy: PrecisionPolicy) -> Spent:
        """As simulated, plus what real runs at measured operating points nearby differed by."""
        found = self.raw(policy)
        bits, skip = self._misses(found)
        # Where nothing is skipped in the simulation, nothing is in a run.
        skip_share = max(0.0, found.skip_share + skip) if found.skip_share else 0.0
        return Spent(mean_bits=found.mean_bits + bits, skip_share=skip_share)

    def predicted(self, *shares: float) -> list[float]:
        """Thresholds under which those shares of the router's predictions on the trace are; 0 is below all of them."""
        volatility = np.asarray(self._trace.volatility, np.float64)[..., None]
        found = self._alpha[:, None] * volatility + self._beta[:, None]
        room = 0.01 * (found.max() - found.min()) + 1e-6
        return [float(np.quantile(found, share) + (2 * share - 1) * room) for share in shares]


def _spent(policy: PrecisionPolicy, trace: Measured, weights: tuple[float, ...]) -> Spent:
    bits = np.asarray(simulated_bits(policy, trace))
    return Spent(mean_bits=float((bits @ np.asarray(weights)).mean()), skip_share=float((bits == 0).mean()))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Misses:
    """By how much the simulation misses real runs, at some points; float64 [points].

    Attributes:
        at_bits, at_skip: what it says there.
        bits, skip: real less simulated, of the same prompts.
    """

    at_bits: np.ndarray
    at_skip: np.ndarray
    bits: np.ndarray
    skip: np.ndarray

    def __call__(self, simulated: Spent) -> tuple[float, float]:
        """(bits, skip share) to add: the mean over the points, by the inverse square of their distance."""
        if not self.at_bits.size:
            return 0.0, 0.0
        squared = ((self.at_bits - simulated.mean_bits) / 8) ** 2 + (self.at_skip - simulated.skip_share) ** 2
        share = 1 / (squared + 1e-6)
        share = share / share.sum()
        return float(share @ self.bits), float(share @ self.skip)


@functools.lru_cache(maxsize=8)
def misses(calibration: Calibration) -> Misses:
    """Simulates the calibration's operating points, on the prompts that were run there."""
    points, settings = calibration.points, calibration.settings
    found = np.zeros((points.psnr.size, 2))
    if points.psnr.size:
        few = jax.tree.map(lambda values: values[: settings["points"]], calibration.trace)
        trace = resampled(few, calibration.trace.volatility.shape[1])
        weights = tuple(site_weights(calibration.transformer_config).values())
        config = QuantizationConfig(error_threshold=0.0, cache_format=settings["points_cache_format"])
        thresholds = zip(points.skip_threshold.ravel().tolist(), points.error_threshold.ravel().tolist(), strict=True)
        for i, (skip, error) in enumerate(thresholds):
            policy = with_thresholds(policy_of(config, calibration, skips=skip > 0), skip=skip, error=error)
            found[i] = dataclasses.astuple(_spent(policy, trace, weights))
    at_bits, at_skip = found.T
    return Misses(
        at_bits=at_bits,
        at_skip=at_skip,
        bits=points.mean_bits.ravel() - at_bits,
        skip=points.skip_share.ravel() - at_skip,
    )


def solve(config: QuantizationConfig, calibration: Calibration | None, steps: int) -> PrecisionPolicy:
    """The policy whose thresholds meet a configuration's targets.

    Args:
        config: with targets or thresholds.
        calibration: of the model; not read if `config.needs_calibration` is false.
        steps: of the runs.

    Raises:
        ArgumentError: if there is no calibration and one is needed, or a target cannot be met; then it says what can.
    """
    if not config.needs_calibration:
        calibration = None
    elif calibration is None:
        raise ArgumentError(
            "this quantization is solved from measurements of the model, and it has none: run"
            " `sixbit calibrate --model DIR --prompts FILE`"
        )
    return _solve(config, calibration, steps)


def largest_change(config: QuantizationConfig) -> float:
    """A skip threshold that no accumulated error reaches: d of two unrelated deltas of one size is at most 2."""
    return 2.0 * (config.max_skips + 1)


def with_thresholds(policy: PrecisionPolicy, *, skip: float, error: float) -> PrecisionPolicy:
    """The policy with other thresholds, where it has any."""

    def changed(router: Any) -> Any:
        if isinstance(router, CostAwareRouter):
            return dataclasses.replace(router, router=changed(router.router))
        if isinstance(router, VolatilityRouter):
            return dataclasses.replace(router, threshold=jnp.asarray(error, jnp.float32))
        return router

    skipper = policy.skipper
    if isinstance(skipper, DeltaSkipper):
        skipper = dataclasses.replace(skipper, threshold=jnp.asarray(skip, jnp.float32))
    return dataclasses.replace(policy, router=changed(policy.router), skipper=skipper)


def policy_of(config: QuantizationConfig, calibration: Calibration | None, *, skips: bool) -> PrecisionPolicy:
    """The policy of a configuration, its thresholds still to be set; `skips`: whether a threshold decides to skip."""
    zero = jnp.asarray(0.0, jnp.float32)
    if config.activations == "routed":
        assert calibration is not None
        alpha, beta = (jnp.asarray(v, jnp.float32) for v in (calibration.alpha, calibration.beta))
        router = VolatilityRouter(alpha=alpha, beta=beta, threshold=zero)
    else:
        router = ConstantRouter(route=config.activations)
    if config.hardware_aware:
        router = CostAwareRouter.of(router, route_costs())
    skipper, window = NeverSkip(), {"warm_up": config.warm_up, "cool_down": config.cool_down}
    if config.skip_every is not None:
        skipper = EveryNth(n=config.skip_every, **window)
    elif skips:
        skipper = DeltaSkipper(threshold=zero, max_skips=config.max_skips, **window)
    return PrecisionPolicy(
        router=router,
        skipper=skipper,
        outlier_limit=config.outlier_limit,
        cache_format=config.cache_format,
        carrier=config.carrier,
        joint=config.joint,
    )


def route_costs() -> dict[str, float]:
    """Time of a product on each route of the default device, INT8 as 1: FP4 tensor cores exist from Blackwell on."""
    capability = device.compute_capability()
    has_fp4 = capability is not None and capability >= (10, 0)
    return {"nvfp4": 0.5 if has_fp4 else 1.0, "int8": 1.0, "16bit": 2.0}


@functools.lru_cache(maxsize=32)
def _solve(config: QuantizationConfig, calibration: Calibration | None, steps: int) -> PrecisionPolicy:
    # What reaches a PSNR was measured, so it is possible, even if the simulation says that it is just not.
    strict = config.target_psnr is None
    if not strict:
        assert calibration is not None
        config = cheapest(config, calibration.points)
    one_route = config.activations != "routed" or (config.hardware_aware and route_costs()["nvfp4"] >= 1)
    bits = config.target_mean_bits
    free = config.target_skip is None and config.skip_threshold is None and config.skip_every is None
    by_skipping = bits is not None and one_route and free
    skips = bool(config.target_skip) or config.skip_threshold is not None or by_skipping
    policy = policy_of(config, calibration, skips=skips)
    if calibration is None:
        return with_thresholds(policy, skip=config.skip_threshold or 0.0, error=0.0)
    if one_route and not by_skipping:
        if strict and bits is not None:
            raise ArgumentError(
                "hardware_aware leaves INT8 alone on this device, so that target_mean_bits is met by skipping: give no"
                " target_skip, skip_threshold or skip_every beside it"
            )
        bits = None  # nothing to decide between
    simulator = Simulator(calibration, steps)

    def solved(quantity: str, limits: tuple[float, float], target: float, name: str, **other: float) -> float:
        """The threshold, the one that `other` does not give, with which the simulation spends `target`."""
        (free,) = {"skip", "error"} - set(other)

        def spent(threshold: float) -> float:
            return getattr(simulator(with_thresholds(policy, **{free: threshold}, **other)), quantity)

        return bisect(spent, limits, target, name, strict=strict)

    lowest, highest = simulator.predicted(0.0, 1.0)
    errors = (lowest, highest)
    changes = (0.0, largest_change(config))
    skipping = functools.cache(
        lambda error: solved("skip_share", changes, config.target_skip or 0.0, "target_skip", error=error)
    )
    skip = 0.0 if config.skip_threshold is None else config.skip_threshold
    error = config.error_threshold
    if by_skipping and bits is not None:
        skip = solved("mean_bits", changes, bits, "target_mean_bits", error=errors[1])
    elif config.target_skip and (error is not None or bits is None):
        skip = skipping(error or 0.0)
    elif config.target_skip and bits is not None:
        # What is skipped depends on the routes, whose noise is in d: the two are solved together.
        def spent(error: float) -> float:
            return simulator(with_thresholds(policy, skip=skipping(error), error=error)).mean_bits

        error = bisect(spent, errors, bits, f"with target_skip={config.target_skip:g}, target_mean_bits", strict=strict)
        skip = skipping(error)
    elif bits is not None:
        error = solved("mean_bits", errors, bits, "target_mean_bits", skip=skip)
    return with_thresholds(policy, skip=skip, error=0.0 if error is None else error)


def bisect(
    spent: Callable[[float], float], limits: tuple[float, float], target: float, name: str, *, strict: bool = True
) -> float:
    """The threshold between two at which a monotone function of it comes closest to `target`.

    Raises:
        ArgumentError: if `strict`, and the function stays more than `ALMOST` away at both ends: says what it ranges
            over.
    """
    low, high = limits
    ends = spent(low), spent(high)
    if strict and not min(ends) - ALMOST <= target <= max(ends) + ALMOST:
        raise ArgumentError(
            f"{name}={target:g} cannot be met with these settings: what can be is {min(ends):.3g} to {max(ends):.3g}"
        )
    rising = ends[1] > ends[0]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if (spent(middle) < target) == rising:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda threshold: abs(spent(threshold) - target))


def cheapest(config: QuantizationConfig, points: OperatingPoints) -> QuantizationConfig:
    """The configuration with the skip share and mean bits that reach its `target_psnr` in the fewest bits.

    Raises:
        ArgumentError: if nothing was measured, or nothing measured reaches it (beside its target_skip, if it has one).
    """
    if not points.psnr.size:
        raise ArgumentError("target_psnr needs operating points, which this calibration was made without")
    found = points.between()
    allowed = np.ones(found["psnr"].shape, bool)
    if config.target_skip is not None:
        allowed = np.abs(found["skip_share"] - config.target_skip) <= SAME_SKIP
    if not allowed.any():
        raise ArgumentError(
            f"target_skip={config.target_skip:g} is beyond the operating points that calibration measured: "
            f"{points.skip_share.min():.3g} to {points.skip_share.max():.3g}"
        )
    psnr, wanted = found["psnr"][allowed], config.target_psnr
    assert wanted is not None
    if not psnr.min() - 1e-9 <= wanted <= psnr.max() + 1e-9:
        raise ArgumentError(
            f"target_psnr={wanted:g} cannot be met with these settings: what was measured is "
            f"{psnr.min():.4g} to {psnr.max():.4g} dB"
        )
    bits = np.where(allowed & (found["psnr"] >= wanted - 1e-9), found["mean_bits"], np.inf)
    best = int(bits.argmin())
    skip = max(0.0, float(found["skip_share"][best])) if config.target_skip is None else config.target_skip
    return dataclasses.replace(config, target_psnr=None, target_mean_bits=float(bits[best]), target_skip=skip)
