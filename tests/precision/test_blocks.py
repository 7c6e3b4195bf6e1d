"""The sampling loop under policies, on a small transformer with random weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from policies import BLOCKS, CONFIG, POLICIES, STEPS, arguments, delta_skipper, make, volatility_router

from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES
from sixbit_jax.models.split import Split
from sixbit_jax.precision import ConstantRouter, PrecisionPolicy
from sixbit_jax.sampling import sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def plain():
    return make(False)


@pytest.fixture(scope="module")
def quantized():
    return make(True)


@pytest.mark.parametrize("name", POLICIES)
def test_scan_equals_python_loop(quantized, name):
    policy, kind = POLICIES[name], "CogVideoXDPMScheduler" if name in ("int8", "sixbit") else "CogVideoXDDIMScheduler"
    found, found_trace = sampler.sample(quantized, *arguments(2, kind=kind), policy=policy)
    wanted, wanted_trace = sampler.sample_python_loop(quantized, *arguments(2, kind=kind), policy=policy)
    for field in ("bits", "age"):
        np.testing.assert_array_equal(getattr(found_trace.precision, field), getattr(wanted_trace.precision, field))
    # Rounding to codes turns a last-bit difference into a code's, now and then.
    error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
    assert error < 2e-2


def test_routes_bits_and_shapes_of_the_trace(quantized):
    _, trace = sampler.sample(quantized, *arguments(2), policy=POLICIES["sixbit"])
    trace = trace.precision
    assert trace.bits.shape == (STEPS, BLOCKS, 2, len(SITES))
    assert set(np.unique(trace.bits)) == {0, 4, 8, 16}
    skipped = np.asarray(trace.bits == 0)
    assert (skipped.all(-1) == skipped.any(-1)).all()
    np.testing.assert_array_equal(np.asarray(trace.age) > 0, skipped[..., 0])
    np.testing.assert_array_equal(np.isnan(trace.volatility), skipped[..., 0])
    assert (np.asarray(trace.bits[0]) >= 8).all()


def test_after_a_skip_and_at_the_first_step_int8(quantized):
    policy = dataclasses.replace(POLICIES["sixbit"], router=volatility_router(1e9), outlier_limit=None)
    _, trace = sampler.sample(quantized, *arguments(), policy=policy)
    bits = np.asarray(trace.precision.bits)[:, :, 0]
    assert (bits[0] == 8).all()
    for step in range(1, STEPS):
        for block in range(BLOCKS):
            if bits[step, block, 0] == 0:
                continue
            assert (bits[step, block] == (8 if bits[step - 1, block, 0] == 0 else 4)).all()


def test_outliers_run_in_16_bit_only_while_a_delta_is_refreshed(quantized):
    policy = dataclasses.replace(POLICIES["sixbit"], router=ConstantRouter(route="int8"))
    _, trace = sampler.sample(quantized, *arguments(), policy=policy)
    bits, outlier = (np.asarray(v)[:, :, 0] for v in (trace.precision.bits, trace.precision.outlier))
    # warm_up 3, cool_down 1, two skips: computed at 0, 1, 2, 5; the deltas of 2 and 5 are reused.
    for step in (2, 5):
        np.testing.assert_array_equal(bits[step], np.where(outlier[step] > policy.outlier_limit, 16, 8))
    assert (bits[2] == 16).any()
    assert (bits[2] == 8).any()
    assert (bits[[0, 1]] == 8).all()
    assert (bits[[3, 4, 6]] == 0).all()


@pytest.mark.parametrize("cache_format", ["16bit", "int8", "nvfp4"])
def test_a_skipped_block_adds_its_last_delta(quantized, cache_format):
    """With every block skipped, the stream moves by the stored deltas alone."""
    policy = PrecisionPolicy(skipper=delta_skipper(), cache_format=cache_format)
    latents, _ = sampler.sample(quantized, *arguments(), policy=policy)
    full, _ = sampler.sample(quantized, *arguments(), policy=PrecisionPolicy())
    error = float(jnp.linalg.norm(latents - full) / jnp.linalg.norm(full))
    assert 0 < error < 1


@pytest.mark.parametrize("name", ["cache", "every second"])
def test_skipped_blocks_run_no_matmul(plain, name):
    """Weights of a block are NaN from a step on in which it is always skipped."""
    model = plain.merge()
    state, inputs = sampler.prepare(model, *arguments()[:3], arguments()[3], policy := POLICIES[name])
    conditioning = arguments()[3]
    row = [jax.tree.map(lambda x, i=i: x[i], inputs) for i in range(STEPS)]
    for i in range(2):
        state, trace = sampler._jitted_step(plain, state, row[i], conditioning, policy, steps=STEPS)
        assert (trace.precision.bits > 0).all()
    wanted, trace = sampler._jitted_step(plain, state, row[2], conditioning, policy, steps=STEPS)
    assert (trace.precision.bits == 0).all()
    poisoned = plain.merge()
    graph, params = nnx.split(poisoned.blocks)
    poisoned.blocks = nnx.merge(graph, jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    found, _ = sampler._jitted_step(Split.of(poisoned), state, row[2], conditioning, policy, steps=STEPS)
    np.testing.assert_array_equal(found.latents, wanted.latents)
    plainly = state.replace(precision=None)
    computed, _ = sampler._jitted_step(Split.of(poisoned), plainly, row[2], conditioning, None, steps=STEPS)
    assert jnp.isnan(computed.latents).all()


def test_whole_steps_need_one_delta(quantized):
    """Of the size of the stream, whatever the number of blocks and videos, and videos still decide for themselves."""
    policy = dataclasses.replace(POLICIES["every second"], router=ConstantRouter(route="int8"), outlier_limit=5.0)
    state, _ = sampler.prepare(quantized.merge(), *arguments(2), policy)
    model = quantized.merge()
    tokens = arguments()[3].prompt_embeds.shape[1] + math.prod(model.token_grid(arguments()[2].shape))
    assert state.precision.cache.shape == (2 * 2, tokens, CONFIG.inner_dim)
    _, trace = sampler.sample(quantized, *arguments(2), policy=policy)
    bits = np.asarray(trace.precision.bits)
    assert bits.shape[2] == 2
    skipped = (bits == 0).all((1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(skipped), [2, 4, 6])
    assert (bits[~skipped] > 0).all()
    assert (bits[[1, 3, 5]] == 16).any()
    assert (bits[[0, 7]] == 8).all()


@pytest.mark.parametrize("name", ["volatility", "sixbit"])
def test_a_video_does_not_depend_on_its_neighbours(quantized, name):
    policy = POLICIES[name]
    schedule, scale, latents, conditioning = arguments(3)
    together, trace = sampler.sample(quantized, schedule, scale, latents, conditioning, policy=policy)
    alone, alone_trace = sampler.sample(
        quantized, schedule, scale, latents[1:2], jax.tree.map(lambda v: v[1:2], conditioning), policy=policy
    )
    np.testing.assert_array_equal(trace.precision.bits[:, :, 1:2], alone_trace.precision.bits)
    np.testing.assert_allclose(together[1:2], alone, rtol=0, atol=2e-2)


def test_joint_decisions_are_one_for_the_batch(quantized):
    policy = dataclasses.replace(POLICIES["sixbit"], joint=True)
    _, trace = sampler.sample(quantized, *arguments(3), policy=policy)
    assert trace.precision.bits.shape == (STEPS, BLOCKS, 1, len(SITES))


def test_thresholds_change_without_compiling_again(quantized):
    sampler.sample.clear_cache()
    for threshold in (0.0, 1.0):
        policy = PrecisionPolicy(router=volatility_router(threshold), skipper=delta_skipper(threshold))
        sampler.sample(quantized, *arguments(), policy=policy)
    assert sampler.sample._cache_size() == 1


def test_low_bits_need_quantised_linears(plain):
    with pytest.raises(ArgumentError, match="quantize_model"):
        sampler.sample(plain, *arguments(), policy=POLICIES["int8"])
    with pytest.raises(ArgumentError, match="int3"):
        sampler.sample(plain, *arguments(), policy=PrecisionPolicy(skipper=delta_skipper(), cache_format="int3"))
