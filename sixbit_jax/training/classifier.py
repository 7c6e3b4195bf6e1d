"""A small convolutional digit classifier, the judge of what the mini model draws.

A trained copy is bundled; `python -m sixbit_jax.training.classifier` trains it again and rewrites it.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.flax
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from convert.engine import dotted
from sixbit_jax.training.data import DIGIT_SIZE, load_digits

ASSET = Path(__file__).parents[1] / "assets" / "digit_classifier.safetensors"
STEPS = 1400
BATCH = 64
_SHIFT, _ANGLE, _LOG_SCALE, _LOG_GAMMA = 2.0, 0.2, 0.12, 0.5


class DigitClassifier(nnx.Module):
    """Four 3x3 convolutions, the largest value of each feature over the image, and one linear layer.

    About 61,000 float32 parameters. `__call__` maps images, float32 [B, 28, 28] in [0, 1] with ink bright and its
    centre of mass in the middle as in MNIST, to logits, float32 [B, 10].
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv_2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.conv_3 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.conv_4 = nnx.Conv(64, 64, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "b 28 28"]) -> Float[Array, "b 10"]:
        x = nnx.relu(self.conv_1(images[..., None]))
        x = nnx.relu(self.conv_2(x))
        x = nnx.relu(self.conv_3(x))
        x = nnx.relu(self.norm(self.conv_4(x)))
        return self.out(x.max(axis=(1, 2)))


def augment(key: PRNGKeyArray, images: Float[Array, "b 28 28"]) -> Float[Array, "b 28 28"]:
    """Random shifts (2 pixels), rotations (0.2 rad), scales (12 %) and stroke weights, each image its own."""

    def warp(key: PRNGKeyArray, image: Float[Array, "28 28"]) -> Float[Array, "28 28"]:
        draw = jax.random.uniform(key, (5,), minval=-1.0, maxval=1.0)
        angle, scale = _ANGLE * draw[0], jnp.exp(_LOG_SCALE * draw[1])
        centre = (DIGIT_SIZE - 1) / 2
        axis = jnp.arange(DIGIT_SIZE, dtype=jnp.float32) - centre
        y, x = jnp.meshgrid(axis, axis, indexing="ij")
        sine, cosine = jnp.sin(angle) / scale, jnp.cos(angle) / scale
        source = [
            cosine * y - sine * x + _SHIFT * draw[2] + centre,
            sine * y + cosine * x + _SHIFT * draw[3] + centre,
        ]
        warped = jax.scipy.ndimage.map_coordinates(image, source, order=1)
        return jnp.maximum(warped, 1e-6) ** jnp.exp(_LOG_GAMMA * draw[4])

    return jax.vmap(warp)(jax.random.split(key, images.shape[0]), images)


def train(seed: int = 0, *, steps: int = STEPS) -> DigitClassifier:
    """Trains on the training split with Adam and a cosine schedule; the same seed gives the same classifier."""
    images, labels = (jnp.asarray(a) for a in load_digits("train"))
    graph, params = nnx.split(DigitClassifier(rngs=nnx.Rngs(seed)))
    optimiser = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3, pct_start=0.1), weight_decay=1e-3)

    def loss(params: nnx.State, batch: jax.Array, targets: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def update(
        params: nnx.State, state: optax.OptState, key: PRNGKeyArray, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, optax.OptState]:
        pick_key, augment_key = jax.random.split(key)
        pick = jax.random.choice(pick_key, images.shape[0], (BATCH,), replace=False)
        batch = augment(augment_key, images[pick].astype(jnp.float32) / 255.0)
        updates, state = optimiser.update(jax.grad(loss)(params, batch, labels[pick]), state, params)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for key in jax.random.split(jax.random.key(seed), steps):
        params, state = update(params, state, key, images, labels)
    return nnx.merge(graph, params)


def accuracy(classifier: DigitClassifier, images: UInt8[np.ndarray, "n 28 28"], labels: Int[np.ndarray, " n"]) -> float:
    """Share of the images, uint8, whose class the classifier names."""
    logits = nnx.jit(lambda model, x: model(x))(classifier, jnp.asarray(images, jnp.float32) / 255.0)
    return float(np.mean(np.asarray(logits).argmax(-1) == labels))


def save(path: Path, classifier: DigitClassifier, *, metadata: dict[str, str]) -> None:
    """Writes the parameters as float32 safetensors with the given metadata."""
    tensors = dotted(nnx.state(classifier, nnx.Param))
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.flax.save_file(tensors, path, metadata=metadata)


def load(path: Path = ASSET) -> DigitClassifier:
    """Reads a classifier that `save` wrote; by default the bundled one.

    Raises:
        ValueError: if the names or shapes in the file are not those of `DigitClassifier`.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: DigitClassifier(rngs=nnx.Rngs(0))))
    wanted = {k: v.shape for k, v in dotted(state).items()}
    tensors = safetensors.flax.load_file(path)
    found = {k: v.shape for k, v in tensors.items()}
    if found != wanted:
        raise ValueError(f"{path} is not a digit classifier: found {found}, wanted {wanted}")
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(tensors, sep="."))
    return nnx.merge(graph, state)


def metadata(path: Path = ASSET) -> dict[str, str]:
    """The metadata of a file that `save` wrote, among it "held_out_accuracy"."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


def main() -> None:
    """Trains the bundled classifier, writes it and prints its accuracy on the held-out digits."""
    start = time.perf_counter()
    classifier = train()
    seconds = time.perf_counter() - start
    reached = accuracy(classifier, *load_digits("held_out"))
    save(ASSET, classifier, metadata={"held_out_accuracy": f"{reached:.4f}", "seed": "0", "steps": str(STEPS)})
    print(f"{ASSET.name}: {reached:.2%} of the held-out digits, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
