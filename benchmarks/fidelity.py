"""What each policy costs in fidelity: the mini model against its own bfloat16 run, prompt by prompt.

`python -m benchmarks.fidelity --out benchmarks/fidelity` runs every row, which wants a GPU, and writes results.json,
report.md and figures; `--clips` and `--seconds` make it smaller, the rows that matter most first, `--only` takes some
of them, and `--tiny` runs a handful on two prompts and four steps, on a CPU. `--resume` goes on with a run that
`--seconds` ended.

Every setting of a row's policy is a traced value (`StudyRouter`, `StudySkipper`), so that most rows share one compiled
program. The clips of a row run one after the other in it, so that decisions are those of each video, and only what is
decided runs, by the kernels that a user's run would take. Thresholds are solved for on the calibration's trace
(`precision.targets.simulated_bits`), so rows meet their targets roughly.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import fidelity_report, record
from benchmarks.fidelity_policies import StudyRouter, StudySkipper
from benchmarks.fidelity_programs import Programs, measure_lanes, run_lanes
from benchmarks.fidelity_rows import TAUS, Spec, all_rows, few_rows, formats
from benchmarks.video import latent_shape
from sixbit_jax import Pipeline, metrics
from sixbit_jax.models.linears import SITES
from sixbit_jax.models.split import Split
from sixbit_jax.pipeline import MINI_MODEL, decode_latents, encode_text
from sixbit_jax.precision import (
    ConstantRouter,
    NeverSkip,
    PrecisionPolicy,
    accounting,
    measuring,
)
from sixbit_jax.precision.blocks import PrecisionTrace
from sixbit_jax.precision.calibration import FILE_NAME, Calibration, fit
from sixbit_jax.precision.routers import INT8, NVFP4, TableRouter
from sixbit_jax.precision.targets import resampled, simulated_bits
from sixbit_jax.qtensor import ROUTES, quantize_model
from sixbit_jax.sampling import sampler, schedulers
from sixbit_jax.sampling.noise import initial_latents, video_keys
from sixbit_jax.trace_plot import save_trace
from sixbit_jax.training import classifier
from sixbit_jax.training.data import Phrase, caption_text, held_out_captions, training_phrases
from sixbit_jax.training.evaluate import by_digit, judge

GUIDANCE = 6.0
SOLVERS = {"DDIM": "CogVideoXDDIMScheduler", "DPM": "CogVideoXDPMScheduler"}
SEMANTICS = ("digit", "colour", "direction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    Attributes:
        clips: held-out clips that are judged; the lanes of every program.
        steps: denoising steps.
        calibration: prompts of the training grammar that are measured, for a solver that the calibration that ships
            with the model is not of.
        tiny: a few rows alone, and untuned thresholds.
        deadline: seconds after which no further row is started.
        workers: rows that run at once.
        only: shell patterns of the names of rows; the bfloat16 run is always there.
    """

    clips: int = 96
    steps: int = 50
    calibration: int = 8
    tiny: bool = False
    deadline: float = float("inf")
    workers: int = 1
    only: tuple[str, ...] = ("*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What calibration found; NumPy arrays.

    Attributes:
        trace: [prompts, steps, blocks, ...].
        alpha, beta, correlation: [blocks, sites], of the NVFP4 error on the last step's volatility.
    """

    trace: measuring.Measured
    alpha: np.ndarray
    beta: np.ndarray
    correlation: np.ndarray

    @classmethod
    def of(cls, trace: measuring.Measured) -> "Fit":
        """As `sixbit_jax.calibrate` fits."""
        found = fit(trace.volatility, trace.error[..., 0])
        return cls(trace=trace, **{name: found[name] for name in ("alpha", "beta", "correlation")})

    def scatter(self) -> dict[str, Any]:
        """A part of the points that were fitted: volatility [n, blocks] and the next error [n, blocks, sites]."""
        volatility, error = self.trace.volatility[:2, :-1], self.trace.error[:2, 1:, ..., 0]
        return {
            name: np.round(values.reshape(-1, *values.shape[2:]).astype(np.float64), 4).tolist()
            for name, values in (("volatility", volatility), ("error", error))
        }


class Study:
    """One solver's rows on the mini model.

    Args:
        settings: what is run.
        solver: a key of `SOLVERS`.
        log: called with each line of progress.
        earlier: rows of an earlier run with these settings, which are not run again.
    """

    def __init__(
        self, settings: Settings, solver: str, log: Callable[[str], None], earlier: Sequence[dict[str, Any]] = ()
    ):
        self.settings, self.solver, self.log = settings, solver, log
        self.started = time.monotonic()
        self.fit: Fit | None = None
        self.programs = Programs()
        self.rows = list(earlier)
        self.known_rows = {row["name"] for row in earlier}
        self.traces: dict[str, PrecisionTrace] = {}
        pipe = self.pipe = Pipeline.from_pretrained("mini")
        self.scheduler = dataclasses.replace(pipe.scheduler, class_name=SOLVERS[solver])
        self.config = pipe.transformer.merge().config
        self.models = {"plain": pipe.transformer}
        for name, options in {"quantised": {}, "no Hadamard": {"hadamard": 0}, "4/6": {"four_over_six": True}}.items():
            if name == "quantised" or not settings.tiny:
                self.models[name] = Split.of(quantize_model(pipe.transformer.merge(), **options))
        self.captions = held_out(settings.clips)
        # Spread over the phrases: a step that shares no factor with their number and structure.
        known = training_phrases()
        self.known = [(Phrase.from_index(known[(i * 157) % len(known)]),) for i in range(settings.calibration)]
        self.held_out, self.calibration = self._inputs(self.captions, 1), self._inputs(self.known, 2)

    def complete(self) -> None:
        """Runs everything."""
        self.calibrate()
        if not self.settings.tiny:
            self._prepare(formats(self))  # compiles while the references run
        self.reference()
        specs = sorted((few_rows if self.settings.tiny else all_rows)(self), key=lambda spec: spec.priority)
        specs = [spec for spec in specs if self._wanted(spec.name)]
        self._prepare(specs)
        self._run_all([spec for spec in specs if spec.priority == 0])
        self.other_references()
        self._run_all([spec for spec in specs if spec.priority > 0])

    def _wanted(self, name: str) -> bool:
        """Whether a row is to be run: it is asked for, and not there yet."""
        return name not in self.known_rows and any(fnmatch.fnmatchcase(name, only) for only in self.settings.only)

    def _run_all(self, specs: Sequence[Spec]) -> None:
        with ThreadPoolExecutor(self.settings.workers) as pool:
            for spec, done in zip(specs, pool.map(self.run, specs), strict=True):
                if done is None:
                    self.log(f"out of time: {spec.name}")
                    continue
                seconds, latents, trace = done
                self.keep(spec.name, spec.group, latents, seconds, trace=trace, **spec.details)

    def _prepare(self, specs: Sequence[Spec]) -> None:
        """Compiles in the background, where there is something else to run on meanwhile."""
        if jax.default_backend() != "cpu":
            for spec in specs:
                self.programs.prepare(run_lanes, *self._arguments(spec))

    def _inputs(self, captions: Sequence[Sequence[Phrase]], seed: int) -> tuple[jax.Array, sampler.Conditioning]:
        pipe, clips = self.pipe, len(captions)
        keys = video_keys([1000 * seed + i for i in range(clips)], clips)
        texts = [pipe.tokenize([caption_text(caption) for caption in captions]), pipe.tokenize([""] * clips)]
        positive, negative = (encode_text(pipe.text_encoder, jnp.asarray(ids)) for ids in texts)
        conditioning = sampler.Conditioning(prompt_embeds=positive, negative_prompt_embeds=negative, keys=keys)
        return initial_latents(keys, latent_shape(self.config)), conditioning

    def schedule(self, steps: int) -> tuple[schedulers.Schedule, jax.Array]:
        schedule = schedulers.make_schedule(self.scheduler, steps)
        scale = schedulers.guidance_schedule(GUIDANCE, schedule.timesteps, steps, use_dynamic_cfg=False)
        return jax.tree.map(jnp.asarray, schedule), jnp.asarray(scale)

    # Policies

    def table(self, routes: str | np.ndarray) -> np.ndarray:
        """Routes as int32 [steps, blocks, sites], from a name or anything that broadcasts to them."""
        routes = ROUTES.index(routes) if isinstance(routes, str) else routes
        return np.broadcast_to(np.asarray(routes, np.int32), (self.settings.steps, self.config.num_layers, len(SITES)))

    def skipper(
        self,
        tau: Any = 0.0,
        *,
        table: np.ndarray | None = None,
        purify: bool = True,
        in_sight: bool = False,
        **limits: int,
    ) -> Any:
        shape = (self.settings.steps, self.config.num_layers)
        limits = {"max_skips": 2, "warm_up": 5, "cool_down": 2, **limits}
        if self.settings.tiny:
            limits["warm_up"], limits["cool_down"] = 2, 0
        return StudySkipper(
            threshold=np.broadcast_to(np.asarray(tau, np.float32), (shape[1], 1)),
            table=np.asarray(np.zeros(shape, bool) if table is None else table),
            by_table=np.asarray(table is not None),
            purify=np.asarray(purify),
            in_sight=np.asarray(in_sight),
            **{name: np.asarray(value, np.int32) for name, value in limits.items()},
        )

    def policy(
        self,
        routes: str | np.ndarray | None = None,
        *,
        threshold: float = 0.0,
        tau: Any = 0.0,
        stale: bool = False,
        clean: str | None = None,
        cache_format: str = "16bit",
        outlier_limit: float = 25.0,
        by_stream: bool = False,
        late: int = 0,
        **skipper: Any,
    ) -> PrecisionPolicy:
        """Routes by a table, or, if None, by the paper's router; skips by tau, or by a table, or not at all.

        With `by_stream` the router compares what the error does to the residual stream: G, times the mean error that
        calibration found at the site, in the place of alpha * G + beta.
        """
        skipper = self.skipper(tau, **{"purify": bool(np.any(np.asarray(tau) > 0)), **skipper})
        router = StudyRouter(
            table=np.asarray(self.table(0 if routes is None else routes)),
            alpha=self.mean_error if by_stream else self.fit.alpha,
            beta=0 * self.fit.beta if by_stream else self.fit.beta,
            threshold=np.asarray(threshold, np.float32),
            by_table=np.asarray(routes is not None),
            stale=np.asarray(stale),
            clean=np.asarray(0 if clean is None else ROUTES.index(clean), np.int32),
            late=np.asarray(late, np.int32),
            skipper=skipper,
        )
        return PrecisionPolicy(router=router, skipper=skipper, cache_format=cache_format, outlier_limit=outlier_limit)

    @property
    def mean_error(self) -> np.ndarray:
        """Of NVFP4, [blocks, sites]."""
        return np.asarray(self.fit.trace.error, np.float64)[..., 0].mean((0, 1)).astype(np.float32)

    def bounds(self, by_stream: bool) -> tuple[float, float]:
        """Between which the router's threshold is looked for: all it predicts on the calibration's trace."""
        volatility = np.asarray(self.fit.trace.volatility, np.float64)[..., None]
        predicted = volatility * self.mean_error if by_stream else self.fit.alpha * volatility + self.fit.beta
        return float(np.quantile(predicted[predicted > 0], 0.001)), float(predicted.max())

    def threshold(self, bits: float, **options: Any) -> float:
        """Of the router, for mean bits without a cache."""
        return self.solve(
            lambda value: self.policy(threshold=value, **options),
            lambda spent: spent.mean_bits,
            bits,
            self.bounds(options.get("by_stream", False)),
        )

    def tuned(self, share: float, bits: float, options: Mapping[str, Any]) -> dict[str, float]:
        """Thresholds of router and cache for a skip share and mean bits, of a policy with these options.

        Both at once: noise of NVFP4 counts as change of a delta, so what is routed decides what is skipped. Takes the
        nearest of a grid, and of a finer one around it. The skip share comes first: some options cannot meet both.
        """
        ranges = {"threshold": self.bounds(options.get("by_stream", False)), "tau": TAUS}
        for _ in range(2):
            axes = [np.geomspace(*ends, 12) for ends in ranges.values()]
            pairs = [dict(zip(ranges, map(float, pair), strict=True)) for pair in itertools.product(*axes)]
            spent = self.simulate([self.policy(**pair, **options) for pair in pairs])
            miss = [4 * abs(found.skip_share - share) + abs(found.mean_bits - bits) / 8 for found in spent]
            best = pairs[int(np.argmin(miss))]
            step = {name: (axis[1] / axis[0]) for name, axis in zip(ranges, axes, strict=True)}
            ranges = {name: (best[name] / step[name], best[name] * step[name]) for name in ranges}
        return best

    def fixed(self, routes: str | np.ndarray, *, carrier: str = "exact") -> PrecisionPolicy:
        """A table without a cache, in a smaller program than that of `policy`."""
        return PrecisionPolicy(
            router=TableRouter(table=jnp.asarray(self.table(routes))), skipper=NeverSkip(), carrier=carrier
        )

    def cached(self, **options: Any) -> PrecisionPolicy:
        """The delta cache in the bfloat16 model."""
        return PrecisionPolicy(router=ConstantRouter(), skipper=self.skipper(**options))

    # Runs

    def _arguments(self, spec: Spec) -> tuple:
        lanes = jax.tree.map(lambda leaf: np.stack([leaf] * self.settings.clips), spec.policy)
        return (self.models[spec.model], *self.schedule(self.settings.steps), *self.held_out, lanes)

    def reference(self) -> None:
        """The bfloat16 run that all rows are compared with."""
        self._unquantized("bf16", self.models["plain"], *self.held_out, self.settings.steps)

    def other_references(self) -> None:
        """The float32 twin of it, whose distance is the floor; and shorter runs."""
        steps, (noise, bf16) = self.settings.steps, self.held_out
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, bf16)
        single = Pipeline.from_pretrained("mini", dtype=jnp.float32).transformer
        with jax.default_matmul_precision("highest"):
            self._unquantized("float32 (the floor of bf16)", single, noise, wide, steps, width=32.0)
        for share in () if self.settings.tiny else (0.2, 0.3, 0.5):
            fewer = round(steps * (1 - share))
            self._unquantized(f"bf16, {fewer} steps", self.models["plain"], noise, bf16, fewer)

    def _unquantized(
        self, name: str, model: Split, noise: jax.Array, conditioning: Any, count: int, *, width: float = 16.0
    ) -> None:
        began = time.monotonic()
        if name != "bf16" and (not self._wanted(name) or began - self.started > self.settings.deadline):
            return
        latents = jax.block_until_ready(sampler.sample(model, *self.schedule(count), noise, conditioning)[0])
        if name == "bf16":
            self.latents, self.frames = latents, self.decode(latents)
        if name not in self.known_rows:
            spent = {"mean_bits": width * count / self.settings.steps, "mean_bits_computed": width, "skip_share": 0.0}
            self.keep(name, "reference", latents, time.monotonic() - began, **spent)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Frames, kept on the device: of some that went to the host and back while a row ran, PSNR came out wrong."""
        return jnp.concatenate([decode_latents(self.pipe.vae, latents[i : i + 16]) for i in range(0, len(latents), 16)])

    def keep(
        self,
        name: str,
        group: str,
        latents: jax.Array,
        seconds: float,
        *,
        trace: PrecisionTrace | None = None,
        **details: Any,
    ) -> None:
        """Compares a run with the reference and adds its row; `details` hold what it spent where there is no trace."""
        frames = self.decode(latents)
        psnr = np.asarray(metrics.psnr(frames, self.frames), np.float64)
        ssim = np.asarray(metrics.ssim(frames, self.frames), np.float64)
        error = np.asarray(metrics.relative_error(latents, self.latents), np.float64)
        judged = judge(*by_digit(np.asarray(frames), self.captions), classifier.load(), batch=min(32, len(frames)))
        row: dict[str, Any] = {"name": name, "group": group, "solver": self.solver}
        row["psnr"] = None if np.isinf(psnr).all() else {"mean": float(psnr.mean()), "worst": float(psnr.min())}
        row["ssim"] = {"mean": float(ssim.mean()), "worst": float(ssim.min())}
        row["latent_error"] = {"mean": float(error.mean()), "worst": float(error.max())}
        row["accuracy"] = {what: float(judged.correct(what).mean()) for what in SEMANTICS}
        if trace is not None:
            host = jax.device_get(trace)
            bits = np.moveaxis(np.asarray(host.bits)[:, :, :, 0], 0, 2)
            spent = accounting.summary(bits, accounting.site_weights(self.config))
            row |= {
                "mean_bits": spent.mean_bits,
                "mean_bits_computed": spent.mean_bits_computed,
                "skip_share": spent.skip_share,
                "route_shares": dict(spent.route_shares),
            }
            self.traces[name] = jax.tree.map(lambda value: np.asarray(value[:1])[0], host)
        row |= details
        row["psnr_by_clip"] = [None if np.isinf(value) else round(float(value), 3) for value in psnr]
        row["seconds"] = round(seconds, 2)
        self.rows.append(row)
        self.log(_line(row))

    def run(self, spec: Spec) -> tuple[float, jax.Array, PrecisionTrace] | None:
        """One policy on all held-out clips: seconds, latents, traces; None if time is over."""
        began = time.monotonic()
        if began - self.started > self.settings.deadline:
            return None
        latents, trace = self.programs.run(run_lanes, *self._arguments(spec))
        return time.monotonic() - began, latents, trace

    # Calibration

    def calibrate(self) -> None:
        """Takes the calibration that ships with the model, or measures where that is of another solver."""
        shipped = Calibration.load(MINI_MODEL / FILE_NAME, self.models["quantised"])
        trace = shipped.trace
        if shipped.settings["scheduler"] != self.scheduler.to_dict():
            _, trace = self.programs.run(
                measure_lanes, self.models["quantised"], *self.schedule(self.settings.steps), *self.calibration
            )
            trace = jax.device_get(trace)
        self.fit = Fit.of(trace)
        self.trace = resampled(trace, self.settings.steps)
        self.log(f"correlation of G with the next step's NVFP4 error: {np.round(self.fit.correlation, 2).tolist()}")

    def solve(
        self,
        make: Callable[[float], PrecisionPolicy],
        measure: Callable[[accounting.Summary], float],
        wanted: float,
        bounds: tuple[float, float],
    ) -> float:
        """The value between bounds at which the policy made of it, simulated, measures what is wanted."""
        values = np.geomspace(*bounds, 32)
        found = np.array([measure(spent) for spent in self.simulate([make(float(value)) for value in values])])
        order = np.argsort(found, kind="stable")
        return float(np.exp(np.interp(wanted, found[order], np.log(values)[order])))

    def simulate(self, policies: Sequence[PrecisionPolicy]) -> list[accounting.Summary]:
        """What each policy spends on the calibration's trace."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *policies)
        bits = jax.vmap(lambda policy: simulated_bits(policy, self.trace))(stacked)
        return [accounting.summary(b, accounting.site_weights(self.config)) for b in np.asarray(bits)]

    def allocation(self, bits: float, *, by_step: bool) -> np.ndarray:
        """Routes [1 or steps, blocks, sites] of that mean width which cost the least error: INT8 where it saves most.

        Sum of the squared relative errors of calibration, INT8 bought where a multiply-add of it saves most.
        """
        squared = (np.asarray(self.fit.trace.error, np.float64) ** 2).mean(0)
        squared = squared if by_step else squared.mean(0, keepdims=True)
        weights = np.array(list(accounting.site_weights(self.config).values()))
        gain = (squared[..., 0] - squared[..., 1]) / weights
        cost = np.broadcast_to(weights, gain.shape).ravel()
        order = np.argsort(-gain.ravel())
        spent = np.cumsum(cost[order]) / cost.sum()
        routes = np.full(gain.size, NVFP4, np.int32)
        routes[order[spent <= (bits - 4) / 4 + 1e-9]] = INT8
        return routes.reshape(gain.shape)

    def edge_table(self, bits: float, *, first: float) -> np.ndarray:
        """INT8 in the first and last steps, so many in all that the mean width is met; `first` of them at the start."""
        steps = self.settings.steps
        eight = round(steps * (bits - 4) / 4)
        table = np.full((steps, 1, 1), NVFP4, np.int32)
        start = round(eight * first)
        table[:start] = INT8
        table[steps - (eight - start) :] = INT8
        return table


def _line(row: Mapping[str, Any]) -> str:
    psnr = "equal" if row["psnr"] is None else "{mean:6.2f} (worst {worst:5.2f}) dB".format(**row["psnr"])
    accuracy = " ".join(f"{100 * value:.0f}" for value in row["accuracy"].values())
    return (
        f"{row['solver']} {row['name']:44s} {row['mean_bits']:5.2f} bits, {100 * row['skip_share']:4.1f} % skipped: "
        f"{psnr}, latents {row['latent_error']['mean']:.4f}, {accuracy}, {row['seconds']} s"
    )


def setting(settings: Settings) -> dict[str, Any]:
    """What rows must share to stand in one table, as results.json has it."""
    varying = {"deadline", "workers", "only"}
    found = {name: value for name, value in dataclasses.asdict(settings).items() if name not in varying}
    prompts = [caption_text(caption) for caption in held_out(settings.clips)]
    return found | {"guidance_scale": GUIDANCE, "prompts": prompts}


def held_out(clips: int) -> list[tuple[Phrase, ...]]:
    """The captions of so many clips, in turn."""
    captions = held_out_captions()
    return [captions[i % len(captions)] for i in range(clips)]


def earlier_rows(folder: Path, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Rows of results.json by solver.

    Raises:
        ValueError: if they are of other settings, device or versions; the message has both.
    """
    found = json.loads((folder / "results.json").read_text())
    here = record.describe(program="benchmarks.fidelity", argv=[], rows=[], settings=setting(settings))
    for name in ("device", "versions", "settings"):
        if differing := [key for key in here[name] if found[name].get(key) != here[name][key]]:
            theirs, ours = ({key: of[name].get(key) for key in differing} for of in (found, here))
            raise ValueError(f"{folder / 'results.json'} is of the {name} {theirs}, not {ours}")
    return {solver: [row for row in found["rows"] if row["solver"] == solver] for solver in SOLVERS}


def save(folder: Path, studies: Sequence[Study], argv: Sequence[str] | None) -> dict[str, Any]:
    """Writes results.json, of whatever there is by now."""
    result = record.describe(
        program="benchmarks.fidelity",
        argv=argv,
        rows=[row for study in studies for row in study.rows],
        settings=setting(studies[0].settings),
        calibration={
            study.solver: {
                "correlation": np.round(study.fit.correlation, 4).tolist(),
                "alpha": np.round(study.fit.alpha, 6).tolist(),
                "beta": np.round(study.fit.beta, 6).tolist(),
                "error": np.round(np.asarray(study.fit.trace.error, np.float64).mean((0, 1)), 6).tolist(),
                "scatter": study.fit.scatter(),
            }
            for study in studies
            if study.fit is not None
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1).replace("NaN", "null") + "\n")
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, report.md and the figures")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--clips", type=int, default=96, help="held-out clips: 48 of one digit, then 48 of two")
    parser.add_argument("--seconds", type=float, help="start no row of a solver later than this; default: all rows")
    parser.add_argument("--workers", type=int, default=1, help="rows that run at once; a CPU's cores")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in --out, and run the others")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of rows, such as 'TDC, *'")
    parser.add_argument("--tiny", action="store_true", help="a few rows, two clips, four steps")
    arguments = parser.parse_args(argv)
    settings = Settings(
        clips=arguments.clips,
        deadline=arguments.seconds or float("inf"),
        workers=arguments.workers,
        only=tuple(arguments.only),
    )
    solvers = arguments.solvers
    if arguments.tiny:
        settings, solvers = Settings(clips=2, steps=4, calibration=1, tiny=True, only=settings.only), solvers[:1]
    studies: list[Study] = []
    earlier = earlier_rows(arguments.out, settings) if arguments.resume else {}

    def log(line: str) -> None:
        print(line, flush=True)
        save(arguments.out, studies, argv)

    for solver in solvers:
        studies.append(Study(settings, solver, log, earlier.get(solver, ())))
        studies[-1].complete()
    result = save(arguments.out, studies, argv)
    for study in studies:
        name = "DMPQ + TDC, PDR (15 %, 6 bits)"
        if name in study.traces:
            save_trace(study.traces[name], arguments.out / f"trace_{study.solver.lower()}.png", title=name)
    fidelity_report.write(arguments.out, result)
    return result


if __name__ == "__main__":
    main()
