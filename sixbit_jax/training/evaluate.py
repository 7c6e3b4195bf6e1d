"""Measures what a text-to-video model draws for held-out captions: which digit, what colour, where to, how fast.

The judge looks at frames only. Its own error on true clips of held-out digits is measured by the tests.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.figure import Figure

import sixbit_jax
from sixbit_jax.training.classifier import DigitClassifier
from sixbit_jax.training.data import (
    COLOUR_NAMES,
    COLOURS,
    DIGIT_SIZE,
    DIRECTION_NAMES,
    DIRECTIONS,
    DRAWN_SIZE,
    FRAMES,
    SIZE,
    SPEED_NAMES,
    SPEEDS,
    STEADY_FRAMES,
    Phrase,
    held_out_scenes,
)

UNDECIDED = -1
INK_THRESHOLD = 0.25
MIN_INK = 10.0
"""A frame whose bright pixels sum to less than this many full ones shows no digit; real digits have 40 to 500."""
STILL = min(SPEEDS.values()) / 2
"""Pixels per frame below which a digit counts as not moving."""
MIN_COLOUR_COSINE = math.cos(math.pi / 8)
"""Half of the 45 degrees between neighbouring colours; grey and white are farther from all of them."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "digit": tuple(str(d) for d in range(10)),
    "colour": COLOUR_NAMES,
    "direction": DIRECTION_NAMES,
    "speed": SPEED_NAMES,
}
"""The judged attributes and the names of their values, in the order of the indices of `Phrase`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was seen in n clips, beside what was asked for; NumPy arrays.

    Attributes:
        expected: attribute name -> int [n], index of the value in the caption.
        seen: attribute name -> int [n], index of the value in the frames, or `UNDECIDED`, which is never right.
        velocity: float [n, 2], (y, x) pixels per frame over the first frames, 0 where nothing was found.
    """

    expected: Mapping[str, np.ndarray]
    seen: Mapping[str, np.ndarray]
    velocity: np.ndarray

    def correct(self, attribute: str) -> np.ndarray:
        """Bool [n]: the attribute is as the caption says; attribute "all" asks for all four."""
        if attribute == "all":
            return np.logical_and.reduce([self.correct(a) for a in ATTRIBUTES])
        return self.seen[attribute] == self.expected[attribute]


@nnx.jit
def _observe(
    classifier: DigitClassifier, frames: UInt8[Array, "n f 64 64 3"]
) -> tuple[Int[Array, " n"], Int[Array, " n"], Float[Array, "n 2"]]:
    """Digit and colour indices (or `UNDECIDED`) and the (y, x) velocity of one digit per clip."""
    rgb = frames.astype(jnp.float32) / 255.0
    ink = rgb.max(-1)
    bright = jnp.where(ink > INK_THRESHOLD, ink, 0.0)
    mass = bright.sum((2, 3))
    axis = jnp.arange(SIZE, dtype=jnp.float32)
    moments = jnp.stack([(bright.sum(3) * axis).sum(2), (bright.sum(2) * axis).sum(2)], -1)
    centre = moments / jnp.maximum(mass, 1.0)[..., None]
    visible = mass >= MIN_INK

    pad = DRAWN_SIZE // 2
    corner = jnp.round(centre).astype(jnp.int32)
    padded = jnp.pad(ink, ((0, 0), (0, 0), (pad, pad), (pad, pad)))

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1]), (DRAWN_SIZE, DRAWN_SIZE))

    crops = jax.vmap(jax.vmap(cut))(padded, corner) / jnp.maximum(ink.max((1, 2, 3), keepdims=True), 0.1)
    crops = jax.image.resize(crops, (*mass.shape, DIGIT_SIZE, DIGIT_SIZE), "linear")
    logits = classifier(crops.reshape(-1, DIGIT_SIZE, DIGIT_SIZE)).reshape(*mass.shape, 10)
    evidence = jnp.where(visible[..., None], jax.nn.log_softmax(logits), 0.0).sum(1)
    digit = jnp.where(visible.any(1), evidence.argmax(-1), UNDECIDED)

    mean = jnp.where((bright > 0)[..., None], rgb, 0.0).sum((1, 2, 3))
    named = jnp.asarray(list(COLOURS.values()), jnp.float32)
    cosine = (mean @ named.T) / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1.0)
    cosine = cosine / jnp.linalg.norm(named, axis=-1)
    colour = jnp.where(cosine.max(-1) >= MIN_COLOUR_COSINE, cosine.argmax(-1), UNDECIDED)

    steps = jnp.arange(STEADY_FRAMES + 1, dtype=jnp.float32) - STEADY_FRAMES / 2
    velocity = jnp.einsum("f,nfc->nc", steps / (steps**2).sum(), centre[:, : STEADY_FRAMES + 1])
    velocity = jnp.where(visible[:, : STEADY_FRAMES + 1].all(1)[:, None], velocity, 0.0)
    return digit, colour, velocity


