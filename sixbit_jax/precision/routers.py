"""Routers: the precision of each site of each block at the coming step. Pure; all blocks are decided at once.

A router has `init(blocks, groups, sites) -> state`, which raises if it was made for another model, and
`decide(state, observation, progress) -> (routes, predicted error, state)`, with routes int32 [blocks, groups, sites],
indices into `qtensor.ROUTES`. Sites are the linears of a block, as many as the model has. `choices` names the routes it
can take, most exact last: the compiled program holds the kernels of these alone, and decides nothing where there is
one. `observes`: whether it needs the volatility measured.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sixbit_jax.errors import ArgumentError
from sixbit_jax.precision.types import Observation, Progress
from sixbit_jax.qtensor import ROUTES

logger = logging.getLogger(__name__)
NVFP4, INT8, SIXTEEN = (ROUTES.index(name) for name in ("nvfp4", "int8", "16bit"))


@runtime_checkable
class Router(Protocol):
    """Decides the precision of each site of each block, for all blocks at once, at the beginning of a step."""

    @property
    def choices(self) -> tuple[str, ...]:
        """Routes it can take, most exact last; the compiled program holds the kernels of these alone."""

    @property
    def observes(self) -> bool:
        """Whether it needs the volatility measured."""

    def init(self, blocks: int, groups: int, sites: int) -> Any:
        """The state before the first step.

        Args:
            blocks: of the model.
            groups: videos that are decided on together.
            sites: of a block.

        Raises:
            ArgumentError: if the router is made for another number of blocks or sites.
        """

    def decide(self, state: Any, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, Any]:
        """One step's decisions.

        Args:
            state: from `init` or the last step.
            observation: what the last step measured.
            progress: where in the run the step is.

        Returns:
            Routes, int32 [blocks, groups, sites], indices into `qtensor.ROUTES`; the predicted NVFP4 errors, float32
            of that shape, NaN where there is no prediction; the next state.
        """


def _unknown(routes: jax.Array) -> jax.Array:
    return jnp.full(routes.shape, jnp.nan, jnp.float32)


@struct.dataclass(kw_only=True)
class ConstantRouter:
    """The same route everywhere: "nvfp4" (W4A4), "int8" (W4A8) or "16bit" (weights only; the null router).

    Attributes:
        route: its name.

    Its state is the routes, int32 [blocks, groups, sites].
    """

    route: str = struct.field(pytree_node=False, default="16bit")
    observes = False

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise ArgumentError(f"unknown route {self.route!r}; routes are {', '.join(ROUTES)}")

    @property
    def choices(self) -> tuple[str, ...]:
        return (self.route,)

    def init(self, blocks: int, groups: int, sites: int) -> jax.Array:
        return jnp.full((blocks, groups, sites), ROUTES.index(self.route), jnp.int32)

    def decide(
        self, state: jax.Array, observation: Observation, progress: Progress
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return state, _unknown(state), state


@struct.dataclass(kw_only=True)
class TableRouter:
    """A route written down beforehand for every step, block and site.

    Attributes:
        table: int32 [steps, blocks, sites] (or [1, blocks, sites] for all steps), indices into `qtensor.ROUTES`.
        choices: the routes that occur in it; `of` finds them.
    """

    table: jax.Array
    choices: tuple[str, ...] = struct.field(pytree_node=False, default=ROUTES)
    observes = False

    @classmethod
    def of(cls, table: np.ndarray) -> "TableRouter":
        """From concrete indices.

        Raises:
            ArgumentError: if they are not indices into `ROUTES`.
        """
        occurring = np.unique(table)
        if table.ndim != 3 or not np.isin(occurring, range(len(ROUTES))).all():
            raise ArgumentError(
                f"a routing table must be [steps, blocks, sites] of 0 to {len(ROUTES) - 1}, found {list(table.shape)}"
                f" of {occurring.tolist()}"
            )
        return cls(table=jnp.asarray(table, jnp.int32), choices=tuple(ROUTES[i] for i in occurring))

    def init(self, blocks: int, groups: int, sites: int) -> None:
        if self.table.shape[1:] != (blocks, sites):
            raise ArgumentError(
                f"a routing table must be [steps, {blocks} blocks, {sites} sites], found {list(self.table.shape)}"
            )

    def decide(self, state: None, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, None]:
        if self.table.shape[0] not in (1, progress.steps):
            raise ArgumentError(f"the routing table has {self.table.shape[0]} steps, the run {progress.steps}")
        row = self.table[jnp.minimum(progress.step, self.table.shape[0] - 1)]
        routes = jnp.repeat(row[:, None], observation.computed.shape[1], axis=1)
        return routes, _unknown(routes), None


def edges(steps: int, blocks: int, sites: int, *, first: int, last: int) -> TableRouter:
    """INT8 for the first and last steps, NVFP4 between them.

    Args:
        steps: of the run.
        blocks: of the model.
        sites: of a block.
        first: how many steps at the beginning run in INT8.
        last: how many at the end.

    Raises:
        ArgumentError: if these are negative, or together more than the steps.
    """
    if first < 0 or last < 0 or first + last > steps:
        raise ArgumentError(f"{first=} and {last=} must not be negative, nor more than the {steps} steps together")
    table = np.full((steps, blocks, sites), NVFP4, np.int32)
    table[:first] = table[steps - last :] = INT8
    return TableRouter.of(table)


@struct.dataclass(kw_only=True)
class VolatilityRouter:
    """The paper's router (2): NVFP4 where the predicted error alpha * G + beta is at most the threshold, else INT8.

    Where there is no volatility (the first step, and after a skip) INT8.

    Attributes:
        alpha, beta: float32 [blocks, sites], fitted by `calibration.fit`.
        threshold: float32 []; a larger one gives fewer bits.
    """

    alpha: jax.Array
    beta: jax.Array
    threshold: jax.Array
    choices = ("nvfp4", "int8")
    observes = True

    def init(self, blocks: int, groups: int, sites: int) -> None:
        for name in ("alpha", "beta"):
            if (found := getattr(self, name).shape) != (blocks, sites):
                raise ArgumentError(f"{name} must be [{blocks} blocks, {sites} sites], found {list(found)}")

    def decide(self, state: None, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, None]:
        volatility = jnp.where(observation.computed, observation.volatility, jnp.nan)
        predicted = self.alpha[:, None] * volatility[..., None] + self.beta[:, None]
        return jnp.where(predicted <= self.threshold, NVFP4, INT8), predicted, None


@struct.dataclass(kw_only=True)
class CostAwareRouter:
    """Another router's decisions, less those that buy nothing: a more exact route of no higher cost is taken instead.

    On a GPU without FP4 tensor cores NVFP4 products are no faster than INT8 ones, so there all of its choices become
    INT8.

    Attributes:
        router: whose decisions these are.
        cost: time of a product on each of `qtensor.ROUTES`, in any unit.
    """

    router: Any
    cost: tuple[float, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, router: Router, cost: Mapping[str, float]) -> "CostAwareRouter":
        """From costs by name; logs which routes are never taken.

        Args:
            router: whose decisions are taken.
            cost: of each of `qtensor.ROUTES`.

        Raises:
            ArgumentError: if a route has no cost, or there is no such route.
        """
        if set(cost) != set(ROUTES):
            raise ArgumentError(f"cost must name each of the routes {', '.join(ROUTES)}, found {', '.join(cost)}")
        made = cls(router=router, cost=tuple(cost[name] for name in ROUTES))
        for route in router.choices:
            if (better := made._substitutes[route]) != route:
                logger.warning("%s costs no more than %s here and is more exact: taken instead", better, route)
        return made

    @property
    def _substitutes(self) -> dict[str, str]:
        """For each route the most exact one that costs no more; `ROUTES` is in order of exactness."""
        return {
            route: max((r for r, c in zip(ROUTES, self.cost, strict=True) if c <= cost), key=ROUTES.index)
            for route, cost in zip(ROUTES, self.cost, strict=True)
        }

    @property
    def choices(self) -> tuple[str, ...]:
        taken = {self._substitutes[route] for route in self.router.choices}
        return tuple(route for route in ROUTES if route in taken)

    @property
    def observes(self) -> bool:
        return self.router.observes and len(self.choices) > 1

    def init(self, blocks: int, groups: int, sites: int) -> Any:
        return self.router.init(blocks, groups, sites)

    def decide(self, state: Any, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, Any]:
        routes, predicted, state = self.router.decide(state, observation, progress)
        return jnp.asarray([ROUTES.index(self._substitutes[r]) for r in ROUTES], jnp.int32)[routes], predicted, state
