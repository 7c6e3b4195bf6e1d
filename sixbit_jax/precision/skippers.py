"""Skippers: which blocks reuse their last delta at the coming step. Pure; all blocks are decided at once.

A skipper has `init(blocks, groups) -> state` and
`decide(state, observation, progress) -> (skip, refresh, state)`, both bool [blocks, groups]: whether the block is
skipped, and whether it is computed and its delta may be reused by a later step. `never` is True for the one that skips
nothing: then there is no cache. `whole_steps` is True for one that skips all blocks of all videos or none. `observes`
tells whether it needs the deltas' change measured.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from sixbit_jax.errors import ArgumentError
from sixbit_jax.precision.types import Observation, Progress


@runtime_checkable
class Skipper(Protocol):
    """Decides which blocks reuse their last delta, for all blocks at once, at the beginning of a step.

    Attributes:
        never: whether it skips nothing at all: then there is no cache.
        whole_steps: whether it skips all blocks of all videos or none. Then what they add together is cached, in one
            array instead of one a block, and a skipped step is one sum.
        observes: whether it needs the change of the deltas measured.
    """

    never: bool
    whole_steps: bool
    observes: bool

    def init(self, blocks: int, groups: int) -> Any:
        """The state before the first step.

        Args:
            blocks: of the model.
            groups: videos that are decided on together.
        """

    def decide(self, state: Any, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, Any]:
        """One step's decisions.

        Args:
            state: from `init` or the last step.
            observation: what the last step measured.
            progress: where in the run the step is.

        Returns:
            Both bool [blocks, groups]: whether the block is skipped, and whether it is computed and its delta may be
            reused by a later step; and the next state.
        """


@struct.dataclass(kw_only=True)
class NeverSkip:
    """Every block at every step."""

    never = True
    whole_steps = False
    observes = False

    def init(self, blocks: int, groups: int) -> None:
        return None

    def decide(self, state: None, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, None]:
        nothing = jnp.zeros_like(observation.computed)
        return nothing, nothing, None


@struct.dataclass(kw_only=True)
class EveryNth:
    """Skips all blocks at every n-th step between warm-up and cool-down; looks at nothing.

    Attributes:
        n: at least 2.
        warm_up, cool_down: steps at the beginning and at the end in which nothing is skipped.
    """

    n: int = struct.field(pytree_node=False)
    warm_up: int = struct.field(pytree_node=False, default=5)
    cool_down: int = struct.field(pytree_node=False, default=2)
    never = False
    whole_steps = True
    observes = False

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ArgumentError(f"n={self.n} must be at least 2: a block is computed before it is reused")
        _check_window(self.warm_up, self.cool_down)

    def init(self, blocks: int, groups: int) -> None:
        return None

    def decide(self, state: None, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, None]:
        def skipped(step: jax.Array) -> jax.Array:
            return _inside(self, step, progress.steps) & ((step - self.warm_up) % self.n == self.n - 1)

        shape = observation.computed.shape
        skip, soon = (jnp.broadcast_to(skipped(progress.step + i), shape) for i in range(2))
        return skip, soon & ~skip, None


@struct.dataclass(kw_only=True)
class DeltaState:
    """What `DeltaSkipper` remembers, [blocks, groups].

    Attributes:
        change: float32, d: relative change between the last two computed deltas.
        error: float32, accumulated since the delta in use was computed.
        skips: int32, in a row.
    """

    change: jax.Array
    error: jax.Array
    skips: jax.Array


@struct.dataclass(kw_only=True)
class DeltaSkipper:
    """The paper's temporal delta cache (3): skip while the accumulated error stays under a threshold.

    Each skip adds d, the relative change between the block's last two computed deltas.

    Attributes:
        threshold: float32 [], tau. Infinite skips whatever `max_skips` allows; 0 skips nothing.
        max_skips: in a row.
        warm_up, cool_down: steps at the beginning and at the end in which nothing is skipped; at least one of warm-up.
    """

    threshold: jax.Array
    max_skips: int = struct.field(pytree_node=False, default=2)
    warm_up: int = struct.field(pytree_node=False, default=5)
    cool_down: int = struct.field(pytree_node=False, default=2)
    never = False
    whole_steps = False
    observes = True

    def __post_init__(self) -> None:
        if self.max_skips < 1:
            raise ArgumentError(f"max_skips={self.max_skips} must be at least 1; NeverSkip skips nothing")
        _check_window(self.warm_up, self.cool_down)

    def init(self, blocks: int, groups: int) -> DeltaState:
        zero = jnp.zeros((blocks, groups), jnp.float32)
        return DeltaState(change=zero + jnp.inf, error=zero, skips=zero.astype(jnp.int32))

    def decide(
        self, state: DeltaState, observation: Observation, progress: Progress
    ) -> tuple[jax.Array, jax.Array, DeltaState]:
        change = jnp.where(observation.computed, observation.delta_change, state.change)
        error = jnp.where(observation.computed, 0.0, state.error)
        skips = jnp.where(observation.computed, 0, state.skips)
        inside = _inside(self, progress.step, progress.steps)
        skip = inside & (skips < self.max_skips) & (error + change < self.threshold)
        refresh = ~skip & _inside(self, progress.step + 1, progress.steps)
        state = DeltaState(
            change=change, error=error + jnp.where(skip, change, 0.0), skips=skips + skip.astype(jnp.int32)
        )
        return skip, refresh, state


def _inside(window: Any, step: jax.Array, steps: int) -> jax.Array:
    return (step >= window.warm_up) & (step < steps - window.cool_down)


def _check_window(warm_up: int, cool_down: int) -> None:
    if warm_up < 1 or cool_down < 0:
        raise ArgumentError(f"{warm_up=} must be at least 1 and {cool_down=} at least 0")
