"""What storing weights in NVFP4 costs in fidelity: of the transformer, rounded two ways, and of the text encoder.

`python -m benchmarks.weights --clips 24 --out benchmarks/results/weights_<device>.json`

The mini model on held-out prompts, 50 DDIM steps, guidance 6, the same noise in every row, against its own bf16 run.
Weights are rounded to the nearest, or for what the linears see on the prompts of the shipped calibration, all of which
training saw (`sixbit_jax.moments`). The floor is the text encoder in float32.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.fidelity import SEMANTICS
from sixbit_jax import Pipeline, metrics, moments
from sixbit_jax.calibrate import read_prompts
from sixbit_jax.models.split import Split
from sixbit_jax.pipeline import MINI_MODEL
from sixbit_jax.precision.targets import QuantizationConfig
from sixbit_jax.qtensor import TEXT_ENCODER_RULES, quantize_model
from sixbit_jax.training import classifier
from sixbit_jax.training.data import held_out_scenes
from sixbit_jax.training.evaluate import judge

BATCH = 8
"""Clips of a call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to store and run the model.

    Attributes:
        features: relative L2 error of the prompts' text features.
        psnr, worst_psnr: dB of 8-bit frames, mean and least over the clips.
        gain, gain_error: mean difference in PSNR to the row of the same activations whose weights are rounded to the
            nearest, and its standard error; None if there is no such row.
        accuracy: share of the clips whose digit, colour and direction are right.
    """

    name: str
    features: float
    psnr: float
    worst_psnr: float
    gain: float | None
    gain_error: float | None
    accuracy: dict[str, float]


def pipelines(steps: int) -> Iterator[tuple[str, str | None, Pipeline]]:
    """(name, name of the row to compare with, what runs); the original first."""
    plain = Pipeline.from_pretrained("mini")
    yield "bf16", None, plain
    wide = Pipeline.from_pretrained("mini", dtype=jnp.float32).text_encoder
    yield "text encoder in float32", None, dataclasses.replace(plain, text_encoder=wide)
    assert plain.text_encoder is not None
    small = Split.of(quantize_model(plain.text_encoder.merge(), TEXT_ENCODER_RULES))
    yield "text encoder in NVFP4", None, dataclasses.replace(plain, text_encoder=small)
    prompts = read_prompts(MINI_MODEL / "calibration_prompts.txt")
    seen = moments.gather(plain, prompts, num_inference_steps=steps)
    nearest, rounded = (plain.quantized(moments=each) for each in (None, seen))
    for name, config in (("W4A16", "w4a16"), ("W4A8", "int8"), ("W4A8, every second step reused", "int8-reuse")):
        for how, pipe in (("", nearest), (", rounded for its inputs", rounded)):
            yield name + how, name if how else None, pipe.quantized(QuantizationConfig.named(config))


def rows(clips: int, steps: int) -> Iterator[Row]:
    """All rows but that of the original."""
    held_out = held_out_scenes()
    scenes = [held_out[(5 * i) % len(held_out)] for i in range(clips)]
    prompts = [scene.text for scene in scenes]
    wanted, by_clip = None, {}
    for name, rival, pipe in pipelines(steps):
        features = np.asarray(pipe.encode(prompts), np.float64)
        starts = range(0, clips, BATCH)
        calls = [pipe(prompts[i : i + BATCH], seed=i, num_inference_steps=steps).frames for i in starts]
        frames = np.concatenate([np.asarray(call) for call in calls])
        if wanted is None:
            wanted = features, frames
            continue
        psnr = by_clip[name] = np.asarray(metrics.psnr(jnp.asarray(frames), jnp.asarray(wanted[1])), np.float64)
        gain = None if rival is None else psnr - by_clip[rival]
        judged = judge(frames, scenes, classifier.load(), batch=min(32, clips))
        yield Row(
            name=name,
            features=round(float(np.linalg.norm(features - wanted[0]) / np.linalg.norm(wanted[0])), 5),
            psnr=round(float(psnr.mean()), 2),
            worst_psnr=round(float(psnr.min()), 2),
            gain=None if gain is None else round(float(gain.mean()), 2),
            gain_error=None if gain is None else round(float(gain.std(ddof=1) / np.sqrt(clips)), 2),
            accuracy={what: float(judged.correct(what).mean()) for what in SEMANTICS},
        )


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = [
        "| | text features, rel. L2 | PSNR | worst | against the nearest | digit, colour, direction right |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        gain = "" if r.gain is None else f"{r.gain:+.2f} ± {r.gain_error:.2f} dB"
        right = ", ".join(f"{value:.0%}" for value in r.accuracy.values())
        lines.append(f"| {r.name} | {r.features:.4f} | {r.psnr:.2f} dB | {r.worst_psnr:.2f} dB | {gain} | {right} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24, help=f"a multiple of {BATCH}")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    found: list[Row] = []
    for row in rows(arguments.clips, arguments.steps):
        found.append(row)
        print(table([row]).splitlines()[-1], flush=True)
        result = record.describe(program="benchmarks.weights", argv=argv, rows=found)
        record.save(arguments.out, result, table(found))
    return found


if __name__ == "__main__":
    main()