def judge(
    frames: np.ndarray,
    scenes: Sequence[Phrase],
    classifier: DigitClassifier,
    *,
    batch: int = 32,
) -> Judgement:
    """Judges clips of one digit each against the phrases they were generated from.

    Ink is the largest channel, and its thresholded centre of mass the place of the digit. The digit's class is that
    of the largest log probability, summed over all frames, of crops around that place shrunk to MNIST's size; its
    colour is the named colour nearest in chromaticity to the mean of the bright pixels; its velocity is the
    least-squares slope of the place over frames 0 to `STEADY_FRAMES`, its direction the named one nearest to that, and
    its speed the named one nearest to its length. Slower than `STILL`, direction and speed are undecided.

    Args:
        frames: uint8 [n, 17, 64, 64, 3], RGB.
        scenes: the phrase of each clip.
        batch: clips judged at a time.

    Raises:
        ValueError: if frames are not uint8 [n, 17, 64, 64, 3] or the numbers of clips and scenes differ.
    """
    if frames.dtype != np.uint8 or frames.shape[1:] != (FRAMES, SIZE, SIZE, 3):
        raise ValueError(f"frames: found {frames.dtype} {frames.shape}, wanted uint8 [n, {FRAMES}, {SIZE}, {SIZE}, 3]")
    if not 0 < len(frames) == len(scenes):
        raise ValueError(f"found {len(frames)} clips and {len(scenes)} scenes, wanted one scene per clip")
    parts = [_observe(classifier, jnp.asarray(part)) for part in _batches(frames, batch)]
    digit, colour, velocity = (np.concatenate(p)[: len(frames)] for p in zip(*parts, strict=True))
    moving = np.linalg.norm(velocity, axis=-1) >= STILL
    direction = (velocity @ np.array(list(DIRECTIONS.values())).T).argmax(-1)
    length = np.linalg.norm(velocity, axis=-1, keepdims=True)
    speed = np.abs(length - np.array(list(SPEEDS.values()))).argmin(-1)
    return Judgement(
        expected={a: np.array([getattr(s, a) for s in scenes]) for a in ATTRIBUTES},
        seen={
            "digit": digit,
            "colour": colour,
            "direction": np.where(moving, direction, UNDECIDED),
            "speed": np.where(moving, speed, UNDECIDED),
        },
        velocity=velocity,
    )


def by_digit(frames: np.ndarray, captions: Sequence[Sequence[Phrase]]) -> tuple[np.ndarray, list[Phrase]]:
    """What `judge` takes, of clips of one or two digits: a clip for each digit, and its phrase.

    A digit of two is left alone in its clip by the channels of its colour, the others being black. So that colour is
    hardly judged: a yellow digit may be found red or green, a red one is red or missing.

    Args:
        frames: uint8 [n, 17, 64, 64, 3], RGB.
        captions: the phrases of each clip.

    Raises:
        ValueError: if the colours of two digits of a clip share a channel, or the numbers of clips and captions differ.
    """
    named = np.array(list(COLOURS.values())) > 0
    clips, phrases = [], []
    for clip, caption in zip(frames, captions, strict=True):
        seen = np.array([named[phrase.colour] for phrase in caption])
        if (seen.sum(0) > 1).any():
            raise ValueError(f"the colours of {[phrase.text for phrase in caption]} share a channel")
        clips += [clip] if len(caption) == 1 else [np.where(channels, clip, 0).astype(clip.dtype) for channels in seen]
        phrases += caption
    return np.stack(clips), phrases


