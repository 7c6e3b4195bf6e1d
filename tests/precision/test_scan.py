"""The scan over blocks of a model that is not ours, against a plain Python loop that decides and computes by itself."""

import functools

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign import BLOCKS, SITES, STEPS, TOKENS, WIDTH
from policies import delta_skipper

from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.split import Split
from sixbit_jax.precision import (
    ConstantRouter,
    CostAwareRouter,
    EveryNth,
    PrecisionPolicy,
    TableRouter,
    VolatilityRouter,
    accounting,
    init_scan,
    scan_blocks,
)
from sixbit_jax.precision.calibration import fit
from sixbit_jax.precision.linears import BITS
from sixbit_jax.precision.measuring import LOW_BIT, measure_blocks
from sixbit_jax.precision.types import Observation, Progress, nothing_observed
from sixbit_jax.qtensor import ROUTES

pytestmark = pytest.mark.usefixtures("quick_compilation")
ONES = jnp.ones((BLOCKS, len(SITES)), jnp.float32)
ROUTER = VolatilityRouter(
    alpha=0.1 * ONES, beta=0.01 * ONES * jnp.arange(3, dtype=jnp.float32), threshold=jnp.float32(0.045)
)
POLICIES = {
    "routed": PrecisionPolicy(router=ROUTER),
    "all of it": PrecisionPolicy(
        router=ROUTER, skipper=delta_skipper(0.62, warm_up=2), outlier_limit=5.5, cache_format="16bit"
    ),
    "table": PrecisionPolicy(
        router=TableRouter.of(np.arange(BLOCKS * len(SITES)).reshape(1, BLOCKS, len(SITES)) % 3),
        skipper=EveryNth(n=2, warm_up=1, cool_down=1),
        outlier_limit=None,
    ),
}


@pytest.fixture(scope="module")
def model():
    return foreign.make()


def by_hand(split, policy, path):
    """One sample, block by block in Python, each step from the x that `path` has before it -> (x after each step, bits
    [steps, blocks, sites])."""
    model, taken, after = split.merge(), np.zeros((STEPS, BLOCKS, len(SITES)), np.uint8), []
    graph, params = nnx.split(model.blocks)
    blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(BLOCKS)]
    router, skipper = policy.router.init(BLOCKS, 1, len(SITES)), policy.skipper.init(BLOCKS, 1)
    observation, deltas = nothing_observed(BLOCKS, 1), [None] * BLOCKS
    for step, x in enumerate(path):
        progress = Progress(step=jnp.asarray(step, jnp.int32), steps=STEPS)
        routes, _, router = policy.router.decide(router, observation, progress)
        skip, refresh, skipper = policy.skipper.decide(skipper, observation, progress)
        condition, h = model.condition(x, step), x
        volatility, change = np.full((2, BLOCKS, 1), np.nan, np.float32)
        for i, block in enumerate(blocks):
            if skip[i, 0]:
                h = h + deltas[i]
                continue

            def linear(site, layer, x, i=i, routes=routes, refresh=refresh, step=step):
                j = SITES.index(site)
                outliers = policy.outlier_limit is not None and jnp.abs(x).max() > policy.outlier_limit * abs(x).mean()
                route = ROUTES[-1] if refresh[i, 0] and outliers else ROUTES[routes[i, 0, j]]
                taken[step, i, j] = BITS[ROUTES.index(route)]
                return layer(x, route=route)

            delta = block(h, condition, linear) - h
            volatility[i] = jnp.abs(delta).sum() / jnp.abs(h).sum()
            old, deltas[i] = deltas[i], delta
            change[i] = np.inf if old is None else jnp.abs(delta - old).sum() / jnp.abs(old).sum()
            h = h + delta
        observation = Observation(computed=~skip, volatility=jnp.asarray(volatility), delta_change=jnp.asarray(change))
        after.append(foreign.towards(x, h))
    return jnp.stack(after), taken


@pytest.mark.parametrize("name", POLICIES)
def test_the_scan_is_the_loop_by_hand(model, name):
    """A batch decided sample by sample, and a vmap over samples, both under jit.

    Each step by hand starts where the scan's did: in one step of a hundred a last-bit difference becomes one of a whole
    code, which later steps would amplify.
    """
    policy, x = POLICIES[name], foreign.noise(2)
    found, trace = foreign.sample(model, policy, x)
    mapped, traces = jax.vmap(lambda row: foreign.sample(model, policy, row[None]), out_axes=(1, 2))(x)
    mapped, traces = mapped[:, :, 0], jax.tree.map(lambda leaf: leaf[:, :, :, 0], traces)
    for run, decided in ((found, trace), (mapped, traces)):
        paths = jnp.concatenate([x[None], run[:-1]])
        wanted, bits = zip(*(by_hand(model, policy, paths[:, i, None]) for i in range(2)), strict=True)
        wanted, bits = jnp.concatenate(wanted, 1), np.stack(bits, axis=2)
        assert {"routed": {4, 8}, "all of it": {0, 4, 8, 16}, "table": {0, 4, 8, 16}}[name] == set(np.unique(bits))
        # Where nothing depends on the data there is one group.
        np.testing.assert_array_equal(decided.bits, bits[:, :, : decided.bits.shape[2]])
        distance = jnp.linalg.norm(run - wanted, axis=(2, 3)) / jnp.linalg.norm(wanted, axis=(2, 3))
        assert distance.max() < 5e-3
        assert (distance > 1e-5).sum() <= 1


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_of_skipped_blocks_stay_unseen(model, mapped):
    """NaN in the blocks that are skipped at a step changes nothing; in those that are not, everything."""
    policy = PrecisionPolicy(router=ConstantRouter(route="int8"), skipper=delta_skipper(0.62, warm_up=2), joint=True)

    def one(model, x, state, index):
        return foreign.step(model, policy, x, state, index)

    run = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)) if mapped else one)
    x = foreign.noise(1)[None] if mapped else foreign.noise(1)
    start = functools.partial(foreign.start, policy)
    state, mixed = (jax.vmap(start) if mapped else start)(x), 0
    for index in range(STEPS):
        after, following, trace = run(model, x, state, jnp.int32(index))
        skipped = np.asarray(trace.bits).reshape(BLOCKS, -1)[:, 0] == 0
        if skipped.any() and not skipped.all():
            mixed += 1
            found, _, _ = run(poisoned(model, skipped), x, state, jnp.int32(index))
            np.testing.assert_array_equal(found, after)
            found, _, _ = run(poisoned(model, ~skipped), x, state, jnp.int32(index))
            assert jnp.isnan(found).all()
        x, state = after, following
    assert mixed


