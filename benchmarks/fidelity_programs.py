"""The programs of the study: a video a lane, each under a policy of its own, compiled in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from sixbit_jax.models.split import Split
from sixbit_jax.precision import PrecisionPolicy, measuring
from sixbit_jax.precision.blocks import PrecisionTrace
from sixbit_jax.sampling import sampler


@jax.jit
def run_lanes(
    transformer: Split, schedule: Any, scale: Any, latents: jax.Array, conditioning: Any, policies: PrecisionPolicy
) -> tuple[jax.Array, PrecisionTrace]:
    """`sampler.sample` of one video a lane, each under a policy of its own -> latents [lanes, ...] and their traces."""

    def one(latents: jax.Array, policy: PrecisionPolicy, *texts: jax.Array) -> tuple[jax.Array, PrecisionTrace]:
        latents, trace = sampler.sample(transformer, schedule, scale, latents[None], _single(*texts), policy=policy)
        return latents[0], trace.precision

    return jax.lax.map(lambda lane: one(*lane), (latents, policies, *_texts(conditioning)))


def _texts(conditioning: sampler.Conditioning) -> tuple[jax.Array, jax.Array, jax.Array]:
    return conditioning.prompt_embeds, conditioning.negative_prompt_embeds, conditioning.keys


def _single(prompt: jax.Array, negative: jax.Array, key: jax.Array) -> sampler.Conditioning:
    """Of one video."""
    return sampler.Conditioning(prompt_embeds=prompt[None], negative_prompt_embeds=negative[None], keys=key[None])


@jax.jit
def measure_lanes(
    transformer: Split, schedule: Any, scale: Any, latents: jax.Array, conditioning: Any
) -> tuple[jax.Array, Any]:
    """`measuring.sample` of one video a lane."""

    def one(latents: jax.Array, *texts: jax.Array) -> tuple[jax.Array, Any]:
        return measuring.sample(transformer, schedule, scale, latents[None], _single(*texts))

    return jax.lax.map(lambda lane: one(*lane), (latents, *_texts(conditioning)))


class Programs:
    """Compiles programs in the background, one for each function and structure of its arguments, and runs them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(8)
        self._compiled: dict[Any, Future] = {}

    def prepare(self, function: Callable, *args: Any) -> None:
        """Starts to compile what `run` will need."""
        if (key := self._key(function, args)) not in self._compiled:
            self._compiled[key] = self._pool.submit(lambda: function.lower(*args).compile())

    def run(self, function: Callable, *args: Any) -> Any:
        """Calls a jitted function, by its prepared program if there is one."""
        prepared = self._compiled.get(self._key(function, args))
        return jax.block_until_ready((prepared.result() if prepared else function)(*args))

    @staticmethod
    def _key(function: Callable, args: tuple) -> Any:
        leaves, structure = jax.tree.flatten(args)
        return function, structure, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
