"""Routers and skippers as pure functions, on constructed observations."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES
from sixbit_jax.precision import routers, skippers
from sixbit_jax.precision.types import Observation, Progress, nothing_observed
from sixbit_jax.qtensor import ROUTES

BLOCKS, GROUPS, STEPS = 3, 2, 12


def observed(volatility=0.1, change=0.1, computed=True):
    full = jnp.full((BLOCKS, GROUPS), 1.0, jnp.float32)
    return Observation(
        computed=jnp.full(full.shape, computed), volatility=full * volatility, delta_change=full * change
    )


def at(step):
    return Progress(step=jnp.asarray(step, jnp.int32), steps=STEPS)


def volatility_router(threshold=0.5):
    alpha = jnp.arange(1.0, 1 + BLOCKS * len(SITES)).reshape(BLOCKS, len(SITES))
    return routers.VolatilityRouter(alpha=alpha, beta=alpha * 0 + 0.1, threshold=jnp.asarray(threshold))


def run(skipper, changes):
    """Decisions of every step, fed with the change that each computed step measures."""
    state, observation, skips, refreshes = skipper.init(BLOCKS, GROUPS), nothing_observed(BLOCKS, GROUPS), [], []
    for step in range(STEPS):
        skip, refresh, state = skipper.decide(state, observation, at(step))
        observation = Observation(
            computed=~skip, volatility=jnp.ones_like(observation.volatility), delta_change=jnp.asarray(changes[step])
        )
        skips.append(skip)
        refreshes.append(refresh)
    return np.stack(skips), np.stack(refreshes)


def constant_changes(value):
    changes = np.full((STEPS, BLOCKS, GROUPS), value, np.float32)
    changes[0] = np.inf
    return changes


def test_no_volatility_is_int8():
    router = volatility_router(threshold=1e9)
    for observation in (nothing_observed(BLOCKS, GROUPS), observed(computed=False)):
        routes, predicted, _ = router.decide(None, observation, at(0))
        assert (routes == routers.INT8).all()
        assert jnp.isnan(predicted).all()


def test_route_follows_the_predicted_error():
    routes, predicted, _ = volatility_router(threshold=0.55).decide(None, observed(volatility=0.1), at(3))
    wanted = 0.1 * np.arange(1.0, 13).reshape(BLOCKS, 1, len(SITES)) + 0.1
    np.testing.assert_allclose(predicted, np.broadcast_to(wanted, predicted.shape), rtol=1e-6)
    np.testing.assert_array_equal(routes, np.where(predicted <= 0.55, routers.NVFP4, routers.INT8))
    assert len(np.unique(routes)) == 2


def test_a_non_finite_volatility_is_int8():
    routes, _, _ = volatility_router(threshold=1e9).decide(None, observed(volatility=jnp.nan), at(3))
    assert (routes == routers.INT8).all()


def test_constant_router_takes_its_route():
    for name, index in (("nvfp4", 0), ("int8", 1), ("16bit", 2)):
        router = routers.ConstantRouter(route=name)
        assert router.choices == (name,)
        for sites in (len(SITES), 3, 7):
            routes, predicted, _ = router.decide(router.init(BLOCKS, GROUPS, sites), observed(), at(0))
            assert routes.shape == predicted.shape == (BLOCKS, GROUPS, sites)
            assert (routes == index).all()
    with pytest.raises(ArgumentError, match="int4"):
        routers.ConstantRouter(route="int4")


def test_edges_are_int8_and_the_middle_nvfp4():
    router = routers.edges(STEPS, BLOCKS, len(SITES), first=2, last=3)
    found = [int(np.unique(router.decide(None, observed(), at(step))[0]).item()) for step in range(STEPS)]
    assert found == [routers.INT8] * 2 + [routers.NVFP4] * 7 + [routers.INT8] * 3
    assert router.choices == ("nvfp4", "int8")
    with pytest.raises(ArgumentError, match="12 steps"):
        routers.edges(STEPS, BLOCKS, len(SITES), first=7, last=6)


def test_a_table_of_another_size_is_refused():
    router = routers.TableRouter.of(np.zeros((1, BLOCKS, len(SITES)), np.int32))
    router.init(BLOCKS, GROUPS, len(SITES))
    for blocks, sites in ((BLOCKS + 1, len(SITES)), (BLOCKS, 3)):
        with pytest.raises(ArgumentError, match=f"{blocks} blocks, {sites} sites.*found"):
            router.init(blocks, GROUPS, sites)
        with pytest.raises(ArgumentError, match=f"{blocks} blocks, {sites} sites.*found"):
            volatility_router(0.1).init(blocks, GROUPS, sites)
    with pytest.raises(ArgumentError, match="0 to 2"):
        routers.TableRouter.of(np.full((1, BLOCKS, len(SITES)), 3))
    with pytest.raises(ArgumentError, match="2 steps"):
        routers.TableRouter.of(np.zeros((2, BLOCKS, len(SITES)), int)).decide(None, observed(), at(0))


def test_cost_aware_router_never_takes_the_less_exact_route_for_nothing(caplog):
    inner = volatility_router(threshold=0.55)
    same = routers.CostAwareRouter.of(inner, {"nvfp4": 1.0, "int8": 1.0, "16bit": 2.0})
    assert "int8 costs no more than nvfp4" in caplog.text
    assert same.choices == ("int8",)
    assert (same.decide(None, observed(), at(3))[0] == routers.INT8).all()
    faster = routers.CostAwareRouter.of(inner, {"nvfp4": 0.5, "int8": 1.0, "16bit": 2.0})
    assert faster.choices == ("nvfp4", "int8")
    np.testing.assert_array_equal(faster.decide(None, observed(), at(3))[0], inner.decide(None, observed(), at(3))[0])
    with pytest.raises(ArgumentError, match="16bit"):
        routers.CostAwareRouter.of(inner, {"nvfp4": 1.0, "int8": 1.0})


def test_delta_skipper_keeps_its_limits():
    skipper = skippers.DeltaSkipper(threshold=jnp.asarray(np.inf), max_skips=2, warm_up=3, cool_down=2)
    skip, refresh = run(skipper, constant_changes(0.1))
    pattern = [0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0]
    np.testing.assert_array_equal(skip, np.broadcast_to(np.array(pattern, bool)[:, None, None], skip.shape))
    # A delta is refreshed where the next step may reuse it: from the last warm-up step on, not before the cool-down.
    wanted = [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    np.testing.assert_array_equal(refresh[:, 0, 0], np.array(wanted, bool))


def test_delta_skipper_accumulates_the_error():
    skipper = skippers.DeltaSkipper(threshold=jnp.asarray(0.25), max_skips=9, warm_up=2, cool_down=0)
    # d = 0.1: the sums 0.1 and 0.2 are under 0.25, 0.3 is not.
    np.testing.assert_array_equal(
        run(skipper, constant_changes(0.1))[0][:, 0, 0], np.array([0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1], bool)
    )
    assert not run(skipper, constant_changes(0.3))[0].any()
    assert not run(skipper.replace(threshold=jnp.asarray(0.0)), constant_changes(0.0))[0].any()


def test_delta_skipper_decides_for_each_block_and_group():
    changes = constant_changes(0.3)
    changes[1:, 1, 0] = 0.1
    skipper = skippers.DeltaSkipper(threshold=jnp.asarray(0.25), max_skips=2, warm_up=2, cool_down=0)
    skip, _ = run(skipper, changes)
    assert skip[:, 1, 0].any()
    skip[:, 1, 0] = False
    assert not skip.any()


def test_delta_skipper_never_reuses_a_single_delta():
    """With one warm-up step there is no second delta, so no change to judge by, until step 1 has been computed."""
    skipper = skippers.DeltaSkipper(threshold=jnp.asarray(1e9), max_skips=2, warm_up=1, cool_down=0)
    assert not run(skipper, constant_changes(0.0))[0][:2].any()


def test_every_nth():
    skip, refresh = run(skippers.EveryNth(n=3, warm_up=2, cool_down=1), constant_changes(0.0))
    np.testing.assert_array_equal(skip[:, 0, 0], np.array([0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0], bool))
    np.testing.assert_array_equal(refresh[:, 0, 0], np.array([0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0], bool))


@pytest.mark.parametrize(
    "make",
    [
        lambda: skippers.EveryNth(n=1),
        lambda: skippers.EveryNth(n=2, warm_up=0),
        lambda: skippers.DeltaSkipper(threshold=jnp.asarray(0.1), max_skips=0),
        lambda: skippers.DeltaSkipper(threshold=jnp.asarray(0.1), cool_down=-1),
    ],
)
def test_bad_limits_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_policies_are_pytrees_whose_thresholds_can_change_without_compiling_again():
    count = 0

    @jax.jit
    def decide(router, observation):
        nonlocal count
        count += 1
        return router.decide(None, observation, at(1))[0]

    assert not np.array_equal(decide(volatility_router(0.3), observed()), decide(volatility_router(0.9), observed()))
    assert count == 1


few = hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=30)
THRESHOLDS = st.sampled_from([0.0, 0.05, 0.5, 3.0, np.inf])


def drawn(seed, shape):
    """Positive values of any size, with some infinite and some NaN."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(-1, 2, shape)).astype(np.float32)
    values[rng.random(shape) < 0.1] = np.inf
    values[rng.random(shape) < 0.1] = np.nan
    return values