def _batches(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive parts of equal length, the last one padded with repeats of the last row."""
    for start in range(0, len(array), size):
        part = array[start : start + size]
        yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])


def wilson_interval(correct: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927), by default of 95 % confidence."""
    share, weight = correct / n, z * z / n
    middle = share + weight / 2
    spread = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, (middle - spread) / (1 + weight)), min(1.0, (middle + spread) / (1 + weight))


def summary(judgement: Judgement) -> dict[str, Any]:
    """Accuracies as plain JSON values.

    Returns:
        "n", and for each attribute and "all" (all four right at once): "accuracy", "correct", "interval" (95 %,
        Wilson); for the attributes also "per_class": value name -> {"correct", "n"} by what the caption asked for.
    """
    result: dict[str, Any] = {"n": len(judgement.velocity)}
    for attribute in (*ATTRIBUTES, "all"):
        right = judgement.correct(attribute)
        correct = int(right.sum())
        result[attribute] = {
            "accuracy": correct / len(right),
            "correct": correct,
            "interval": list(wilson_interval(correct, len(right))),
        }
    for attribute, names in ATTRIBUTES.items():
        right, expected = judgement.correct(attribute), judgement.expected[attribute]
        result[attribute]["per_class"] = {
            name: {"correct": int(right[expected == i].sum()), "n": int((expected == i).sum())}
            for i, name in enumerate(names)
        }
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Generated clips and their judgement.

    Attributes:
        prompts: the caption of each clip.
        frames: uint8 [n, 17, 64, 64, 3].
        judgement: see `Judgement`.
    """

    prompts: tuple[str, ...]
    frames: np.ndarray
    judgement: Judgement

    @property
    def summary(self) -> dict[str, Any]:
        """See `summary`."""
        return summary(self.judgement)


def evaluate(
    generate: Callable[[list[str], int], np.ndarray],
    classifier: DigitClassifier,
    *,
    n: int = 192,
    seed: int = 0,
    batch: int = 16,
) -> Evaluation:
    """Generates clips for the held-out phrases, in turn, and judges them.

    Args:
        generate: `generate(prompts, seed)` -> uint8 [batch, 17, 64, 64, 3]; always called with `batch` prompts, so
            that it compiles once, and with a different seed below 2**31 each time.
        n: number of clips that count; with a multiple of 48 every held-out phrase counts equally.

    Raises:
        ValueError: if n or batch is not positive, or `generate` returns frames of another shape or type.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"n={n} and batch={batch} must be positive")
    calls = -(-n // batch)
    held_out = held_out_scenes()
    scenes = [held_out[i % len(held_out)] for i in range(calls * batch)]
    seeds = np.random.default_rng(seed).choice(2**31, calls, replace=False)
    parts = []
    for call, call_seed in enumerate(seeds):
        prompts = [s.text for s in scenes[call * batch : (call + 1) * batch]]
        parts.append(np.asarray(generate(prompts, int(call_seed))))
        if len(parts[-1]) != batch:
            raise ValueError(f"generate returned {len(parts[-1])} clips for {batch} prompts")
    frames = np.concatenate(parts)[:n]
    return Evaluation(
        prompts=tuple(s.text for s in scenes[:n]), frames=frames, judgement=judge(frames, scenes[:n], classifier)
    )


def psnr(a: Float[Array, "b *shape"], b: Float[Array, "b *shape"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio in dB of each pair, for values in [0, 1]; infinite where they are equal."""
    error = jnp.square(a - b).reshape(a.shape[0], -1).mean(-1)
    return -10.0 * jnp.log10(error)


@nnx.jit
def _reconstruction_psnr(vae: Any, video: Float[Array, "b f h w 3"]) -> Float[Array, " b"]:
    mean, _ = jnp.split(vae.encode(video), 2, axis=-1)
    decoded = jnp.clip(vae.decode(mean).astype(jnp.float32), -1.0, 1.0)
    return psnr((decoded + 1) / 2, (video + 1) / 2)


def vae_psnr(vae: Any, clips: Float[Array | np.ndarray, "n f h w 3"], *, batch: int = 8) -> float:
    """Mean over the clips of the PSNR in dB of decode(mode(encode(clip))), over the range [0, 1].

    Args:
        vae: has `encode(video)` -> moments whose last axis is mean and log variance, and `decode(latents)`.
        clips: float32 in [-1, 1].
        batch: clips at a time.
    """
    values = [_reconstruction_psnr(vae, jnp.asarray(part)) for part in _batches(np.asarray(clips), batch)]
    return float(np.concatenate(values)[: len(clips)].mean(dtype=np.float64))


def to_uint8(video: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Video in [-1, 1] (clipped to it) as 8-bit pixels, rounded to nearest."""
    return jnp.round(jnp.clip((video.astype(jnp.float32) + 1) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def contact_sheet(
    frames: UInt8[np.ndarray, "n f h w 3"], prompts: Sequence[str], path: Path, *, columns: int = 6
) -> None:
    """Writes a PNG with one row per clip: its prompt above `columns` frames, evenly spaced in time.

    Raises:
        ValueError: if the numbers of clips and prompts differ, or there is none.
    """
    if not 0 < len(frames) == len(prompts):
        raise ValueError(f"found {len(frames)} clips and {len(prompts)} prompts, wanted one prompt per clip")
    shown = np.linspace(0, frames.shape[1] - 1, columns).round().astype(int)
    figure = Figure(figsize=(1.1 * columns, 1.4 * len(frames)), layout="constrained")
    for axes, clip, prompt in zip(figure.subplots(len(frames), squeeze=False)[:, 0], frames, prompts, strict=True):
        framed = np.pad(clip[shown], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90)
        axes.imshow(np.concatenate(list(framed), axis=1), interpolation="nearest")
        axes.set_title(prompt, fontsize=8)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def loss_plot(losses: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Writes a PNG of loss curves, each a sequence of (step, loss), one above the other on log scales."""
    figure = Figure(figsize=(7, 2.6 * len(losses)), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(len(losses), squeeze=False)[:, 0], losses.items(), strict=True):
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def write_report(
    folder: Path,
    evaluation: Evaluation,
    *,
    losses: Mapping[str, Sequence[tuple[int, float]]],
    command: str,
    details: Mapping[str, Any],
    samples: int = 12,
) -> None:
    """Writes report.md, report.json, loss.png and samples.png into a folder, which is made if it is missing.

    Args:
        losses: name of each trained part -> (step, loss) in order.
        command: the exact command that made the results.
        details: further results and settings as JSON values, for example {"vae_psnr_db": 31.2}.
        samples: number of clips on the contact sheet, evenly spaced over the evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "device": jax.devices()[0].device_kind,
        "sixbit_jax": sixbit_jax.__version__,
        **{name: version(name) for name in ("jax", "flax", "optax", "numpy")},
    }
    results = evaluation.summary
    report = {
        "command": command,
        "environment": environment,
        "details": dict(details),
        "results": results,
        "losses": {name: [list(point) for point in points] for name, points in losses.items()},
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n")
    (folder / "report.md").write_text(_markdown(report))
    loss_plot(losses, folder / "loss.png")
    shown = np.linspace(0, results["n"] - 1, min(samples, results["n"])).round().astype(int)
    contact_sheet(evaluation.frames[shown], [evaluation.prompts[i] for i in shown], folder / "samples.png")


def _markdown(report: Mapping[str, Any]) -> str:
    results = report["results"]
    rows = [
        (a, f"{r['accuracy']:.1%}", f"{r['correct']} / {results['n']}", "{:.1%} to {:.1%}".format(*r["interval"]))
        for a, r in results.items()
        if a != "n"
    ]
    classes = [
        (attribute, name, f"{counts['correct']} / {counts['n']}")
        for attribute in ATTRIBUTES
        for name, counts in results[attribute]["per_class"].items()
    ]
    return "\n\n".join(
        [
            "# Mini model: text-conditioned Moving MNIST",
            f"Clips generated from captions that training never saw, n = {results['n']}. Every clip is judged by its "
            "frames alone; a clip that shows nothing measurable counts as wrong.",
            _table(("what", "accuracy", "clips", "95 % interval"), rows),
            "![Generated clips](samples.png)",
            "## By what the caption asked for",
            _table(("what", "value", "right"), classes),
            "## Training",
            "![Loss](loss.png)",
            _table(("", ""), [*report["details"].items(), *report["environment"].items()]),
            f"Command: `{report['command']}`\n",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
