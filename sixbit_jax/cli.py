"""The `sixbit` command: convert a checkpoint, look at it, generate videos. JAX is imported by what needs it."""

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
from sixbit_jax.errors import TruncatedPromptWarning

app = typer.Typer(
    help="Text to video from CogVideoX checkpoints: convert one, look at it, generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[str, typer.Option("--model", help='A diffusers folder, one made by `sixbit convert`, or "mini".')]


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
    """Calls `function` in a thread, since Ctrl-C does not reach a main thread that waits for a compiled program.

    Ctrl-C ends the process at once, with exit code 130: XLA cannot stop a program that runs, and nothing is half
    written yet.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result()
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        os._exit(130)
    finally:
        pool.shutdown(wait=False)


app.command("convert")(convert)


@app.command()
@shows_user_errors
def generate(
    prompt: Annotated[list[str], typer.Option(help="What to show. Repeat it for several videos in one batch.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write; several videos get _0, _1, ... before the suffix.")],
    model: Model = "mini",
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4k + 1; default the model's own.")] = None,
    num_inference_steps: Annotated[int, typer.Option("--num-inference-steps", "--steps")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 6.0,
    use_dynamic_cfg: Annotated[bool, typer.Option("--use-dynamic-cfg", help="Let the guidance grow.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="Of all videos, or, repeated, of each; default 0.")] = None,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    dtype: DType = DType.bfloat16,
    fps: Annotated[int, typer.Option(min=1)] = 8,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles; less memory.")] = False,
    compilation_cache: Annotated[bool, typer.Option(help="Keep compiled programs between runs.")] = True,
) -> None:
    """Generate one video for each prompt, and a JSON file beside each with every setting, version and stage time."""
    if out.suffix != ".mp4":
        raise typer.BadParameter(f"{out} must end in .mp4", param_hint="--out")
    import dataclasses

    import jax

    from sixbit_jax import video
    from sixbit_jax.pipeline import Pipeline

    outputs = _outputs(out, len(prompt))
    for path in outputs:
        video.check_writable(path)
        video.check_writable(path.with_suffix(".json"))
    if compilation_cache:
        _enable_compilation_cache()

    pipe = Pipeline.from_pretrained(model, dtype=dtype.value, vae_tiling=vae_tiling)
    if scheduler is not None:
        pipe = dataclasses.replace(pipe, scheduler=dataclasses.replace(pipe.scheduler, class_name=scheduler.class_name))
    own_frames, own_height, own_width = pipe.default_size
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "height": own_height if height is None else height,
        "width": own_width if width is None else width,
        "num_frames": own_frames if num_frames is None else num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "use_dynamic_cfg": use_dynamic_cfg,
        "seed": 0 if not seed else seed[0] if len(seed) == 1 else seed,
    }
    with (
        _shown_in_one_line(TruncatedPromptWarning),
        tqdm(total=num_inference_steps, desc="sampling", unit="step", disable=None) as bar,
    ):
        result = _interruptible(lambda: pipe(prompt, **settings, on_step=lambda index: bar.update()))

    device = jax.devices()[0]
    for i, (path, frames) in enumerate(zip(outputs, result.frames, strict=True)):
        video.write_mp4(path, frames, fps=fps)
        record = {
            "prompt": prompt[i],
            "batch": prompt,
            "position_in_batch": i,
            "model": model,
            **settings,
            "frames_written": len(frames),
            "fps": fps,
            "dtype": dtype.value,
            "vae_tiling": vae_tiling,
            "compilation_cache": compilation_cache,
            "scheduler": pipe.scheduler.to_dict(),
            "seconds": {name: round(value, 4) for name, value in result.timings.items()},
            "latents_rms": [round(float(x), 6) for x in result.trace.latents_rms[:, i]],
            "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
            "versions": _versions(),
            "command": sys.argv,
        }
        with video.replacing(path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"wrote {path}")
    typer.echo("  ".join(f"{name} {value:.1f} s" for name, value in result.timings.items()))


@app.command()
@shows_user_errors
def info(
    model: Annotated[str, typer.Argument(help='A diffusers folder, one made by `sixbit convert`, or "mini".')],
) -> None:
    """Say what a checkpoint holds, without loading its tensors."""
    from sixbit_jax import checkpoint
    from sixbit_jax.pipeline import find_model

    typer.echo(json.dumps(checkpoint.describe(find_model(model)), indent=2))


def main() -> None:
    """Runs the command. Exit codes: 0, 2 after a mistake of the user's (one line on stderr), 130 after Ctrl-C.

    See `command.shows_user_errors` for what counts as the user's mistake; any other error shows its traceback.
    """
    run(app)


if __name__ == "__main__":
    main()
