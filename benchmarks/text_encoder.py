"""What storing the text encoder in NVFP4 costs: features and videos of the mini model, against its bf16 encoder.

`python -m benchmarks.text_encoder --clips 24 --out benchmarks/results/text_encoder_<device>.json`

Held-out prompts, 50 DDIM steps, guidance 6, the same noise in every row; the transformer runs in bf16 in all of them.
Products with the stored weights are in 16 bit. The floor is the encoder in float32.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.fidelity import SEMANTICS
from sixbit_jax import Pipeline, metrics
from sixbit_jax.models.split import Split
from sixbit_jax.qtensor import TEXT_ENCODER_RULES, quantize_model
from sixbit_jax.training import classifier
from sixbit_jax.training.data import Phrase, held_out_scenes
from sixbit_jax.training.evaluate import judge

BATCH = 8
"""Clips of a call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to store the text encoder, against bf16.

    Attributes:
        megabytes: of its parameters.
        features: relative L2 error of the prompts' features.
        psnr, worst_psnr: dB of 8-bit frames, mean and least over the clips.
        accuracy: share of the clips whose digit, colour and direction are right.
    """

    name: str
    megabytes: float
    features: float
    psnr: float
    worst_psnr: float
    accuracy: dict[str, float]


def encoders() -> dict[str, Split]:
    """By name, bf16 first."""
    bf16, float32 = (
        Pipeline.from_pretrained("mini", dtype=dtype).text_encoder for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert bf16 is not None
    assert float32 is not None
    nvfp4 = {
        name: Split.of(quantize_model(bf16.merge(), TEXT_ENCODER_RULES, hadamard=hadamard))
        for name, hadamard in (("NVFP4", None), ("NVFP4, no rotation", 0))
    }
    return {"bf16": bf16, "float32": float32, **nvfp4}


def run(pipe: Pipeline, scenes: list[Phrase], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [clips, text, dim] and frames of one clip a prompt."""
    prompts = [scene.text for scene in scenes]
    features = np.asarray(pipe.encode(prompts), np.float64)
    frames = [
        np.asarray(pipe(prompts[i : i + BATCH], seed=i, num_inference_steps=steps).frames)
        for i in range(0, len(prompts), BATCH)
    ]
    return features, np.concatenate(frames)


def rows(clips: int, steps: int) -> list[Row]:
    """All rows; bf16 itself is what they are compared with."""
    held_out = held_out_scenes()
    scenes = [held_out[(5 * i) % len(held_out)] for i in range(clips)]
    pipe = Pipeline.from_pretrained("mini")
    wanted, found = None, []
    for name, encoder in encoders().items():
        features, frames = run(dataclasses.replace(pipe, text_encoder=encoder), scenes, steps)
        if wanted is None:
            wanted = features, frames
            continue
        psnr = np.asarray(metrics.psnr(jnp.asarray(frames), jnp.asarray(wanted[1])), np.float64)
        judged = judge(frames, scenes, classifier.load(), batch=min(32, clips))
        row = Row(
            name=name,
            megabytes=round(sum(leaf.nbytes for leaf in jax.tree.leaves(encoder)) / 1e6, 3),
            features=round(float(np.linalg.norm(features - wanted[0]) / np.linalg.norm(wanted[0])), 5),
            psnr=round(float(psnr.mean()), 2),
            worst_psnr=round(float(psnr.min()), 2),
            accuracy={what: float(judged.correct(what).mean()) for what in SEMANTICS},
        )
        found.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    return found


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = [
        "| text encoder | parameters | features, rel. L2 | PSNR | worst | digit, colour, direction right |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.megabytes:.2f} MB | {r.features:.4f} | {r.psnr:.2f} dB | {r.worst_psnr:.2f} dB | "
        + ", ".join(f"{value:.0%}" for value in r.accuracy.values())
        + " |"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24, help=f"a multiple of {BATCH}")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    found = rows(arguments.clips, arguments.steps)
    text = table(found)
    record.save(arguments.out, record.describe(program="benchmarks.text_encoder", argv=argv, rows=found), text)
    return found


if __name__ == "__main__":
    main()
