"""Random keys of videos, and the noise that their sampling starts from."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from sixbit_jax.errors import ArgumentError


@jax.jit(static_argnames="shape")
def initial_latents(
    keys: jax.Array, shape: tuple[int, int, int, int]
) -> Float[Array, "batch frames channels height width"]:
    """Standard normal starting noise, float32.

    Args:
        keys: one a video, from `video_keys`.
        shape: of one video's latents, [frames, channels, height, width].
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def video_keys(seed: int | np.integer | Sequence[int], batch: int) -> jax.Array:
    """One key a video: of its own seed, or of one seed and its position in the batch.

    A list with one seed gives that seed's first video, so a video of a batch can be made again alone.

    Args:
        seed: one for all videos, or a sequence with one for each.
        batch: number of videos.

    Returns:
        Typed keys [batch].

    Raises:
        ArgumentError: if several seeds are given and their number is not `batch`, or one is not in 0..2^32 - 1.
    """
    seeds = seed_list(seed, batch)
    positions = np.arange(batch) if isinstance(seed, int | np.integer) else np.zeros(batch)
    return _keys(np.asarray(seeds, np.uint32), positions.astype(np.uint32))


@jax.jit
def _keys(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)


def seed_list(seed: int | np.integer | Sequence[int], batch: int) -> list[int]:
    """The seed of each video; raises as `video_keys` does."""
    seeds = [seed] * batch if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != batch:
        raise ArgumentError(f"seed: got {len(seeds)} seeds for {batch} videos; give one seed, or one for each video")
    for value in seeds:
        if not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
            raise ArgumentError(f"seed={value!r} must be an integer between 0 and 2^32 - 1")
    return [int(value) for value in seeds]
