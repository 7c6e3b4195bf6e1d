"""The `sixbit` command: convert a checkpoint, look at it, calibrate it, generate, report. JAX is imported late."""

import concurrent.futures
import contextlib
import enum
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import sixbit_jax
from convert.__main__ import main as convert
from sixbit_jax.command import run, shows_user_errors
from sixbit_jax.errors import SixbitWarning

app = typer.Typer(
    help="Text to video from CogVideoX checkpoints: convert one, look at it, calibrate it, generate, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

MODEL_HELP = 'A diffusers folder, one made by `sixbit convert`, a hub id org/name, or "mini".'
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
Steps = Annotated[int, typer.Option("--num-inference-steps", "--steps", min=1, help="Denoising steps.")]


def _say_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"sixbit_jax {sixbit_jax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    pass


class DType(enum.StrEnum):
    """Compute and parameter dtype."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Scheduler(enum.StrEnum):
    """Sampler, where it should differ from the checkpoint's own."""

    ddim = "ddim"
    dpm = "dpm"

    @property
    def class_name(self) -> str:
        """Its name in `scheduler_config.json`."""
        return f"CogVideoX{self.upper()}Scheduler"


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "transformers", "numpy", "av")
    ours = {"sixbit_jax": sixbit_jax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in packages}


def _outputs(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i}{out.suffix}") for i in range(count)]


def _enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the user has set JAX's own variable.

    The sampler's program is kept too: its progress callback is an argument that JAX binds when it loads a program, not
    a part of what is stored.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sixbit_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def _shown_in_one_line(category: type[Warning]) -> Iterator[None]:
    """Shows warnings of this category without the line of code that they came from, and above a progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", category)
        shown = warnings.showwarning

        def show(message: Any, found: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(found, category):
                tqdm.write(f"warning: {message}", file=sys.stderr)
            else:
                shown(message, found, *where, **more)

        warnings.showwarning = show
        yield


def _interruptible[R](function: Callable[[], R]) -> R:
    """Calls `function` in a thread, since Ctrl-C does not reach a main thread that waits for a compiled program."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result()
    finally:
        pool.shutdown(wait=False)


def _load(model: str, **settings: Any) -> Any:
    """`Pipeline.from_pretrained`, with a bar on a terminal where it takes more than a moment."""
    from sixbit_jax.pipeline import Pipeline

    with tqdm(desc="loading", unit="B", unit_scale=True, disable=None, delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return Pipeline.from_pretrained(model, progress=progress, **settings)


def _with_scheduler(pipe: Any, scheduler: Scheduler | None) -> Any:
    """The pipeline with another sampler, if one is asked for."""
    import dataclasses

    if scheduler is None:
        return pipe
    return dataclasses.replace(pipe, scheduler=dataclasses.replace(pipe.scheduler, class_name=scheduler.class_name))


def _summary_record(summary: Any) -> dict[str, Any]:
    """What a run spent, as JSON takes it: NaN becomes null."""
    import dataclasses
    import math

    values = {name: value for name, value in dataclasses.asdict(summary).items() if name != "videos"}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}


def _summary_line(summary: Any) -> str:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in summary.route_shares.items())
    return (
        f"mean activation bits {summary.mean_bits:.2f} ({summary.mean_bits_computed:.2f} without skipped blocks)  "
        f"blocks skipped {summary.skip_share:.1%}  work: {shares}"
    )


def _thresholds(policy: Any) -> dict[str, float]:
    """Solved thresholds of a policy, by the part that has them."""
    router = getattr(policy.router, "router", policy.router)
    parts = {"error_threshold": router, "skip_threshold": policy.skipper}
    return {name: float(part.threshold) for name, part in parts.items() if hasattr(part, "threshold")}


def _group(output: Any, position: int) -> int:
    """Which group of a run's trace a video of its batch belongs to; a batch that was decided on jointly has one."""
    return position if len(output.summary.videos) > 1 else 0