@st.composite
def any_skipper(draw):
    """How to make one, and how often in a row it may skip."""
    limits = {"warm_up": draw(st.integers(1, STEPS + 1)), "cool_down": draw(st.integers(0, STEPS + 1))}
    if draw(st.booleans()):
        return functools.partial(skippers.EveryNth, n=draw(st.integers(2, 5)), **limits), 1
    most, threshold = draw(st.integers(1, 4)), draw(THRESHOLDS)
    return lambda: skippers.DeltaSkipper(threshold=jnp.asarray(threshold), max_skips=most, **limits), most


@few
@hypothesis.given(made=any_skipper(), seed=st.integers(0, 2**32 - 1))
def test_any_skipper_keeps_its_limits_whatever_is_observed(made, seed):
    skipper, most = made[0](), made[1]
    skip, refresh = run(skipper, drawn(seed, (STEPS, BLOCKS, GROUPS)))
    assert skip.dtype == refresh.dtype == bool
    assert not skip[: skipper.warm_up].any()
    assert not skip[max(0, STEPS - skipper.cool_down) :].any()
    assert not (skip & refresh).any()
    in_a_row = np.zeros((BLOCKS, GROUPS), int)
    kept = np.zeros((BLOCKS, GROUPS), bool)  # the last computed delta
    for step in range(STEPS):
        in_a_row = np.where(skip[step], in_a_row + 1, 0)
        assert in_a_row.max() <= most
        assert kept[skip[step]].all()
        kept = np.where(skip[step], kept, refresh[step])