def poisoned(split, which):
    """The model with NaN for every number of some blocks."""
    model = split.merge()
    graph, params = nnx.split(model.blocks)

    def poison(leaf):
        return leaf.at[np.flatnonzero(which)].set(jnp.nan) if leaf.dtype == jnp.float32 else leaf

    model.blocks = nnx.merge(graph, jax.tree.map(poison, params))
    return Split.of(model)


def test_measured_and_fitted_without_our_pipeline(model):
    """Volatility and NVFP4's error as by hand; the fit of them routes the model."""

    @jax.jit
    def measure(split, x):
        model = split.merge()
        graph, params = nnx.split(model.blocks)

        def block(params, x, condition, linears):
            return nnx.merge(graph, params)(x, condition, linears)

        def body(carry, index):
            x, last = carry
            h, last, found = measure_blocks(block, params, x, model.condition(x, index), last, index == 0, sites=SITES)
            return (foreign.towards(x, h), last), found

        return jax.lax.scan(body, (x, jnp.zeros((BLOCKS, *x.shape))), jnp.arange(STEPS, dtype=jnp.int32))[1]

    x = foreign.noise(2)
    measured = measure(model, x)
    assert measured.error.shape == (STEPS, BLOCKS, len(SITES), len(LOW_BIT))
    watched = PrecisionPolicy(skipper=delta_skipper(0.0), outlier_limit=None, joint=True)
    _, trace = foreign.sample(model, watched, x)
    np.testing.assert_allclose(measured.volatility, trace.volatility[:, :, 0], rtol=1e-4)
    np.testing.assert_allclose(measured.delta_change, trace.delta_change[:, :, 0], rtol=1e-3)
    assert (np.asarray(measured.error[..., 0]) > 0.02).all()
    assert (measured.error[..., 1] < measured.error[..., 0] / 3).all()

    fitted = fit(measured.volatility[None], measured.error[None, ..., LOW_BIT.index("nvfp4")])
    predicted = fitted["alpha"] * np.asarray(measured.volatility)[..., None] + fitted["beta"]
    router = VolatilityRouter(
        alpha=jnp.asarray(fitted["alpha"]),
        beta=jnp.asarray(fitted["beta"]),
        threshold=jnp.float32(np.median(predicted)),
    )
    _, trace = foreign.sample(model, PrecisionPolicy(router=router, joint=True), x)
    spent = accounting.summary(trace.bits, foreign.WORK)
    assert 5 < spent.mean_bits < 7
    same = CostAwareRouter.of(router, dict.fromkeys(ROUTES, 1.0))
    _, trace = foreign.sample(model, PrecisionPolicy(router=same, joint=True), x)
    assert (trace.bits == 16).all()


def test_the_router_of_another_model_is_refused(model):
    for wrong in (ROUTER.replace(alpha=jnp.ones((BLOCKS, 4))), TableRouter.of(np.zeros((1, BLOCKS, 4), int))):
        with pytest.raises(ArgumentError, match="3 sites"):
            foreign.sample(model, PrecisionPolicy(router=wrong), foreign.noise(1))
    with pytest.raises(ArgumentError, match="3 samples cannot be of 2 videos"):
        init_scan(PrecisionPolicy(), blocks=BLOCKS, sites=SITES, shape=(3, 4, 32), dtype=jnp.float32, videos=2)


def test_low_bits_need_quantised_linears():
    with pytest.raises(ArgumentError, match="quantize_model"):
        foreign.sample(foreign.make(quantized=False), POLICIES["routed"], foreign.noise(1))


@pytest.mark.parametrize(
    ("asked", "message"),
    [(("a",), "no linear at b"), (("a", "b", "a"), "two linears at 'a'"), (("a", "c"), "'c'.*its sites: a, b")],
)
def test_a_block_runs_each_site_once(asked, message):
    def block(params, x, context, linears):
        for site in asked:
            x = linears(site, lambda x: x, x)
        return x

    policy, x, sites = PrecisionPolicy(), jnp.zeros((1, TOKENS, WIDTH)), ("a", "b")
    state = init_scan(policy, blocks=1, sites=sites, shape=x.shape, dtype=x.dtype)
    progress = Progress(step=jnp.int32(0), steps=1)
    with pytest.raises(ArgumentError, match=message):
        scan_blocks(block, None, x, None, policy, state, progress, sites=sites)
