"""From targets to thresholds: on constructed traces, and on held-out prompts of the bundled model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sixbit_jax import Pipeline
from sixbit_jax.calibrate import calibrate
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES
from sixbit_jax.pipeline import MINI_MODEL
from sixbit_jax.precision import (
    ConstantRouter,
    CostAwareRouter,
    DeltaSkipper,
    EveryNth,
    NeverSkip,
    PrecisionPolicy,
    targets,
)
from sixbit_jax.precision.calibration import Calibration, Fingerprint, OperatingPoints
from sixbit_jax.precision.measuring import Measured
from sixbit_jax.precision.targets import NAMED, QuantizationConfig, bisect, cheapest, resampled, simulated_bits, solve
from sixbit_jax.training.data import caption_table, held_out_scenes, training_phrases

STEPS, BLOCKS, PROMPTS = 20, 4, 3
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": BLOCKS, "sample_frames": 9}


def trace(**changes):
    """[prompts, steps, blocks, ...]: volatility falls over the steps, and differs between blocks and prompts."""
    lead = (PROMPTS, STEPS, BLOCKS)
    rng = np.random.default_rng(0)
    change = rng.uniform(0.02, 0.2, lead)
    change[:, 0] = np.inf
    values = {
        "volatility": np.linspace(1, 0.1, STEPS)[:, None] * rng.uniform(0.5, 1, (PROMPTS, 1, BLOCKS)),
        "delta_change": change,
        "error": np.broadcast_to([0.1, 0.01], (*lead, len(SITES), 2)),
        "outlier": rng.uniform(5, 30, (*lead, len(SITES))),
        "delta_error": np.full((*lead, len(SITES)), 0.05),
        "cache_error": np.broadcast_to([0.02, 0.1], (*lead, 2)),
    }
    return Measured(**{name: np.asarray(value, np.float16) for name, value in (values | changes).items()})


def calibration(points=None, **changes):
    line = np.ones((BLOCKS, len(SITES)), np.float32) * np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    return Calibration(
        alpha=line,
        beta=line / 10,
        correlation=line,
        site_correlation=line[0],
        trace=trace(**changes),
        points=points or OperatingPoints.none(),
        fingerprint=Fingerprint(transformer=CONFIG, hadamard={}, weights=np.zeros(1, np.float16)),
        prompts=("up",) * PROMPTS,
        settings={},
    )


@pytest.fixture(scope="module")
def synthetic():
    return calibration()


def spends(policy, calibration, steps=STEPS):
    return targets.Simulator(calibration, steps).raw(policy)


@pytest.mark.parametrize(("bits", "skip"), [(4.6, None), (5.2, None), (6.0, 0.1), (5.5, 0.3), (5.0, 0.3)])
def test_thresholds_meet_their_targets_in_the_simulation(synthetic, bits, skip):
    config = QuantizationConfig(target_mean_bits=bits, target_skip=skip)
    found = spends(solve(config, synthetic, STEPS), synthetic)
    assert found.mean_bits == pytest.approx(bits, abs=0.1)
    assert found.skip_share == pytest.approx(skip or 0.0, abs=0.02)


def test_one_route_meets_bits_by_skipping(synthetic):
    policy = solve(QuantizationConfig(activations="int8", target_mean_bits=6.5, outlier_limit=None), synthetic, STEPS)
    found = spends(policy, synthetic)
    assert found.mean_bits == pytest.approx(6.5, abs=0.1)
    assert found.skip_share == pytest.approx(1 - 6.5 / 8, abs=0.02)


def test_out_of_reach_says_what_is_not(synthetic):
    with pytest.raises(ArgumentError, match=r"target_skip=0\.9 cannot be met.*0 to 0\.\d+"):
        solve(QuantizationConfig(activations="int8", target_skip=0.9), synthetic, STEPS)
    with pytest.raises(ArgumentError, match=r"target_mean_bits=9 cannot be met.*: what can be is 4\.\d* to 8$"):
        solve(QuantizationConfig(target_mean_bits=9), synthetic, STEPS)


def test_no_calibration_is_an_error_that_names_the_command():
    with pytest.raises(ArgumentError, match="sixbit calibrate"):
        solve(NAMED["sixbit"], None, STEPS)
    assert solve(NAMED["int8"], None, STEPS) == PrecisionPolicy(
        router=ConstantRouter(route="int8"), cache_format="int8"
    )
    assert solve(QuantizationConfig(activations="int8", skip_threshold=0.1), None, 9).skipper.threshold == np.float32(
        0.1
    )


def test_a_fixed_rhythm_needs_no_calibration_and_leaves_bits_to_the_router(synthetic):
    policy = solve(NAMED["int8-reuse"], None, STEPS)
    assert policy.skipper == EveryNth(n=2)
    assert (policy.router, policy.outlier_limit) == (ConstantRouter(route="int8"), None)
    config = QuantizationConfig(target_mean_bits=5.5, skip_every=3, warm_up=2)
    policy = solve(config, synthetic, STEPS)
    assert policy.skipper == EveryNth(n=3, warm_up=2)
    spent = spends(policy, synthetic)
    assert spent.mean_bits == pytest.approx(5.5, abs=0.1)
    assert 0.1 < spent.skip_share < 1 / 3


def test_raw_thresholds_are_kept(synthetic):
    policy = solve(QuantizationConfig(error_threshold=0.07, skip_threshold=0.2, max_skips=3), synthetic, STEPS)
    assert (policy.router.threshold, policy.skipper.threshold) == (np.float32(0.07), np.float32(0.2))
    assert policy.skipper.max_skips == 3
    np.testing.assert_array_equal(policy.router.alpha, synthetic.alpha)
    assert isinstance(solve(QuantizationConfig(error_threshold=0.07), synthetic, STEPS).skipper, NeverSkip)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs target_mean_bits"),
        ({"activations": "int3"}, "activations='int3' is not one of routed, nvfp4, int8, 16bit"),
        ({"target_mean_bits": 17}, "between 0 and 16"),
        ({"target_mean_bits": 6, "target_skip": 1.5}, "between 0 and 1"),
        ({"target_mean_bits": 6, "error_threshold": 0.1}, "target_mean_bits or error_threshold, not both"),
        ({"target_mean_bits": 6, "target_skip": 0.1, "skip_threshold": 0.1}, "target_skip or skip_threshold"),
        ({"target_psnr": 30, "target_mean_bits": 6}, "target_psnr or target_mean_bits"),
        ({"activations": "int8", "error_threshold": 0.1}, "error_threshold is for activations"),
        ({"activations": "int8", "target_mean_bits": 6, "target_skip": 0.2}, "is met by skipping"),
        ({"activations": "int8", "max_skips": 0}, "must be at least 1"),
        ({"activations": "int8", "skip_every": 1}, "skip_every=1 must be at least 2"),
        ({"activations": "int8", "skip_every": 2, "skip_threshold": 0.1}, "skip_threshold or skip_every"),
        ({"activations": "int8", "skip_every": 2, "target_mean_bits": 4.5}, "is met by skipping"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ArgumentError, match=message):
        QuantizationConfig(**settings)
    with pytest.raises(ArgumentError, match="w4a16, int8, nvfp4, int8-reuse, sixbit"):
        QuantizationConfig.named("w8a8")


def steady(d, **policy):
    """The skips of a block whose delta changes by d every step."""
    policy = {"outlier_limit": None, "router": ConstantRouter(route="16bit"), **policy}
    skipper = DeltaSkipper(threshold=jnp.asarray(0.25, jnp.float32), max_skips=2, warm_up=3, cool_down=2)
    changes = np.full((PROMPTS, STEPS, BLOCKS), d)
    changes[:, 0] = np.inf
    steps = resampled(trace(delta_change=changes), STEPS)
    return np.asarray(simulated_bits(PrecisionPolicy(skipper=skipper, **policy), steps))[:, 0, 0, 0] == 0


def test_d_after_a_skip_is_the_length_of_the_path():
    """d = 0.1: one d is accumulated at the first skip, two at the second; d of the next delta is 0.3, over tau."""
    skipped = np.flatnonzero(steady(0.1)).tolist()
    assert skipped == [3, 4, 7, 8, 11, 12, 15, 16]
    # Computed at 5 with d = 0.3: not below 0.25. Computed again at 6 with d = 0.1.
    assert np.flatnonzero(steady(0.3)).tolist() == []


def test_noise_of_routes_and_of_the_cache_counts_as_change():
    assert steady(0.1, cache_format="int8").sum() == steady(0.1).sum()
    assert steady(0.24, cache_format="nvfp4").sum() == 0 < steady(0.24).sum()
    assert steady(0.24, router=ConstantRouter(route="nvfp4")).sum() == 0


def test_outliers_are_16_bit_where_a_delta_is_refreshed(synthetic):
    steps = resampled(synthetic.trace, STEPS)
    skipper = DeltaSkipper(threshold=jnp.asarray(0.0, jnp.float32), warm_up=5, cool_down=2)
    policy = PrecisionPolicy(router=ConstantRouter(route="int8"), skipper=skipper)
    bits = np.asarray(simulated_bits(policy, steps))
    refreshed = np.zeros(STEPS, bool)
    refreshed[4 : STEPS - 3] = True
    wanted = np.where(refreshed[:, None, None, None] & (np.asarray(steps.outlier) > 25), 16, 8)
    np.testing.assert_array_equal(bits, wanted)


def test_a_trace_of_other_steps_keeps_its_path():
    recorded = resampled(trace(), STEPS)
    np.testing.assert_allclose(recorded.volatility[:, :, 1], np.asarray(trace().volatility[1], np.float32), rtol=1e-6)
    for steps in (7, 41):
        found = resampled(trace(), steps)
        assert found.outlier.shape == (steps, BLOCKS, PROMPTS, len(SITES))
        np.testing.assert_allclose(found.delta_change[1:].sum(0), recorded.delta_change[1:].sum(0), rtol=1e-4)
        for end in (0, -1):
            np.testing.assert_allclose(found.volatility[end], recorded.volatility[end], rtol=1e-5)


def test_bisection_finds_either_direction():
    for sign in (1, -1):
        assert bisect(lambda x, sign=sign: sign * x**3, (0.0, 2.0), sign * 1.0, "x") == pytest.approx(1, abs=1e-5)
    with pytest.raises(ArgumentError, match="x=9 cannot be met with these settings: what can be is 0 to 8"):
        bisect(lambda x: x**3, (0.0, 2.0), 9.0, "x")


def points():
    """PSNR falls with bits saved and with skips."""
    skip, bits = np.meshgrid([0.0, 0.2, 0.4], [8.0, 6.0, 4.0], indexing="ij")
    return OperatingPoints(
        error_threshold=np.zeros((3, 3)),
        skip_threshold=np.zeros((3, 3)),
        mean_bits=bits * (1 - skip),
        skip_share=skip,
        psnr=40 - 10 * skip - 3 * (8 - bits),
    )


def test_psnr_is_reached_in_the_fewest_bits():
    found = cheapest(QuantizationConfig(target_psnr=34.0), points())
    assert (found.target_psnr, found.target_skip) == (None, pytest.approx(0.4, abs=0.01))
    assert found.target_mean_bits == pytest.approx(0.6 * (8 - 2 / 3), abs=0.1)
    without = cheapest(QuantizationConfig(target_psnr=34.0, target_skip=0.0), points())
    assert without.target_mean_bits == pytest.approx(6, abs=0.1)
    with pytest.raises(ArgumentError, match=r"target_psnr=50 cannot be met.*24 to 40 dB"):
        cheapest(QuantizationConfig(target_psnr=50.0), points())
    with pytest.raises(ArgumentError, match="without"):
        cheapest(QuantizationConfig(target_psnr=50.0), OperatingPoints.none())
    with pytest.raises(ArgumentError, match=r"target_skip=0\.9 is beyond"):
        cheapest(QuantizationConfig(target_psnr=30.0, target_skip=0.9), points())


def test_what_real_runs_differed_by_is_taken_off(synthetic):
    """One operating point, at which real runs of the first two prompts spent 0.3 bits more than the simulation."""
    one = OperatingPoints(**{f.name: np.full((1, 1), 0.2) for f in dataclasses.fields(OperatingPoints)})
    settings = {"points": 2, "points_cache_format": "int8"}
    config = QuantizationConfig(error_threshold=0.2, skip_threshold=0.2)
    few = dataclasses.replace(synthetic, trace=jax.tree.map(lambda v: v[:2], synthetic.trace))
    simulated = spends(solve(config, few, STEPS), few)
    one = dataclasses.replace(one, mean_bits=one.mean_bits * 0 + simulated.mean_bits + 0.3)
    biased = dataclasses.replace(synthetic, points=one, settings=settings)
    missed = targets.misses(biased)
    np.testing.assert_allclose(missed.bits, 0.3, atol=1e-6)
    np.testing.assert_allclose(missed.skip, 0.2 - simulated.skip_share, atol=1e-6)
    policy = solve(QuantizationConfig(target_mean_bits=6.0), biased, STEPS)
    assert spends(policy, biased).mean_bits == pytest.approx(5.7, abs=0.1)
    assert targets.misses(synthetic)(simulated) == (0.0, 0.0)


def test_a_device_without_fp4_takes_int8_and_skips_for_the_bits(synthetic, monkeypatch, caplog):
    monkeypatch.setattr(targets, "route_costs", lambda: {"nvfp4": 1.0, "int8": 1.0, "16bit": 2.0})
    config = QuantizationConfig(target_mean_bits=6.5, hardware_aware=True, outlier_limit=None)
    policy = solve(config, synthetic, STEPS)
    assert policy.router.choices == ("int8",)
    assert caplog.text.count("int8 costs no more") == 1
    assert spends(policy, synthetic).mean_bits == pytest.approx(6.5, abs=0.1)
    assert not policy.router.observes
    with pytest.raises(ArgumentError, match="leaves INT8 alone on this device"):
        solve(dataclasses.replace(config, target_skip=0.3), synthetic, STEPS)
    monkeypatch.setattr(targets, "route_costs", lambda: {"nvfp4": 0.5, "int8": 1.0, "16bit": 2.0})
    policy = solve(dataclasses.replace(config, max_skips=1), synthetic, STEPS)
    assert isinstance(policy.router, CostAwareRouter)
    assert policy.router.choices == ("nvfp4", "int8")
    assert isinstance(policy.skipper, NeverSkip)


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"target_mean_bits": 5.0, "target_skip": 0.25}, {"target_mean_bits": 5.5}])
def test_held_out_prompts_of_the_bundled_model_meet_targets(bundled, target):
    """12 steps; thresholds solved from other prompts. Each prompt spends its own; the mean is what was asked for.

    Without the purified refresh: its sites near the limit make prompts differ by 0.2 bits, too much for three of them.
    """
    pipe, measured, steps = bundled
    config = QuantizationConfig(**target, warm_up=2, cool_down=1, outlier_limit=None)
    pipe = dataclasses.replace(pipe, quantization=config, calibration=measured)
    prompts = [phrase.text for phrase in held_out_scenes()[5::19]]
    spent = pipe(prompts, num_inference_steps=steps, seed=7, output_type="latent").summary
    assert len(spent.videos) == len(prompts)
    assert spent.mean_bits == pytest.approx(target["target_mean_bits"], abs=0.1)
    assert spent.skip_share == pytest.approx(target.get("target_skip", 0.0), abs=0.02)


@pytest.fixture(scope="module")
def bundled():
    steps = 12
    pipe = Pipeline.from_pretrained(MINI_MODEL, dtype=jnp.float32, quantization="w4a16")
    table = caption_table()
    prompts = [table[i] for i in training_phrases()[7::140]]
    with jax.numpy_dtype_promotion("strict"):
        return pipe, calibrate(pipe, prompts, num_inference_steps=steps, points=1), steps


@pytest.mark.slow
def test_the_shipped_calibration_meets_the_preset_on_held_out_prompts():
    """50 steps in bfloat16, prompts that the calibration did not see; the mean is what was asked for."""
    pipe = Pipeline.from_pretrained("mini", quantization="sixbit")
    prompts = list(dict.fromkeys(scene.text for scene in held_out_scenes()))[::2]
    spent = pipe(prompts, seed=100, output_type="latent").summary
    assert len(spent.videos) == len(prompts) == 24
    assert spent.mean_bits == pytest.approx(6.0, abs=0.1)
    assert spent.skip_share == pytest.approx(0.3, abs=0.02)