@few
@hypothesis.given(made=any_skipper(), seed=st.integers(0, 2**32 - 1))
def test_any_skipper_decides_a_group_by_itself(made, seed):
    changes = drawn(seed, (STEPS, BLOCKS, GROUPS))
    others = changes.copy()
    others[..., 1] = drawn(seed + 1, (STEPS, BLOCKS))
    for found, wanted in zip(run(made[0](), others), run(made[0](), changes), strict=True):
        np.testing.assert_array_equal(found[..., 0], wanted[..., 0])


@st.composite
def any_router(draw):
    """How to make one."""
    kind = draw(st.sampled_from(["constant", "table", "edges", "volatility"]))
    if kind == "constant":
        make = functools.partial(routers.ConstantRouter, route=draw(st.sampled_from(ROUTES)))
    elif kind == "table":
        size = (draw(st.sampled_from([1, STEPS])), BLOCKS, len(SITES))
        routes = draw(st.lists(st.integers(0, len(ROUTES) - 1), min_size=1, max_size=5))
        make = functools.partial(routers.TableRouter.of, np.resize(routes, size))
    elif kind == "edges":
        first = draw(st.integers(0, STEPS))
        make = functools.partial(
            routers.edges, STEPS, BLOCKS, len(SITES), first=first, last=draw(st.integers(0, STEPS - first))
        )
    else:
        make = functools.partial(volatility_router, draw(THRESHOLDS))
    if draw(st.booleans()):
        cost = {route: draw(st.sampled_from([0.5, 1.0, 2.0])) for route in ROUTES}
        return lambda: routers.CostAwareRouter.of(make(), cost)
    return make


@few
@hypothesis.given(make=any_router(), seed=st.integers(0, 2**32 - 1), step=st.integers(0, STEPS - 1))
def test_any_router_takes_its_choices_and_a_group_by_itself(make, seed, step):
    router = make()
    shape = (BLOCKS, GROUPS)
    computed = np.random.default_rng(seed).random(shape) < 0.7
    volatility, change = drawn(seed, shape), drawn(seed + 1, shape)

    def decide(groups):
        values = (jnp.asarray(values[:, groups]) for values in (computed, volatility, change))
        observation = Observation(**dict(zip(("computed", "volatility", "delta_change"), values, strict=True)))
        return router.decide(router.init(BLOCKS, len(groups), len(SITES)), observation, at(step))[0]

    both = decide([0, 1])
    assert both.shape == (*shape, len(SITES))
    assert both.dtype == jnp.int32
    assert set(np.unique(both)) <= {ROUTES.index(name) for name in router.choices}
    for group in range(GROUPS):
        np.testing.assert_array_equal(decide([group])[:, 0], both[:, group])
    if isinstance(router, routers.CostAwareRouter):
        state = router.init(BLOCKS, GROUPS, len(SITES))
        plain = router.router.decide(state, observed(), at(step))[0]
        taken = router.decide(state, observed(), at(step))[0]
        cost = np.asarray(router.cost)
        assert (taken >= plain).all()  # in order of exactness
        assert (cost[taken] <= cost[plain]).all()
