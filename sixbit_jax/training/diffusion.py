"""Joint training of the mini model's transformer and text encoder on latents of its frozen VAE."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX, sample_moments
from sixbit_jax.sampling.schedulers import add_noise, alphas_cumprod, get_velocity
from sixbit_jax.training import loop
from sixbit_jax.training.data import compose_token_ids, load_digits, sample_batch
from sixbit_jax.training.recipe import DiffusionRecipe
from sixbit_jax.training.tokenizer import EOS_ID, PAD_ID, UNK_ID, build_tokenizer, caption_tokens

NAME = "diffusion"
_ZERO_AT_START = (
    "transformer.blocks.norm1.linear.",
    "transformer.blocks.norm2.linear.",
    "transformer.norm_out.linear.",
    "transformer.proj_out.",
)


@struct.dataclass(kw_only=True)
class Networks:
    """The two networks that are trained; a pytree of their parameters.

    Attributes:
        transformer: predicts the velocity.
        text_encoder: turns token ids into what the transformer reads.
    """

    transformer: Split[CogVideoXTransformer3DModel]
    text_encoder: Split[T5EncoderModel]


@struct.dataclass(kw_only=True)
class Pool:
    """Encoded training clips held on the device.

    Attributes:
        latents: bfloat16 [clips, frames, channels, height, width], scaled.
        ids: int32 [clips, text], token ids of the captions.
    """

    latents: Any
    ids: Any


def build(recipe: DiffusionRecipe, key: PRNGKeyArray, dtype: Any = jnp.bfloat16) -> Networks:
    """Freshly initialised networks: float32 parameters, computing in `dtype`.

    Modulations, and with them the gates, and the output start at zero (DiT, arXiv:2212.09748): every block starts as
    the identity and the first prediction is zero.
    """

    transformer_key, text_key = jax.random.split(key)
    networks = Networks(
        transformer=Split.of(
            CogVideoXTransformer3DModel(recipe.transformer, dtype=dtype, rngs=nnx.Rngs(transformer_key))
        ),
        text_encoder=Split.of(T5EncoderModel(recipe.text_encoder, dtype=dtype, rngs=nnx.Rngs(text_key))),
    )
    params = trainable(networks)
    leaves = {
        name: jnp.zeros_like(x) if name.startswith(_ZERO_AT_START) else x
        for name, x in loop.named_leaves(params).items()
    }
    return with_params(networks, loop.from_named_leaves(params, leaves))


def trainable(networks: Networks) -> dict[str, nnx.State]:
    """The parameters, by part."""
    return {"transformer": networks.transformer.params, "text_encoder": networks.text_encoder.params}


def with_params(networks: Networks, params: dict[str, nnx.State]) -> Networks:
    """The networks with other parameters, as `trainable` returns them."""
    return Networks(
        transformer=dataclasses.replace(networks.transformer, params=params["transformer"]),
        text_encoder=dataclasses.replace(networks.text_encoder, params=params["text_encoder"]),
    )


def forget_words(key: PRNGKeyArray, ids: Int[Array, "b text"], recipe: DiffusionRecipe) -> Int[Array, "b text"]:
    """Replaces single words by <unk>, and the whole prompt by the empty one, as often as the recipe says."""
    word_key, prompt_key = jax.random.split(key)
    unknown = jax.random.bernoulli(word_key, recipe.unknown_words, ids.shape) & (ids > UNK_ID)
    ids = jnp.where(unknown, jnp.asarray(UNK_ID, ids.dtype), ids)
    empty = jnp.full(ids.shape[1:], PAD_ID, ids.dtype).at[0].set(EOS_ID)
    return jnp.where(jax.random.bernoulli(prompt_key, recipe.prompt_dropout, (ids.shape[0], 1)), empty, ids)


def velocity_loss(
    networks: Networks,
    latents: Float[Array, "b frames channels height width"],
    ids: Int[Array, "b text"],
    key: PRNGKeyArray,
    recipe: DiffusionRecipe,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean squared error of the predicted velocity, and the same over the noisier half of the timesteps.

    Timesteps are uniform over the schedule, but evenly spread within the batch (one in each of b equal intervals),
    which takes most of their share out of the variance of the gradient.

    Args:
        latents: clean, scaled, any float dtype.
        ids: token ids, prompts already dropped where they should be.
    """
    time_key, noise_key = jax.random.split(key)
    steps, batch = recipe.scheduler.num_train_timesteps, latents.shape[0]
    alphas = alphas_cumprod(recipe.scheduler)
    position = (jnp.arange(batch, dtype=jnp.float32) + jax.random.uniform(time_key, (batch,))) / batch
    timestep = jnp.minimum((position * steps).astype(jnp.int32), steps - 1)
    clean = latents.astype(jnp.float32)
    noise = jax.random.normal(noise_key, clean.shape, jnp.float32)
    text = networks.text_encoder.merge()(ids)
    predicted = networks.transformer.merge()(add_noise(alphas, clean, noise, timestep), text, timestep)
    error = (predicted.astype(jnp.float32) - get_velocity(alphas, clean, noise, timestep)) ** 2
    noisier = jnp.mean(error[batch // 2 :])
    return jnp.mean(error), {"loss_noisier_half": noisier}


def make_encoder(
    vae: Split[AutoencoderKLCogVideoX], recipe: DiffusionRecipe, clips: int, key: PRNGKeyArray
) -> Callable[[Pool, Int[Array, ""]], Pool]:
    """The jitted function (pool, n) -> pool that writes the n-th group of `clips` new clips into its place.

    The pool is used as a ring and donated. Group n depends on `key` and n alone.

    Raises:
        ValueError: if `clips` does not divide into batches, or the pool into groups.
    """
    if clips % recipe.encode_batch or recipe.pool_clips % clips:
        raise ValueError(
            f"refresh_clips={clips} must divide by encode_batch={recipe.encode_batch}, "
            f"and pool_clips={recipe.pool_clips} by refresh_clips"
        )
    images, labels = (jnp.asarray(x) for x in load_digits("train"))
    tokens = caption_tokens(build_tokenizer())
    phrases, joiner = jnp.asarray(tokens.phrases), jnp.asarray(tokens.joiner)
    scale = vae.merge().config.scaling_factor

    def encode(key: PRNGKeyArray, vae: Split, images: UInt8[Array, "n 28 28"], labels: Int[Array, " n"]) -> Pool:
        draw_key, latent_key = jax.random.split(key)
        clip = sample_batch(draw_key, images, labels, recipe.encode_batch)
        latents = sample_moments(vae.merge().encode(clip.video).astype(jnp.float32), latent_key)
        ids = compose_token_ids(
            clip.scene,
            phrases,
            joiner,
            length=recipe.transformer.max_text_seq_length,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
        )
        return Pool(latents=(scale * latents.transpose(0, 1, 4, 2, 3)).astype(jnp.bfloat16), ids=ids)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(pool: Pool, group: Int[Array, ""], vae: Split, images: Array, labels: Array) -> Pool:
        keys = jax.random.split(jax.random.fold_in(key, group), clips // recipe.encode_batch)
        new = jax.lax.map(lambda k: encode(k, vae, images, labels), keys)
        start = (group % (recipe.pool_clips // clips)) * clips

        def write(ring: Array, groups: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(ring, groups.reshape(clips, *ring.shape[1:]), start, axis=0)

        return jax.tree.map(write, pool, new)

    return lambda pool, group: fill(pool, group, vae, images, labels)


def empty_pool(recipe: DiffusionRecipe, vae: Split[AutoencoderKLCogVideoX]) -> Pool:
    """A pool of zeros, to be filled by `make_encoder`."""
    config, transformer = vae.merge().config, recipe.transformer
    frames = (transformer.sample_frames - 1) // transformer.temporal_compression_ratio + 1
    shape = (frames, config.latent_channels, transformer.sample_height, transformer.sample_width)
    return Pool(
        latents=jnp.zeros((recipe.pool_clips, *shape), jnp.bfloat16),
        ids=jnp.zeros((recipe.pool_clips, transformer.max_text_seq_length), jnp.int32),
    )


def train(
    recipe: DiffusionRecipe,
    vae: Split[AutoencoderKLCogVideoX],
    *,
    seed: int,
    budget: loop.Budget,
    outputs: loop.Outputs,
    start_from: Path | None = None,
) -> loop.TrainState:
    """Trains, or resumes from `outputs.checkpoints`.

    Args:
        vae: trained and measured; not changed.
        start_from: folder of weights that an earlier run wrote, to start from instead of random ones. The optimizer
            and the budget start anew, unlike at a resumption.
    """
    init_key, run_key, pool_key = jax.random.split(jax.random.key(seed), 3)
    fresh = build(recipe, init_key)
    params, optimizer = trainable(fresh), recipe.optimizer
    if start_from is not None:
        params = loop.load_weights(start_from, NAME, params)
    state, fraction = loop.restore_checkpoint(outputs.checkpoints, loop.init_state(params, optimizer))

    def loss_fn(params: dict[str, nnx.State], pool: Pool, key: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
        pick_key, word_key, loss_key = jax.random.split(key, 3)
        pick = jax.random.randint(pick_key, (optimizer.batch,), 0, recipe.pool_clips)
        ids = forget_words(word_key, pool.ids[pick], recipe)
        return velocity_loss(with_params(fresh, params), pool.latents[pick], ids, loss_key, recipe)

    # Before compiled call n the pool holds groups n to n + (groups of a pool), whether or not the run was resumed.
    encoder = make_encoder(vae, recipe, recipe.refresh_clips, pool_key)
    groups = recipe.pool_clips // recipe.refresh_clips
    first = int(state.step) // optimizer.steps_per_call
    pool = empty_pool(recipe, vae)
    for group in range(first, first + groups):
        pool = encoder(pool, jnp.asarray(group))
    return loop.train(
        loss_fn,
        state,
        pool,
        key=run_key,
        recipe=optimizer,
        budget=budget,
        outputs=dataclasses.replace(outputs, metadata={"configs": _configs(recipe)}),
        fraction=fraction,
        refresh=lambda pool, call: encoder(pool, jnp.asarray(call + groups)),
    )


def _configs(recipe: DiffusionRecipe) -> str:
    parts = {"transformer": recipe.transformer, "text_encoder": recipe.text_encoder, "scheduler": recipe.scheduler}
    return json.dumps({name: config.to_dict() for name, config in parts.items()})


def load(folder: Path, recipe: DiffusionRecipe, dtype: Any = jnp.bfloat16) -> Networks:
    """The networks that `train` wrote: float32 parameters, computing in `dtype`.

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: if they were trained with configurations other than the recipe's.
    """
    if (found := loop.load_metadata(folder, NAME)["configs"]) != (wanted := _configs(recipe)):
        raise ValueError(f"{folder}: the weights were trained with {found}, the recipe says {wanted}")
    abstract = jax.eval_shape(lambda: build(recipe, jax.random.key(0), dtype))
    return with_params(abstract, loop.load_weights(folder, NAME, trainable(abstract)))