def _compile_all_but_sampling(pipe: Any, settings: dict[str, Any]) -> None:
    """Runs a pipeline's text encoder and VAE once, so that the compilation of a call is that of its sampling loop."""
    import jax
    import jax.numpy as jnp

    if pipe.text_encoder is None or pipe.tokenizer is None or pipe.vae is None:
        return  # the call says what is missing
    frames, height, width = (settings[name] for name in ("num_frames", "height", "width"))
    latents = jnp.zeros((1, *pipe._latents_shape(frames, height, width)))
    weight = jax.tree.leaves(pipe.transformer)[0]
    if weight.committed:  # to a device: so will be what it makes, and JAX compiles for such arrays anew
        latents = jax.device_put(latents, weight.sharding)
    pipe.encode([""])
    pipe.decode(latents, frames)


TRACE_SUFFIXES = (".trace.npz", ".trace.png")
"""Of the decisions of a quantised run: arrays [steps, blocks] or [steps, blocks, sites], and their picture."""


def _save_trace(out: Path, trace: Any, group: int, *, title: str) -> None:
    """Writes the trace of one video beside it."""
    from sixbit_jax import report, trace_plot, video

    report.save_trace(out.with_suffix(TRACE_SUFFIXES[0]), trace, group)
    with video.replacing(out.with_suffix(TRACE_SUFFIXES[1])) as partial:
        picture = partial.with_suffix(".png")
        try:
            title = title.replace("$", r"\$")  # no formula
            trace_plot.save_trace(trace, picture, title=title, video=group)
            picture.replace(partial)
        finally:
            picture.unlink(missing_ok=True)


app.command("convert")(convert)


