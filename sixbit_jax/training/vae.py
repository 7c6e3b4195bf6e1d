"""Training of the mini model's VAE on rendered clips, and what is measured of it afterwards."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sixbit_jax.config import VAEConfig
from sixbit_jax.models.split import Split
from sixbit_jax.models.vae import AutoencoderKLCogVideoX, sample_moments, split_moments
from sixbit_jax.training import loop
from sixbit_jax.training.data import load_digits, sample_batch
from sixbit_jax.training.evaluate import vae_psnr
from sixbit_jax.training.recipe import VAERecipe

NAME = "vae"


def build(config: VAEConfig, key: PRNGKeyArray, dtype: Any = jnp.bfloat16) -> Split[AutoencoderKLCogVideoX]:
    """A freshly initialised VAE: float32 parameters, computing in `dtype`."""

    return Split.of(AutoencoderKLCogVideoX(config, dtype=dtype, rngs=nnx.Rngs(key)))


def reconstruction_loss(
    model: AutoencoderKLCogVideoX, video: Float[Array, "b f h w c"], key: PRNGKeyArray, recipe: VAERecipe
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss that `VAERecipe` describes, and its terms; float32.

    Args:
        video: float32 in [-1, 1].
        key: for the latents, which are sampled.
    """
    moments = model.encode(video).astype(jnp.float32)
    mean, log_variance = split_moments(moments)
    error = model.decode(sample_moments(moments, key)).astype(jnp.float32) - video
    neighbours = [jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3)]
    terms = {
        "mse": jnp.mean(error**2),
        "l1": jnp.mean(jnp.abs(error)),
        "gradient": neighbours[0] + neighbours[1],
        "kl": 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance),
    }
    loss = functools.reduce(jnp.add, [getattr(recipe, name) * value for name, value in terms.items()])
    return loss, terms


def _digits(split: Literal["train", "held_out"]) -> dict[str, jax.Array]:
    images, labels = load_digits(split)
    return {"digits": jnp.asarray(images), "labels": jnp.asarray(labels)}


def measure(model: Split[AutoencoderKLCogVideoX], recipe: VAERecipe, key: PRNGKeyArray) -> tuple[float, float]:
    """-> (scaling factor, PSNR in dB on held-out digits), each over `recipe.measured_clips` clips.

    The scaling factor is one over the standard deviation of sampled latents of training clips.
    """
    batch = recipe.optimizer.batch
    batches = -(-recipe.measured_clips // batch)

    @jax.jit
    def moments_of_latents(model: Split, digits: UInt8[Array, "n 28 28"], labels: Array, key: PRNGKeyArray):
        draw_key, latent_key = jax.random.split(key)
        moments = model.merge().encode(sample_batch(draw_key, digits, labels, batch).video)
        latents = sample_moments(moments.astype(jnp.float32), latent_key)
        return jnp.mean(latents), jnp.mean(latents**2)

    @jax.jit
    def clips(digits: UInt8[Array, "n 28 28"], labels: Array, key: PRNGKeyArray):
        return sample_batch(key, digits, labels, batch).video

    keys = jax.random.split(key, 2 * batches)
    first, second = jnp.mean(
        jnp.asarray([moments_of_latents(model, **_digits("train"), key=k) for k in keys[:batches]]), axis=0
    )
    quality = [vae_psnr(model.merge(), clips(**_digits("held_out"), key=k), batch=batch) for k in keys[batches:]]
    return float(jax.lax.rsqrt(second - first**2)), sum(quality) / batches


def train(recipe: VAERecipe, *, seed: int, budget: loop.Budget, outputs: loop.Outputs) -> loop.TrainState:
    """Trains, or resumes from `outputs.checkpoints`; the weight files carry the configuration in their metadata."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    fresh = build(recipe.config, init_key)
    optimizer = recipe.optimizer

    def loss_fn(params: nnx.State, data: dict[str, Array], key: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
        draw_key, latent_key = jax.random.split(key)
        video = sample_batch(draw_key, data["digits"], data["labels"], optimizer.batch).video
        return reconstruction_loss(nnx.merge(fresh.graph, params), video, latent_key, recipe)

    state, fraction = loop.restore_checkpoint(outputs.checkpoints, loop.init_state(fresh.params, optimizer))
    outputs = dataclasses.replace(outputs, metadata={"config": json.dumps(recipe.config.to_dict())})
    return loop.train(
        loss_fn,
        state,
        _digits("train"),
        key=run_key,
        recipe=optimizer,
        budget=budget,
        outputs=outputs,
        fraction=fraction,
    )


def finish(folder: Path, recipe: VAERecipe, *, seed: int) -> Split[AutoencoderKLCogVideoX]:
    """Measures the VAE in `folder`, unless that is done, and stores the scaling factor and the PSNR in its files.

    Returns:
        The VAE; its configuration has the scaling factor.
    """
    model = load(folder)
    metadata = loop.load_metadata(folder, NAME)
    if "psnr" in metadata:
        return model
    scaling, psnr = measure(model, recipe, jax.random.fold_in(jax.random.key(seed), 1))
    config = dataclasses.replace(model.merge().config, scaling_factor=round(scaling, 6))
    metadata |= {"config": json.dumps(config.to_dict()), "psnr": f"{psnr:.3f}"}
    loop.save_weights(folder, NAME, model.params, dtype=jnp.float32, metadata=metadata)
    return load(folder)


def load(folder: Path, dtype: Any = jnp.bfloat16) -> Split[AutoencoderKLCogVideoX]:
    """The VAE that `train` wrote: float32 parameters, computing in `dtype`.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    config = VAEConfig.from_dict(json.loads(loop.load_metadata(folder, NAME)["config"]))
    abstract = jax.eval_shape(lambda: build(config, jax.random.key(0), dtype))
    return Split(params=loop.load_weights(folder, NAME, abstract.params), graph=abstract.graph)
