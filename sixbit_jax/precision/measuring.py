"""Measures a run on the 16-bit route: how volatile blocks are, and what each low-bit route would have cost there.

For calibration alone. Nothing of an activation leaves the compiled program but the numbers of `Measured`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32

from pallas_kernels.delta_cache import apply_delta, store_delta
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.layers import LayerNorm
from sixbit_jax.models.linears import SITES, Modulation, modulated
from sixbit_jax.models.split import Split
from sixbit_jax.precision import delta_cache
from sixbit_jax.precision.blocks import Block, blocks_of
from sixbit_jax.precision.linears import RoutedLinears, check_site, stacked
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

    Raises:
        ArgumentError: on a linear that is not quantised, or at a site that the block does not have.
    """

    def __init__(self, sites: tuple[str, ...]):
        self._sites, self._exact = sites, fixed_route("16bit", sites)
        self.error: dict[str, jax.Array] = {}
        self.outlier: dict[str, jax.Array] = {}

    def __call__(self, site: str, linear: Any, x: jax.Array) -> jax.Array:
        self._measure(site, linear, x)
        return self._exact(site, linear, x)

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        self._measure(site, linear, modulated(norm, x, modulation))
        return self._exact.normed(site, linear, x, norm, modulation, gelu=gelu)

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        self._measure(site, linear, x)
        return self._exact.gated(site, linear, x, residual, modulation)

    def _measure(self, site: str, linear: QuantLinear, x: Float[Array, "batch tokens k"]) -> None:
        check_site(site, self._sites, self.error)
        if not isinstance(linear, QuantLinear):
            raise ArgumentError(f"the linear at {site!r} is not quantised, so there are no low-bit routes to measure")
        product = QuantLinear(linear.weight, None, dtype=jnp.float32)
        exact = product(x)
        error = [jnp.linalg.norm(product(x.astype(jnp.float32), route=route) - exact) for route in LOW_BIT]
        self.error[site] = jnp.stack(error) / jnp.linalg.norm(exact)
        magnitude = jnp.abs(x.astype(jnp.float32))
        self.outlier[site] = magnitude.max() / magnitude.mean()


def fixed_route(route: str, sites: tuple[str, ...]) -> RoutedLinears:
    """All sites of a block on one route."""
    nothing = jnp.zeros((len(sites),), jnp.int32)
    return RoutedLinears(sites, (route,), nothing, None, outlier_limit=0.0, carrier="exact")


class OneSite:
    """One site of a block on a route, the others in 16 bit; a `models.linears.Linears`."""

    def __init__(self, site: str, route: str, sites: tuple[str, ...]):
        self._linears = {name: fixed_route(route if name == site else "16bit", sites) for name in sites}

    def __call__(self, site: str, linear: Any, x: jax.Array) -> jax.Array:
        return self._linears[site](site, linear, x)

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        return self._linears[site].normed(site, linear, x, norm, modulation, gelu=gelu)

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        return self._linears[site].gated(site, linear, x, residual, modulation)


def measure_blocks(
    block: Block,
    params: Any,
    x: Float[Array, "samples tokens dim"],
    context: Any,
    last: Float[Array, "blocks samples tokens dim"],
    first: Any,
    *,
    sites: Sequence[str],
) -> tuple[Float[Array, "samples tokens dim"], Float[Array, "blocks samples tokens dim"], Measured]:
    """All blocks of one forward pass of one group, on the 16-bit route.

    Args:
        block, params, x, context, sites: as in `blocks.scan_blocks`; every site's linear quantised.
        last: the blocks' deltas at the step before.
        first: bool []; whether there was none.

    Returns:
        The stream, this step's deltas in the dtype of `last`, and what was measured.

    Raises:
        ArgumentError: if a linear is not quantised, or not at one of the sites.
    """
    sites = tuple(sites)

    def body(x: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
        params, last = inputs
        linears = MeasuringLinears(sites)

        def delta_of(y: jax.Array) -> Float32[Array, "samples tokens dim"]:
            return y.astype(jnp.float32) - x.astype(jnp.float32)

        y = block(params, x, context, linears)
        error, outlier = stacked(linears.error, sites), stacked(linears.outlier, sites)
        delta = delta_of(y)
        noisy = [delta_of(block(params, x, context, OneSite(site, "nvfp4", sites))) for site in sites]
        stored = [_stored(format, delta) for format in STORED]
        measured = Measured(
            volatility=_relative(delta, x),
            delta_change=jnp.where(first, jnp.inf, _relative(delta - last.astype(jnp.float32), last)),
            error=error,
            outlier=outlier,
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

    def body(carry: tuple, inputs: sampler.StepInputs) -> tuple[tuple, Measured]:
        state, last = carry
        samples, text, timestep = sampler.forward_inputs(state, inputs, conditioning)
        x, context = model.embed(samples, text, timestep)
        block, params = blocks_of(model, context)
        x, last, measured = measure_blocks(block, params, x, context.temb, last, inputs.index == 0, sites=SITES)
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
