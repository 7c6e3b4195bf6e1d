"""The scan over blocks under a policy: decide, skip or compute each block, measure, and remember for the next step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float

from pallas_kernels.delta_cache import apply_delta, store_delta
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.cogvideox import BlockContext, CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES, Linears
from sixbit_jax.precision import delta_cache
from sixbit_jax.precision.linears import RoutedLinears
from sixbit_jax.precision.routers import ConstantRouter
from sixbit_jax.precision.skippers import NeverSkip
from sixbit_jax.precision.types import Observation, Progress, nothing_observed

Block = Callable[[Any, jax.Array, Any, Linears], jax.Array]
"""(its parameters, the stream [samples, tokens, dim], what it reads beside it, its linears) -> the stream after it."""


@struct.dataclass(kw_only=True)
class PrecisionPolicy:
    """How a run spends its bits. The default is the null policy: the model as it is.

    Attributes:
        router: precision of each site (`routers.py`).
        skipper: which blocks are skipped (`skippers.py`).
        outlier_limit: purified refresh (4): a site whose max|x| / mean|x| is above it runs in 16 bit while a delta is
            computed that may be reused. None turns it off.
        cache_format: how deltas of blocks are stored: "16bit", "int8" or "nvfp4". What all blocks together add, which
            is kept where whole steps are skipped, is one array in the stream's dtype.
        carrier: what NVFP4 operands are multiplied in where there are no FP4 tensor cores: "exact" or "fp8".
        joint: decide for all videos of a batch together. False decides for each alone and runs blocks video by video,
            so that a video does not depend on its neighbours.
    """

    router: Any = ConstantRouter()
    skipper: Any = NeverSkip()
    outlier_limit: float | None = struct.field(pytree_node=False, default=25.0)
    cache_format: str = struct.field(pytree_node=False, default="16bit")
    carrier: str = struct.field(pytree_node=False, default="exact")
    joint: bool = struct.field(pytree_node=False, default=False)

    @property
    def observes(self) -> bool:
        """Whether blocks are measured."""
        return self.router.observes or self.skipper.observes

    def groups(self, videos: int) -> int:
        """How many groups a batch of that many videos is decided in; one where nothing depends on the data."""
        purifies = not self.skipper.never and self.outlier_limit is not None
        return videos if (self.observes or purifies) and not self.joint else 1


@struct.dataclass(kw_only=True)
class PrecisionState:
    """What a policy carries from step to step.

    Attributes:
        router, skipper: their own states.
        observation: of the last step.
        cache: the delta cache, or the one delta of all blocks, [samples, tokens, dim], where whole steps are skipped;
            None if nothing is ever skipped.
        age: int32 [blocks, groups], how many steps ago the delta in use was computed.
    """

    router: Any
    skipper: Any
    observation: Observation
    cache: Any
    age: jax.Array


@struct.dataclass(kw_only=True)
class PrecisionTrace:
    """What was decided and measured at a step; [blocks, groups] or [blocks, groups, sites], [steps, ...] after a run.

    Attributes:
        bits: uint8 by site: activation bits of the route taken; 0 for a skipped block.
        volatility, delta_change: float32, of computed blocks; NaN where not measured.
        predicted: float32 by site, the router's prediction of the NVFP4 error; NaN where it made none.
        outlier: float32 by site, max|x| / mean|x| of activations that were quantised; NaN for others.
        age: int32, how many steps ago the delta in use was computed; 0 for a computed block.
    """

    bits: jax.Array | np.ndarray
    volatility: jax.Array | np.ndarray
    delta_change: jax.Array | np.ndarray
    predicted: jax.Array | np.ndarray
    outlier: jax.Array | np.ndarray
    age: jax.Array | np.ndarray


def init_scan(
    policy: PrecisionPolicy,
    *,
    blocks: int,
    sites: Sequence[str],
    shape: tuple[int, int, int],
    dtype: Any,
    videos: int | None = None,
) -> PrecisionState:
    """The state of `scan_blocks` before the first step.

    Args:
        policy: whose state it is.
        blocks: how many the model has.
        sites: names of the linears of a block.
        shape: of the stream between blocks, [samples, tokens, dim].
        dtype: of the stream; what a cache in "16bit" keeps.
        videos: how many the samples are of, each with as many (2 under guidance); None for one sample each.

    Raises:
        ArgumentError: if the policy was made for other blocks or sites, or `videos` does not divide the samples.
    """
    videos = shape[0] if videos is None else videos
    if videos < 1 or shape[0] % videos:
        raise ArgumentError(f"{shape[0]} samples cannot be of {videos} videos with as many each")
    groups = policy.groups(videos)
    cache = None
    if policy.skipper.whole_steps:
        cache = jnp.zeros(shape, dtype)
    elif not policy.skipper.never:
        cache = delta_cache.init(policy.cache_format, blocks, groups, (shape[0] // groups, *shape[1:]), dtype)
    return PrecisionState(
        router=policy.router.init(blocks, groups, len(sites)),
        skipper=policy.skipper.init(blocks, groups),
        observation=nothing_observed(blocks, groups),
        cache=cache,
        age=jnp.zeros((blocks, groups), jnp.int32),
    )


def scan_blocks(
    block: Block,
    params: Any,
    x: Float[Array, "samples tokens dim"],
    context: Any,
    policy: PrecisionPolicy,
    state: PrecisionState,
    progress: Progress,
    *,
    sites: Sequence[str],
) -> tuple[Float[Array, "samples tokens dim"], PrecisionState, PrecisionTrace]:
    """All blocks of one forward pass of any model, under a policy.

    Args:
        block: computes one; it runs each of its linears by `linears(site, layer, x)`, or in a fused form of
            `models.linears.Linears`. What does not differ from sample to sample it may close over.
        params: of all blocks, a pytree of leaves [blocks, ...].
        x: the stream in front of the first; samples are ordered [guidance branches, videos].
        context: what blocks read beside the stream, a pytree of leaves [samples, ...]; split with the stream where
            videos are decided on each alone.
        policy: decides.
        state: from `init_scan`, or the step before.
        progress: where in the run this is.
        sites: names of the linears of a block, as `init_scan` had them.

    Returns:
        The stream behind the last block, the state for the next step, and what was decided and measured.

    Raises:
        ArgumentError: if a block runs no linear at one of its sites, two, or one elsewhere; or if the policy routes to
            low bits and none of them is quantised.
    """
    sites = tuple(sites)
    routes, predicted, router_state = policy.router.decide(state.router, state.observation, progress)
    skip, refresh, skipper_state = policy.skipper.decide(state.skipper, state.observation, progress)
    blocks, groups = skip.shape
    first = progress.step == 0

    def not_measured(*leading: int) -> tuple:
        unknown = jnp.full(leading, jnp.nan, jnp.float32)
        by_site = (*leading, len(sites))
        return unknown, unknown, jnp.zeros(by_site, jnp.int32), jnp.full(by_site, jnp.nan, jnp.float32)

    def run_group(
        params: Any, x: jax.Array, context: Any, cache: Any, plan: tuple, index: jax.Array, group: jax.Array
    ) -> tuple[jax.Array, Any, tuple]:
        routes, skip, refresh = plan

        def compute(x: jax.Array, cache: Any) -> tuple[jax.Array, Any, tuple]:
            purify = None if policy.skipper.never or policy.outlier_limit is None else refresh
            linears = RoutedLinears(
                sites,
                policy.router.choices,
                routes,
                purify,
                outlier_limit=policy.outlier_limit or 0.0,
                carrier=policy.carrier,
            )
            y = block(params, x, context, linears)
            if policy.router.choices != ("16bit",) and not linears.any_quantized:
                raise ArgumentError(
                    "this policy routes to low bits, and the model's linears are not quantised: quantize_model"
                )
            bits, outlier = linears.taken()
            volatility = change = jnp.asarray(jnp.nan, jnp.float32)
            with jax.named_scope("cache"):
                if cache is not None:
                    stored = delta_cache.entry(cache, index, group)
                    stored, sums = store_delta(x, y, stored, compare=policy.skipper.observes)
                    cache = delta_cache.replace(cache, index, group, stored)
                    volatility = sums.delta.sum() / sums.before.sum()
                    if sums.change is not None and sums.stored is not None:
                        change = jnp.where(first, jnp.inf, sums.change.sum() / sums.stored.sum())
                elif policy.observes:
                    volatility = _norm(y - x) / _norm(x)
            return y, cache, (volatility, change, bits, outlier)

        def reuse(x: jax.Array, cache: Any) -> tuple[jax.Array, Any, tuple]:
            with jax.named_scope("reuse"):
                y = apply_delta(x, delta_cache.entry(cache, index, group))
            return y, cache, not_measured()

        if cache is None:
            return compute(x, cache)
        return jax.lax.cond(skip, reuse, compute, x, cache)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        x, cache = carry
        params, plan, index = inputs
        if groups == 1:
            plan = jax.tree.map(lambda v: v[0], plan)
            x, cache, measured = run_group(params, x, context, cache, plan, index, jnp.asarray(0, jnp.int32))
            return (x, cache), jax.tree.map(lambda v: v[None], measured)

        def one(cache: Any, inputs: tuple) -> tuple[Any, tuple]:
            (x, context), plan, group = inputs
            x, cache, measured = run_group(params, x, context, cache, plan, index, group)
            return cache, (x, measured)

        split = jax.tree.map(lambda leaf: _by_group(leaf, groups), (x, context))
        cache, (x, measured) = jax.lax.scan(one, cache, (split, plan, jnp.arange(groups, dtype=jnp.int32)))
        return (_by_sample(x), cache), measured

    def run_all(x: jax.Array, cache: Any) -> tuple[jax.Array, Any, tuple]:
        inputs = (params, (routes, skip, refresh), jnp.arange(blocks, dtype=jnp.int32))
        (x, cache), measured = jax.lax.scan(body, (x, cache), inputs)
        return x, cache, measured

    def compute_step(x: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array, tuple]:
        y, _, measured = run_all(x, None)
        with jax.named_scope("cache"):
            return y, (y.astype(jnp.float32) - x.astype(jnp.float32)).astype(x.dtype), measured

    def reuse_step(x: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array, tuple]:
        with jax.named_scope("reuse"):
            return x + delta, delta, not_measured(blocks, groups)

    if policy.skipper.whole_steps:
        x, cache, measured = jax.lax.cond(skip[0, 0], reuse_step, compute_step, x, state.cache)
    else:
        x, cache, measured = run_all(x, state.cache)
    volatility, change, bits, outlier = measured
    age = jnp.where(skip, state.age + 1, 0)
    observation = Observation(computed=~skip, volatility=volatility, delta_change=change)
    trace = PrecisionTrace(
        bits=bits.astype(jnp.uint8),
        volatility=volatility,
        delta_change=change,
        predicted=predicted,
        outlier=outlier,
        age=age,
    )
    state = PrecisionState(router=router_state, skipper=skipper_state, observation=observation, cache=cache, age=age)
    return x, state, trace


def init_state(
    policy: PrecisionPolicy, model: CogVideoXTransformer3DModel, latents_shape: tuple[int, ...], text: int, guided: bool
) -> PrecisionState:
    """`init_scan` for a CogVideoX transformer.

    Args:
        policy: whose state it is.
        model: the transformer.
        latents_shape: [videos, frames, channels, height, width].
        text: number of text tokens.
        guided: whether each video is two samples of a forward pass.

    Raises:
        ArgumentError: if the policy does not fit the model.
    """
    videos, tokens = latents_shape[0], text + math.prod(model.token_grid(latents_shape))
    shape = (videos * (2 if guided else 1), tokens, model.config.inner_dim)
    return init_scan(policy, blocks=model.config.num_layers, sites=SITES, shape=shape, dtype=model.dtype, videos=videos)


def run_blocks(
    model: CogVideoXTransformer3DModel,
    x: Float[Array, "samples tokens dim"],
    context: BlockContext,
    policy: PrecisionPolicy,
    state: PrecisionState,
    progress: Progress,
) -> tuple[Float[Array, "samples tokens dim"], PrecisionState, PrecisionTrace]:
    """`scan_blocks` for a CogVideoX transformer.

    Args:
        model: the transformer.
        x: the residual stream, text rows first; samples are [guidance branches x videos].
        context: from `embed`, with `x`.
        policy: how bits are spent.
        state: from `init_state` or the last step.
        progress: where in the run the step is.

    Returns:
        As `scan_blocks`.
    """
    block, params = blocks_of(model, context)
    return scan_blocks(block, params, x, context.temb, policy, state, progress, sites=SITES)


def blocks_of(model: CogVideoXTransformer3DModel, context: BlockContext) -> tuple[Block, nnx.State]:
    """A CogVideoX transformer's block, which reads `temb` beside the stream, and the parameters of all of them."""
    graph, params = nnx.split(model.blocks)

    def block(params: nnx.State, x: jax.Array, temb: jax.Array, linears: Linears) -> jax.Array:
        return nnx.merge(graph, params)(x, dataclasses.replace(context, temb=temb), linears)

    return block, params


def _norm(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)).sum()


def _by_group(x: Float[Array, "samples ..."], groups: int) -> Float[Array, "groups branches ..."]:
    """Samples are ordered [branches, videos]; a group is a video, or all of them."""
    return jnp.swapaxes(x.reshape(-1, groups, *x.shape[1:]), 0, 1)


def _by_sample(x: Float[Array, "groups branches ..."]) -> Float[Array, "samples ..."]:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
