"""The scan over blocks under a policy: decide, skip or compute each block, measure, and remember for the next step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float

from pallas_kernels.delta_cache import apply_delta, store_delta
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.cogvideox import BlockContext, CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES
from sixbit_jax.precision import delta_cache
from sixbit_jax.precision.linears import RoutedLinears, stacked
from sixbit_jax.precision.routers import ConstantRouter
from sixbit_jax.precision.skippers import NeverSkip
from sixbit_jax.precision.types import Observation, Progress, nothing_observed
from sixbit_jax.qtensor import QuantLinear


@struct.dataclass(kw_only=True)
class PrecisionPolicy:
    """How a run spends its bits. The default is the null policy: the model as it is.

    Attributes:
        router: precision of each site (`routers.py`).
        skipper: which blocks are skipped (`skippers.py`).
        outlier_limit: purified refresh (4): a site whose max|x| / mean|x| is above it runs in 16 bit while a delta is
            computed that may be reused. None turns it off.
        cache_format: how deltas are stored: "16bit", "int8" or "nvfp4".
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
        cache: the delta cache; None if nothing is ever skipped.
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


def init_state(
    policy: PrecisionPolicy, model: CogVideoXTransformer3DModel, latents_shape: tuple[int, ...], text: int, guided: bool
) -> PrecisionState:
    """The state before the first step.

    Args:
        policy: whose state it is.
        model: the transformer.
        latents_shape: [videos, frames, channels, height, width].
        text: number of text tokens.
        guided: whether each video is two samples of a forward pass.

    Raises:
        ArgumentError: if the policy does not fit the model.
    """
    blocks, groups = model.config.num_layers, policy.groups(latents_shape[0])
    quantized = isinstance(model.blocks.attn_in, QuantLinear)
    if not quantized and policy.router.choices != ("16bit",):
        raise ArgumentError("this policy routes to low bits, and the model's linears are not quantised: quantize_model")
    cache = None
    if not policy.skipper.never:
        tokens = text + _product(model.token_grid(latents_shape))
        rows = latents_shape[0] * (2 if guided else 1) // groups
        cache = delta_cache.init(
            policy.cache_format, blocks, groups, (rows, tokens, model.config.inner_dim), model.dtype
        )
    return PrecisionState(
        router=policy.router.init(blocks, groups),
        skipper=policy.skipper.init(blocks, groups),
        observation=nothing_observed(blocks, groups),
        cache=cache,
        age=jnp.zeros((blocks, groups), jnp.int32),
    )


def run_blocks(
    model: CogVideoXTransformer3DModel,
    x: Float[Array, "samples tokens dim"],
    context: BlockContext,
    policy: PrecisionPolicy,
    state: PrecisionState,
    progress: Progress,
) -> tuple[Float[Array, "samples tokens dim"], PrecisionState, PrecisionTrace]:
    """All blocks of one forward pass. Samples are [guidance branches x videos]."""
    routes, predicted, router_state = policy.router.decide(state.router, state.observation, progress)
    skip, refresh, skipper_state = policy.skipper.decide(state.skipper, state.observation, progress)
    blocks, groups = skip.shape
    graph, params = nnx.split(model.blocks)
    first = progress.step == 0

    def run_group(
        params: nnx.State, x: jax.Array, temb: jax.Array, cache: Any, plan: tuple, block: jax.Array, group: jax.Array
    ) -> tuple[jax.Array, Any, tuple]:
        routes, skip, refresh = plan

        def compute(x: jax.Array, cache: Any) -> tuple[jax.Array, Any, tuple]:
            purify = refresh if cache is not None and policy.outlier_limit is not None else None
            linears = RoutedLinears(
                policy.router.choices,
                routes,
                purify,
                outlier_limit=policy.outlier_limit or 0.0,
                carrier=policy.carrier,
            )
            y = nnx.merge(graph, params)(x, dataclasses.replace(context, temb=temb), linears)
            volatility = change = jnp.asarray(jnp.nan, jnp.float32)
            with jax.named_scope("cache"):
                if cache is not None:
                    stored = delta_cache.entry(cache, block, group)
                    stored, sums = store_delta(x, y, stored, compare=policy.skipper.observes)
                    cache = delta_cache.replace(cache, block, group, stored)
                    volatility = sums.delta.sum() / sums.before.sum()
                    if sums.change is not None and sums.stored is not None:
                        change = jnp.where(first, jnp.inf, sums.change.sum() / sums.stored.sum())
                elif policy.observes:
                    volatility = _norm(y - x) / _norm(x)
            return y, cache, (volatility, change, stacked(linears.bits), stacked(linears.outlier))

        def reuse(x: jax.Array, cache: Any) -> tuple[jax.Array, Any, tuple]:
            with jax.named_scope("reuse"):
                y = apply_delta(x, delta_cache.entry(cache, block, group))
            unknown = jnp.asarray(jnp.nan, jnp.float32)
            sites = jnp.full((len(SITES),), jnp.nan, jnp.float32)
            return y, cache, (unknown, unknown, jnp.zeros(sites.shape, jnp.int32), sites)

        if policy.skipper.never:
            return compute(x, cache)
        return jax.lax.cond(skip, reuse, compute, x, cache)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        x, cache = carry
        params, plan, block = inputs
        if groups == 1:
            plan = jax.tree.map(lambda v: v[0], plan)
            x, cache, measured = run_group(params, x, context.temb, cache, plan, block, jnp.asarray(0, jnp.int32))
            return (x, cache), jax.tree.map(lambda v: v[None], measured)

        def one(cache: Any, inputs: tuple) -> tuple[Any, tuple]:
            x, temb, plan, group = inputs
            x, cache, measured = run_group(params, x, temb, cache, plan, block, group)
            return cache, (x, measured)

        split = (_by_group(x, groups), _by_group(context.temb, groups), plan, jnp.arange(groups, dtype=jnp.int32))
        cache, (x, measured) = jax.lax.scan(one, cache, split)
        return (_by_sample(x), cache), measured

    (x, cache), (volatility, change, bits, outlier) = jax.lax.scan(
        body, (x, state.cache), (params, (routes, skip, refresh), jnp.arange(blocks, dtype=jnp.int32))
    )
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


def _norm(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)).sum()


def _by_group(x: Float[Array, "samples ..."], groups: int) -> Float[Array, "groups branches ..."]:
    """Samples are ordered [branches, videos]; a group is a video, or all of them."""
    return jnp.swapaxes(x.reshape(-1, groups, *x.shape[1:]), 0, 1)


def _by_sample(x: Float[Array, "groups branches ..."]) -> Float[Array, "samples ..."]:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _product(grid: tuple[int, int, int]) -> int:
    frames, height, width = grid
    return frames * height * width