@app.command()
@shows_user_errors
def generate(
    prompt: Annotated[list[str], typer.Option(help="What to show. Repeat it for several videos in one batch.")],
    out: Annotated[
        Path | None, typer.Option(help="The mp4 to write; several videos get _0, _1, ... before the suffix.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead of --out: run once quantised and once not, and write both, and a page that compares them.",
        ),
    ] = None,
    model: Model = "mini",
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4k + 1; default the model's own.")] = None,
    num_inference_steps: Steps = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 6.0,
    use_dynamic_cfg: Annotated[bool, typer.Option("--use-dynamic-cfg", help="Let the guidance grow.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="Of all videos, or, repeated, of each; default 0.")] = None,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    dtype: DType = DType.bfloat16,
    fps: Annotated[int, typer.Option(min=1)] = 8,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles; less memory.")] = False,
    quantization: Annotated[
        str | None, typer.Option(help="w4a16, int8, nvfp4, int8-reuse or sixbit; default: the model as it is.")
    ] = None,
    target_mean_bits: Annotated[
        float | None, typer.Option(help="Mean activation bits, skipped blocks counted as 0.")
    ] = None,
    target_skip: Annotated[float | None, typer.Option(help="Share of the blocks to skip.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Made by `sixbit calibrate`; default the one in the model's folder.")
    ] = None,
    compilation_cache: Annotated[bool, typer.Option(help="Keep compiled programs between runs.")] = True,
) -> None:
    """Generate one video for each prompt, and a JSON file beside each with every setting, version and stage time.

    With --quantization, the decisions of every step are written too, as arrays (.trace.npz) and drawn (.trace.png).
    """
    if (out is None) == (report is None):
        raise typer.BadParameter("give exactly one of the two", param_hint="--out, --report")
    if out is not None and out.suffix != ".mp4":
        raise typer.BadParameter(f"{out} must end in .mp4", param_hint="--out")
    if report is not None and len(prompt) > 1:
        raise typer.BadParameter("takes one prompt", param_hint="--report")
    if report is not None and quantization is None:
        raise typer.BadParameter("goes with --quantization", param_hint="--report")
    if seed is not None and len(seed) not in (1, len(prompt)):
        raise typer.BadParameter(f"{len(seed)} for {len(prompt)} prompts: one, or one for each", param_hint="--seed")
    import dataclasses

    import jax

    from sixbit_jax import report as reports
    from sixbit_jax import video
    from sixbit_jax.pipeline import Pipeline, PipelineOutput
    from sixbit_jax.precision.targets import QuantizationConfig

    config = None if quantization is None else QuantizationConfig.named(quantization)
    targets: dict[str, Any] = {"target_mean_bits": target_mean_bits, "target_skip": target_skip}
    if targets := {name: value for name, value in targets.items() if value is not None}:
        if config is None:
            raise typer.BadParameter(
                "goes with --quantization", param_hint="--" + next(iter(targets)).replace("_", "-")
            )
        if config.skip_every is not None:
            raise typer.BadParameter(
                f"{quantization} has a rhythm of its own", param_hint="--target-mean-bits, --target-skip"
            )
        config = dataclasses.replace(config, **targets)

    if report is not None:
        outputs = [report / name for name in (*reports.FILES, reports.PAGE)]
    else:
        assert out is not None
        outputs = _outputs(out, len(prompt))
    for path in outputs:
        video.check_writable(path)
        for suffix in () if report else (".json",) if config is None else (".json", *TRACE_SUFFIXES):
            video.check_writable(path.with_suffix(suffix))
    if compilation_cache:
        _enable_compilation_cache()

    def load(config: QuantizationConfig | None) -> Pipeline:
        pipe = _load(model, dtype=dtype.value, vae_tiling=vae_tiling, quantization=config, calibration=calibration)
        return _with_scheduler(pipe, scheduler)

    pipe = load(config)
    num_frames, height, width = pipe.size(num_frames=num_frames, height=height, width=width)
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "use_dynamic_cfg": use_dynamic_cfg,
        "seed": 0 if not seed else seed[0] if len(seed) == 1 else seed,
    }

    def sample(pipe: Pipeline, what: str) -> PipelineOutput:
        with tqdm(total=num_inference_steps, desc=what, unit="step", disable=None) as bar:

            def on_step(index: jax.Array) -> None:
                bar.update()

            def call() -> PipelineOutput:
                if report is not None:
                    _compile_all_but_sampling(pipe, settings)
                return pipe(prompt, **settings, on_step=on_step)

            return _interruptible(call)

    with _shown_in_one_line(SixbitWarning):
        result = sample(pipe, "sampling")

    device = jax.devices()[0]

    def recorded(i: int) -> dict[str, Any]:
        record = {
            "prompt": prompt[i],
            "batch": prompt,
            "position_in_batch": i,
            "model": model,
            **settings,
            "frames_written": len(result.frames[i]),
            "fps": fps,
            "dtype": dtype.value,
            "vae_tiling": vae_tiling,
            "compilation_cache": compilation_cache,
            "quantization": None if config is None else {"name": quantization, **dataclasses.asdict(config)},
            "scheduler": pipe.scheduler.to_dict(),
            "seconds": {name: round(value, 4) for name, value in result.timings.items()},
            "latents_rms": [round(float(x), 6) for x in result.trace.latents_rms[:, i]],
            "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
            "versions": _versions(),
            "command": sys.argv,
        }
        if result.summary is not None:
            record["summary"] = _summary_record(result.summary.videos[_group(result, i)])
            record["thresholds"] = _thresholds(pipe.policy(num_inference_steps))
        return record

    if report is not None:
        record, guided = recorded(0), guidance_scale > 1
        runs = {"quantized": reports.measured(pipe, result, guided=guided)}
        del pipe  # the device need not hold both
        pipe = load(None)
        reference = sample(pipe, "reference")
        runs["reference"] = reports.measured(pipe, reference, guided=guided)
        for name in ("batch", "position_in_batch", "seconds"):  # there is one video, and `runs` has the times of each
            del record[name]
        with video.replacing_together(report, [reports.RUN, reports.PAGE]) as beside:
            reports.save_run(beside, record | {"runs": runs}, result, reference)
            reports.write(beside)
        typer.echo(f"wrote {report / reports.PAGE}")
    else:
        stale = [path.with_suffix(suffix).name for path in outputs for suffix in (".json", *TRACE_SUFFIXES)]
        with video.replacing_together(outputs[0].parent, stale) as beside:
            for i, path in enumerate(beside / path.name for path in outputs):
                video.write_mp4(path, result.frames[i], fps=fps)
                if result.summary is not None:
                    _save_trace(path, result.trace.precision, _group(result, i), title=f"{quantization}: {prompt[i]}")
                path.with_suffix(".json").write_text(json.dumps(recorded(i), indent=2) + "\n", encoding="utf-8")
        for path in outputs:
            typer.echo(f"wrote {path}")
    if result.summary is not None:
        typer.echo(_summary_line(result.summary))
    typer.echo("  ".join(f"{name} {value:.1f} s" for name, value in result.timings.items()))


@app.command("report")
@shows_user_errors
def write_report(
    folder: Annotated[Path, typer.Argument(help="Written by `sixbit generate --quantization NAME --report FOLDER`.")],
) -> None:
    """Make the page of a run again: report.html, from the files in its folder, with everything embedded."""
    from sixbit_jax import report

    typer.echo(f"wrote {report.write(folder)}")


@app.command()
@shows_user_errors
def calibrate(
    prompts: Annotated[Path, typer.Option(help="A text file, one prompt a line; typical of what will be generated.")],
    model: Model = "mini",
    out: Annotated[
        Path | None,
        typer.Option(help='The file to write; default calibration.safetensors in the model\'s folder, but of "mini".'),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4k + 1; default the model's own.")] = None,
    num_inference_steps: Steps = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 6.0,
    seed: Annotated[int, typer.Option(help="Of the noise of all videos.")] = 0,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    dtype: DType = DType.bfloat16,
    points: Annotated[int, typer.Option(help="How many of the prompts are run at each operating point.")] = 4,
    compilation_cache: Annotated[bool, typer.Option(help="Keep compiled programs between runs.")] = True,
) -> None:
    """Measure what each precision costs a model on some prompts; what --quantization sixbit decides by.

    Ctrl-C leaves the file as it was.
    """
    if model == "mini" and out is None:
        raise typer.BadParameter(
            'is needed for "mini", whose own calibration is part of the package', param_hint="--out"
        )
    from sixbit_jax import calibrate as calibration
    from sixbit_jax import video
    from sixbit_jax.pipeline import find_model
    from sixbit_jax.precision.calibration import FILE_NAME

    texts = calibration.read_prompts(prompts)
    path = find_model(model) / FILE_NAME if out is None else out
    try:
        video.check_writable(path)
    except OSError as error:
        if out is None:
            raise OSError(f"{error}; name another place with --out FILE, and use it with --calibration FILE") from error
        raise
    if compilation_cache:
        _enable_compilation_cache()
    pipe = _with_scheduler(_load(model, dtype=dtype.value, quantization="w4a16"), scheduler)
    with tqdm(total=calibration.work(len(texts), points), desc="calibrating", unit="run", disable=None) as bar:

        def progress(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        found = _interruptible(
            lambda: calibration.calibrate(
                pipe,
                texts,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=seed,
                num_frames=num_frames,
                height=height,
                width=width,
                points=points,
                progress=progress,
            )
        )
    found.save(path)
    typer.echo(str(found))
    typer.echo(f"wrote {path}")


@app.command()
@shows_user_errors
def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
) -> None:
    """Say what a checkpoint holds, without loading its tensors."""
    from sixbit_jax import checkpoint
    from sixbit_jax.pipeline import find_model

    typer.echo(json.dumps(find_model(model, checkpoint.describe), indent=2))


def main() -> None:
    """Runs the command. Exit codes: 0, 2 after a mistake of the user's (one line on stderr), 130 after Ctrl-C.

    See `command.shows_user_errors` for what counts as the user's mistake; any other error shows its traceback.
    """
    run(app)


if __name__ == "__main__":
    main()
