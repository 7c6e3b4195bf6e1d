"""Measures a run on the 16-bit route: how volatile blocks are, and what each low-bit route would have cost there.

For calibration alone. Nothing of an activation leaves the compiled program but the numbers of `Measured`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Float32

from pallas_kernels.delta_cache import apply_delta, store_delta
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.cogvideox import BlockContext, CogVideoXTransformer3DModel
from sixbit_jax.models.layers import LayerNorm
from sixbit_jax.models.linears import SITES, Modulation, modulated
from sixbit_jax.models.split import Split
from sixbit_jax.precision import delta_cache
from sixbit_jax.precision.linears import RoutedLinears, stacked
from sixbit_jax.qtensor import QuantLinear
from sixbit_jax.sampling import sampler
from sixbit_jax.sampling.schedulers import Schedule

LOW_BIT = ("nvfp4", "int8")
"""Routes whose errors are measured."""
STORED = ("int8", "nvfp4")
"""Formats of the delta cache whose errors are measured."""


@struct.dataclass(kw_only=True)
class Measured:
    """Float32, [blocks, ...] of one step; calibration stacks [prompts, steps, blocks, ...].

    Attributes:
        volatility: G = |Y - X|_1 / |X|_1 of the block (2).
        delta_change: d = |D - D_old|_1 / |D_old|_1 from step to step (3); infinite at the first.
        error: [.., sites, 2], relative Frobenius error of the site's product on each of `LOW_BIT` (2).
        outlier: [.., sites], max|x| / mean|x| of the site's activation (4).
        delta_error: [.., sites], |D_site - D|_1 / |D|_1 of the block with that site alone on NVFP4.
        cache_error: [.., 2], |stored D - D|_1 / |D|_1 for each of `STORED`.
    """

    volatility: jax.Array | np.ndarray
    delta_change: jax.Array | np.ndarray
    error: jax.Array | np.ndarray
    outlier: jax.Array | np.ndarray
    delta_error: jax.Array | np.ndarray
    cache_error: jax.Array | np.ndarray


class MeasuringLinears:
    """A block's linears on the 16-bit route, beside which the low-bit routes are tried; a `models.linears.Linears`.

    After the block has run, `error` ([2]) and `outlier` ([]) hold what was measured, by site.
    """

    def __init__(self) -> None:
        self._exact = fixed_route("16bit")
        self.error: dict[str, jax.Array] = {}
        self.outlier: dict[str, jax.Array] = {}

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        self._measure(site, linear, modulated(norm, x, modulation))
        return self._exact.normed(site, linear, x, norm, modulation, gelu=gelu)

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        self._measure(site, linear, x)
        return self._exact.gated(site, linear, x, residual, modulation)

    def _measure(self, site: str, linear: QuantLinear, x: Float[Array, "batch tokens k"]) -> None:
        product = QuantLinear(linear.weight, None, dtype=jnp.float32)
        exact = product(x)
        error = [jnp.linalg.norm(product(x.astype(jnp.float32), route=route) - exact) for route in LOW_BIT]
        self.error[site] = jnp.stack(error) / jnp.linalg.norm(exact)
        magnitude = jnp.abs(x.astype(jnp.float32))
        self.outlier[site] = magnitude.max() / magnitude.mean()


def fixed_route(route: str) -> RoutedLinears:
    """All sites of a block on one route."""
    nothing = jnp.zeros((len(SITES),), jnp.int32)
    return RoutedLinears((route,), nothing, None, outlier_limit=0.0, carrier="exact")


class OneSite:
    """One site of a block on a route, the others in 16 bit; a `models.linears.Linears`."""

    def __init__(self, site: str, route: str):
        self._linears = {name: fixed_route(route if name == site else "16bit") for name in SITES}

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        return self._linears[site].normed(site, linear, x, norm, modulation, gelu=gelu)

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        return self._linears[site].gated(site, linear, x, residual, modulation)


def measure_blocks(
    model: CogVideoXTransformer3DModel,
    x: Float[Array, "samples tokens dim"],
    context: BlockContext,
    last: Float[Array, "blocks samples tokens dim"],
    first: Any,
) -> tuple[Float[Array, "samples tokens dim"], Float[Array, "blocks samples tokens dim"], Measured]:
    """All blocks of one forward pass of one video, on the 16-bit route.

    Args:
        model: with quantised linears.
        x, context: from `embed`.
        last: the blocks' deltas at the step before.
        first: bool []; whether there was none.

    Returns:
        The stream, this step's deltas in the dtype of `last`, and what was measured.
    """
    graph, params = nnx.split(model.blocks)

    def body(x: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
        params, last = inputs
        block, linears = nnx.merge(graph, params), MeasuringLinears()

        def delta_of(y: jax.Array) -> Float32[Array, "samples tokens dim"]:
            return y.astype(jnp.float32) - x.astype(jnp.float32)

        y = block(x, context, linears)
        delta = delta_of(y)
        noisy = [delta_of(block(x, context, OneSite(site, "nvfp4"))) for site in SITES]
        stored = [_stored(format, delta) for format in STORED]
        measured = Measured(
            volatility=_relative(delta, x),
            delta_change=jnp.where(first, jnp.inf, _relative(delta - last.astype(jnp.float32), last)),
            error=jnp.stack([linears.error[site] for site in SITES]),
            outlier=stacked(linears.outlier),
            delta_error=jnp.stack([_relative(other - delta, delta) for other in noisy]),
            cache_error=jnp.stack([_relative(other - delta, delta) for other in stored]),
        )
        return y, (delta.astype(last.dtype), measured)

    x, (deltas, measured) = jax.lax.scan(body, x, (params, last))
    return x, deltas, measured


@jax.jit
def sample(
    transformer: Split[CogVideoXTransformer3DModel],
    schedule: Schedule,
    guidance_scale: sampler.PerStep,
    latents: Float32[Array, "1 frames channels height width"],
    conditioning: sampler.Conditioning,
) -> tuple[Float32[Array, "1 frames channels height width"], Measured]:
    """`sampler.sample` of one video on the 16-bit route -> its latents, and what each step measured.

    Carries the last step's deltas in the model's dtype: as much memory as a 16-bit delta cache.

    Raises:
        ArgumentError: if the linears are not quantised.
    """
    model = transformer.merge()
    if not all(isinstance(getattr(model.blocks, site), QuantLinear) for site in SITES):
        raise ArgumentError("the model's linears are not quantised, so there are no low-bit routes to measure")

    def body(carry: tuple, inputs: sampler.StepInputs) -> tuple[tuple, Measured]:
        state, last = carry
        samples, text, timestep = sampler.forward_inputs(state, inputs, conditioning)
        x, context = model.embed(samples, text, timestep)
        x, last, measured = measure_blocks(model, x, context, last, inputs.index == 0)
        state, _ = sampler.advance(state, inputs, conditioning, model.project(x, context, samples.shape))
        return (state, last), measured

    state, inputs = sampler.prepare(model, schedule, guidance_scale, latents, conditioning, None)
    row = jax.tree.map(lambda value: value[0], inputs)
    x = jax.eval_shape(lambda: model.embed(*sampler.forward_inputs(state, row, conditioning))[0])
    last = jnp.zeros((model.config.num_layers, *x.shape), x.dtype)
    (state, _), measured = jax.lax.scan(body, (state, last), inputs)
    return state.latents, measured


def _relative(x: jax.Array, base: jax.Array) -> Float32[Array, ""]:
    return jnp.abs(x.astype(jnp.float32)).sum() / jnp.abs(base.astype(jnp.float32)).sum()


def _stored(format: str, delta: Float32[Array, "samples tokens dim"]) -> Float32[Array, "samples tokens dim"]:
    """What a delta cache of this format gives back."""
    cache = delta_cache.init(format, 1, 1, delta.shape, delta.dtype)
    first = jnp.asarray(0, jnp.int32)
    nothing = jnp.zeros_like(delta)
    stored, _ = store_delta(nothing, delta, delta_cache.entry(cache, first, first), compare=False)
    return apply_delta(nothing, stored)
