"""The policies of the fidelity study: the library's own, with every setting traced, so that rows share a program."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sixbit_jax.precision import DeltaSkipper
from sixbit_jax.precision.routers import INT8, TableRouter, VolatilityRouter
from sixbit_jax.precision.types import Observation, Progress
from sixbit_jax.qtensor import ROUTES


@struct.dataclass(kw_only=True)
class StudySkipper(DeltaSkipper):
    """`DeltaSkipper` whose limits are traced, or a table of skips.

    Attributes:
        max_skips, warm_up, cool_down: int32 [].
        table: bool [steps, blocks], skips written down beforehand; taken instead if `by_table`.
        by_table: bool [].
        purify: bool []; False reports no refresh, which turns purified refresh off.
        in_sight: bool []; report a refresh only where a skip is in sight, because the last change was small enough.
    """

    max_skips: jax.Array
    warm_up: jax.Array
    cool_down: jax.Array
    table: jax.Array
    by_table: jax.Array
    purify: jax.Array
    in_sight: jax.Array

    def __post_init__(self) -> None:
        """Traced limits cannot be checked."""

    def decide(self, state: Any, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, Any]:
        skip, refresh, state = super().decide(state, observation, progress)
        refresh = refresh & (~self.in_sight | (state.change < self.threshold))
        now, soon = (self.table[jnp.minimum(progress.step + i, progress.steps - 1)][:, None] for i in range(2))
        skip = jnp.where(self.by_table, now, skip)
        refresh = jnp.where(self.by_table, soon & ~now, refresh)
        return skip, refresh & self.purify, state


@struct.dataclass(kw_only=True)
class StudyRouter:
    """The paper's router or a table, with changes to either that a row may ask for.

    Attributes:
        table: int32 [steps, blocks, sites], taken if `by_table`.
        alpha, beta, threshold: of `VolatilityRouter`.
        by_table: bool [].
        stale: bool []; after a skip, decide by the last volatility there was, instead of taking INT8.
        clean: int32 []; the route at least of all sites of a block whose delta is refreshed for reuse; 0 for none.
        late: int32 []; in so many steps at the end all sites run in INT8 at least.
        skipper: a copy of the policy's, which tells what is refreshed; its `purify` is not read.
    """

    table: jax.Array
    alpha: jax.Array
    beta: jax.Array
    threshold: jax.Array
    by_table: jax.Array
    stale: jax.Array
    clean: jax.Array
    late: jax.Array
    skipper: StudySkipper
    choices = ROUTES
    observes = True

    def init(self, blocks: int, groups: int, sites: int) -> Any:
        return jnp.full((blocks, groups), jnp.nan, jnp.float32), self.skipper.init(blocks, groups)

    def decide(self, state: Any, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, Any]:
        known, skipper = state
        known = jnp.where(observation.computed, observation.volatility, known)
        seen = observation.replace(
            computed=observation.computed | self.stale,
            volatility=jnp.where(self.stale, known, observation.volatility),
        )
        paper = VolatilityRouter(alpha=self.alpha, beta=self.beta, threshold=self.threshold)
        routes, predicted, _ = paper.decide(None, seen, progress)
        written, _, _ = TableRouter(table=self.table).decide(None, observation, progress)
        routes = jnp.where(self.by_table, written, routes)
        always = self.skipper.replace(purify=jnp.ones_like(self.skipper.purify))
        _, refresh, skipper = always.decide(skipper, observation, progress)
        routes = jnp.where(refresh[..., None], jnp.maximum(routes, self.clean), routes)
        routes = jnp.where(progress.step >= progress.steps - self.late, jnp.maximum(routes, INT8), routes)
        return routes, predicted, (known, skipper)
