"""`python -m sixbit_jax.training`: trains the mini model, writes it as a diffusers folder, and measures it.

python -m sixbit_jax.training vae --out out/mini --seconds 240
python -m sixbit_jax.training diffusion --out out/mini --seconds 540
python -m sixbit_jax.training export --out out/mini --to sixbit_jax/assets/moving_mnist
python -m sixbit_jax.training evaluate --out out/mini --report sixbit_jax/assets/moving_mnist/report
"""

import dataclasses
import json
import logging
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from sixbit_jax.training import diffusion, loop, recipe, vae

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Out = Annotated[Path, typer.Option(help="Folder of the run: weights, loss curves, settings.")]
Seconds = Annotated[float | None, typer.Option(help="Time until the last step, compilation included; saving follows.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, those before a resumption included.")]
Seed = Annotated[int, typer.Option(help="Of weights, data and noise.")]
Checkpoints = Annotated[
    Path | None, typer.Option(help="Folder of the full state; a run found there goes on. Default: OUT-checkpoints.")
]


def _command() -> str:
    return f"python -m sixbit_jax.training {shlex.join(sys.argv[1:])}"


def _run(name: str, out: Path, checkpoints: Path | None, settings: Any, train: Any, **values: Any) -> None:
    """Trains with `train(outputs)`, keeping `<name>.json` beside the weights: what was run, where and for how long."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    info = {
        "command": _command(),
        "device": jax.devices()[0].device_kind,
        "versions": {p: version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")},
        "recipe": dataclasses.asdict(settings),
        **values,
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(info, indent=1) + "\n")
    checkpoints = checkpoints or out.resolve().with_name(f"{out.resolve().name}-checkpoints")
    dtype = jnp.float32 if name == vae.NAME else jnp.bfloat16
    outputs = loop.Outputs(folder=out, name=name, checkpoints=checkpoints / name, dtype=dtype)
    info["steps"] = int(train(outputs).step)
    info["seconds"] = round(time.monotonic() - started, 1)
    path.write_text(json.dumps(info, indent=1) + "\n")


@app.command("vae")
def train_vae(
    out: Out,
    seconds: Seconds = None,
    steps: Steps = None,
    seed: Seed = 0,
    checkpoints: Checkpoints = None,
) -> None:
    """Trains the VAE, then measures its scaling factor and its PSNR on held-out digits."""
    settings = recipe.VAERecipe()
    budget = loop.Budget(seconds=seconds, steps=steps)
    _run(
        vae.NAME,
        out,
        checkpoints,
        settings,
        lambda outputs: vae.train(settings, seed=seed, budget=budget, outputs=outputs),
        seed=seed,
    )
    model = vae.finish(out, settings, seed=seed).merge()
    psnr = loop.load_metadata(out, vae.NAME)["psnr"]
    print(f"VAE: {psnr} dB on held-out digits, scaling factor {model.config.scaling_factor}")


@app.command("diffusion")
def train_diffusion(
    out: Out,
    seconds: Seconds = None,
    steps: Steps = None,
    seed: Seed = 0,
    checkpoints: Checkpoints = None,
    vae_from: Annotated[Path | None, typer.Option(help="Folder of the trained VAE. Default: OUT.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of transformer and T5 weights to start from, with a new budget.")
    ] = None,
) -> None:
    """Trains the transformer and the text encoder on latents of the trained VAE."""
    settings = recipe.DiffusionRecipe()
    budget = loop.Budget(seconds=seconds, steps=steps)
    encoder = vae.finish(vae_from or out, recipe.VAERecipe(), seed=seed)
    _run(
        diffusion.NAME,
        out,
        checkpoints,
        settings,
        lambda outputs: diffusion.train(
            settings, encoder, seed=seed, budget=budget, outputs=outputs, start_from=start_from
        ),
        seed=seed,
    )


@app.command()
def export(
    out: Out,
    to: Annotated[Path, typer.Option(help="Diffusers folder to write; an older checkpoint there is replaced.")],
    vae_from: Annotated[Path | None, typer.Option(help="Folder of the trained VAE. Default: OUT.")] = None,
) -> None:
    """Writes the averaged weights, in bfloat16, as a diffusers folder."""
    from sixbit_jax.checkpoint import write_diffusers
    from sixbit_jax.training.tokenizer import build_tokenizer

    settings = recipe.DiffusionRecipe()
    networks = diffusion.load(out, settings)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_diffusers(
        to,
        transformer=networks.transformer.merge(),
        vae=vae.finish(vae_from or out, recipe.VAERecipe(), seed=0).merge(),
        text_encoder=networks.text_encoder.merge(),
        tokenizer=build_tokenizer(),
        scheduler=settings.scheduler,
        dtype=jnp.bfloat16,
        overwrite=True,
    )
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"{to}: {size / 1e6:.1f} MB")


@app.command()
def evaluate(
    out: Out,
    report: Annotated[Path, typer.Option(help="Folder of the report to write.")],
    model: Annotated[str, typer.Option(help='The exported model: a diffusers folder, or "mini".')] = "mini",
    clips: Annotated[int, typer.Option(help="Clips to generate; a multiple of 48 weighs all prompts equally.")] = 192,
    batch: Annotated[int, typer.Option(help="Clips generated at once.")] = 16,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 6.0,
    num_inference_steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
) -> None:
    """Generates clips for prompts that training never saw, judges them, and writes the report."""
    from sixbit_jax.pipeline import Pipeline
    from sixbit_jax.training import classifier, data
    from sixbit_jax.training import evaluate as judging

    pipe = Pipeline.from_pretrained(model)

    def generate(prompts: list[str], seed: int) -> np.ndarray:
        made = pipe(prompts, seed=seed, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps)
        return made.frames

    assert pipe.vae is not None
    result = judging.evaluate(generate, classifier.load(), n=clips, seed=seed, batch=batch)
    images, labels = (jnp.asarray(x) for x in data.load_digits("held_out"))
    true_clips = data.sample_batch(jax.random.key(seed), images, labels, 64).video
    runs = {name: json.loads((out / f"{name}.json").read_text()) for name in (vae.NAME, diffusion.NAME)}
    judging.write_report(
        report,
        result,
        losses={name: _curve(out / f"{name}.jsonl") for name in runs},
        command="; ".join(run["command"] for run in runs.values()),
        details={
            "VAE reconstruction of held-out digits, dB": round(judging.vae_psnr(pipe.vae.merge(), true_clips), 2),
            "guidance scale": guidance_scale,
            "DDIM steps": num_inference_steps,
            "sampling seed": seed,
            "judged by": _command(),
            **{
                f"{name}: {key}": run[key]
                for name, run in runs.items()
                for key in ("seed", "steps", "seconds", "device")
            },
        },
    )
    print(json.dumps({name: r["accuracy"] for name, r in result.summary.items() if name != "n"}, indent=1))


def _curve(path: Path) -> list[tuple[int, float]]:
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


if __name__ == "__main__":
    app()
