"""The `sixbit` command: convert a checkpoint, look at it, generate videos. JAX is imported by what needs it."""

import enum
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import sixbit_jax

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Model = Annotated[str, typer.Option("--model", help='A diffusers folder, one made by `sixbit convert`, or "mini".')]


class DType(enum.StrEnum):
    """Compute and parameter dtype."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Scheduler(enum.StrEnum):
    """Sampler, where it should differ from the checkpoint's own."""

    ddim = "CogVideoXDDIMScheduler"
    dpm = "CogVideoXDPMScheduler"


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "transformers", "numpy")
    ours = {"sixbit_jax": sixbit_jax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in packages}


def _outputs(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i}{out.suffix}") for i in range(count)]


def _enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the user has set JAX's own variable."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sixbit_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


@app.command()
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
    seed: int = 0,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    dtype: DType = DType.bfloat16,
    fps: Annotated[int, typer.Option(min=1)] = 8,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles; less memory.")] = False,
    compilation_cache: Annotated[bool, typer.Option(help="Keep compiled programs between runs.")] = True,
) -> None:
    """Generate one video for each prompt, and a JSON file beside each with every setting, version and stage time."""
    import dataclasses

    import jax

    from sixbit_jax import video
    from sixbit_jax.pipeline import Pipeline

    if out.suffix != ".mp4":
        raise typer.BadParameter(f"{out} must end in .mp4", param_hint="--out")
    outputs = _outputs(out, len(prompt))
    for path in outputs:
        video.check_writable(path)
    if compilation_cache:
        _enable_compilation_cache()

    pipe = Pipeline.from_pretrained(model, dtype=dtype.value, vae_tiling=vae_tiling)
    if scheduler is not None:
        pipe = dataclasses.replace(pipe, scheduler=dataclasses.replace(pipe.scheduler, class_name=scheduler.value))
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "use_dynamic_cfg": use_dynamic_cfg,
        "seed": seed,
    }
    with tqdm(total=num_inference_steps, desc="sampling", unit="step", disable=None) as bar:
        result = pipe(prompt, **settings, on_step=lambda index: bar.update())

    device = jax.devices()[0]
    for i, (path, frames) in enumerate(zip(outputs, result.frames, strict=True)):
        video.write_mp4(path, frames, fps=fps)
        record = {
            "prompt": prompt[i],
            "batch": prompt,
            "position_in_batch": i,
            "model": model,
            **settings,
            "num_frames": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "fps": fps,
            "dtype": dtype.value,
            "vae_tiling": vae_tiling,
            "scheduler": pipe.scheduler.to_dict(),
            "seconds": {name: round(value, 4) for name, value in result.timings.items()},
            "latents_rms": [round(float(x), 6) for x in result.trace.latents_rms[:, i]],
            "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
            "versions": _versions(),
            "command": sys.argv,
        }
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        typer.echo(f"wrote {path}")
    typer.echo("  ".join(f"{name} {value:.1f} s" for name, value in result.timings.items()))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help='A diffusers folder, one made by `sixbit convert`, or "mini".')],
) -> None:
    """Say what a checkpoint holds, without loading its tensors."""
    from sixbit_jax import checkpoint
    from sixbit_jax.pipeline import MINI_MODEL

    typer.echo(json.dumps(checkpoint.describe(MINI_MODEL if model == "mini" else model), indent=2))


def main() -> None:
    """Runs the command; a mistake in the input is one line on stderr and exit code 2, not a traceback."""
    from convert.errors import ConversionError
    from sixbit_jax.config import ConfigError
    from sixbit_jax.pipeline import NonFiniteLatentsError

    try:
        app()
    except (ConversionError, ConfigError, ValueError, OSError, NonFiniteLatentsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
