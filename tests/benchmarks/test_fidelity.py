"""The fidelity study: its lanes are the sampler's runs, its changes to the policies do what they say, and it runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest

from benchmarks import fidelity, fidelity_programs, fidelity_report
from sixbit_jax.models.linears import SITES
from sixbit_jax.precision import NeverSkip
from sixbit_jax.precision.routers import INT8, NVFP4, SIXTEEN
from sixbit_jax.precision.types import Observation, Progress, nothing_observed
from sixbit_jax.sampling import sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
BLOCKS, STEPS = policies.BLOCKS, policies.STEPS


def skipper(tau=1e9, purify=True, **limits):
    limits = {"max_skips": 2, "warm_up": 2, "cool_down": 1, **limits}
    return fidelity.StudySkipper(
        threshold=jnp.full((BLOCKS, 1), tau, jnp.float32),
        table=jnp.zeros((STEPS, BLOCKS), bool),
        by_table=jnp.asarray(False),
        purify=jnp.asarray(purify),
        in_sight=jnp.asarray(False),
        **{name: jnp.asarray(value, jnp.int32) for name, value in limits.items()},
    )


def router(threshold, *, table=None, stale=False, clean=0, late=0, **limits):
    ones = jnp.ones((BLOCKS, len(SITES)), jnp.float32)
    return fidelity.StudyRouter(
        table=jnp.broadcast_to(jnp.asarray(NVFP4 if table is None else table, jnp.int32), (STEPS, BLOCKS, len(SITES))),
        alpha=0.1 * ones,
        beta=0 * ones,
        threshold=jnp.asarray(threshold, jnp.float32),
        by_table=jnp.asarray(table is not None),
        stale=jnp.asarray(stale),
        clean=jnp.asarray(clean, jnp.int32),
        late=jnp.asarray(late, jnp.int32),
        skipper=skipper(**limits),
    )


def decisions(router, skipper):
    """(routes, skips, refreshes) of every step, where volatility is 0.01 and deltas change by 0.1."""
    state = router.init(BLOCKS, 1, len(SITES)), skipper.init(BLOCKS, 1)
    observation, found = nothing_observed(BLOCKS, 1), []
    for step in range(STEPS):
        progress = Progress(step=jnp.asarray(step, jnp.int32), steps=STEPS)
        routes, _, first = router.decide(state[0], observation, progress)
        skip, refresh, second = skipper.decide(state[1], observation, progress)
        state = (first, second)
        observation = Observation(
            computed=~skip,
            volatility=jnp.where(skip, jnp.nan, 0.01),
            delta_change=jnp.where(skip, jnp.nan, jnp.inf if step == 0 else 0.1),
        )
        found.append((np.asarray(routes)[0, 0, 0], bool(skip[0, 0]), bool(refresh[0, 0])))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.slow
def test_a_lane_is_a_run_of_the_sampler():
    """Routed, skipping and purified lanes against the real policies, video by video."""
    model, arguments, real = policies.make(True), policies.arguments(2), policies.POLICIES["sixbit"]
    wanted = [real, dataclasses.replace(real, skipper=NeverSkip())]
    lanes = [
        dataclasses.replace(
            real,
            router=router(real.router.threshold, tau=tau, warm_up=real.skipper.warm_up),
            skipper=skipper(tau, tau > 0, warm_up=real.skipper.warm_up),
        )
        for tau in (1e9, 0.0)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    found, trace = fidelity_programs.run_lanes(model, *arguments, stacked)
    schedule, scale, latents, conditioning = arguments
    widths = set()
    for i, policy in enumerate(wanted):
        alone = jax.tree.map(lambda value, i=i: value[i : i + 1], (latents, conditioning))
        one, ran = sampler.sample(model, schedule, scale, *alone, policy=policy)
        np.testing.assert_array_equal(trace.bits[i], ran.precision.bits)
        # A batched product may round its sums otherwise, which moves a code now and then.
        assert jnp.linalg.norm(found[i] - one[0]) < 2e-2 * jnp.linalg.norm(one)
        widths |= set(np.unique(trace.bits[i]).tolist())
    assert widths == {0, 4, 8, 16}


def test_a_skip_is_followed_by_int8_unless_stale():
    same = skipper()
    routes, skips, _ = decisions(router(1.0), same)
    assert skips == [False, False, True, True, False, True, True, False]
    assert [routes[i] for i in (0, 1, 4, 7)] == [INT8, NVFP4, INT8, INT8]
    routes, _, _ = decisions(router(1.0, stale=True), same)
    assert [routes[i] for i in (0, 1, 4, 7)] == [INT8, NVFP4, NVFP4, NVFP4]


def test_a_clean_refresh_is_of_its_route_at_least():
    routes, skips, refreshes = decisions(router(1.0, clean=SIXTEEN), skipper())
    assert [not skip and route == SIXTEEN for route, skip in zip(routes, skips, strict=True)] == refreshes
    assert sum(refreshes) == 2
    assert not any(decisions(router(1.0), skipper(purify=False))[2])


def test_the_last_steps_are_int8_at_least():
    routes, _, _ = decisions(router(1.0, late=3), skipper(0.0))
    assert routes == [INT8, NVFP4, NVFP4, NVFP4, NVFP4, INT8, INT8, INT8]


def test_tables():
    table = np.zeros((STEPS, BLOCKS), bool)
    table[3:5] = True
    by_table = skipper().replace(table=jnp.asarray(table), by_table=jnp.asarray(True))
    routes, skips, refreshes = decisions(router(0.0, table=INT8), by_table)
    assert routes == [INT8] * STEPS
    assert skips == table[:, 0].tolist()
    assert refreshes == [step == 2 for step in range(STEPS)]


@pytest.mark.slow
def test_tiny_study(tmp_path):
    record = fidelity.main(["--tiny", "--out", str(tmp_path / "study")])
    assert record == json.loads((tmp_path / "study" / "results.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["bf16"]["psnr"] is None
    assert rows["bf16"]["latent_error"]["worst"] == 0
    floor, eight = rows["float32 (the floor of bf16)"], rows["W4A8"]
    assert floor["psnr"]["mean"] > eight["psnr"]["mean"] > 10
    assert (eight["mean_bits"], eight["skip_share"]) == pytest.approx((8, 0))
    full = rows["DMPQ + TDC, PDR (15 %, 6 bits)"]
    assert full["skip_share"] > 0
    assert full["mean_bits"] < full["mean_bits_computed"]
    assert all(0 <= row["psnr"]["worst"] <= row["psnr"]["mean"] for row in rows.values() if row["psnr"])
    text = (tmp_path / "study" / "report.md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert record["command"].startswith("python -m benchmarks.fidelity --tiny --out ")
    assert (tmp_path / "study" / "trace_ddim.png").exists()
    resumed = fidelity.main(["--tiny", "--resume", "--out", str(tmp_path / "study")])
    assert resumed["rows"] == record["rows"]
    with pytest.raises(ValueError, match=r"'clips': 2.*'clips': 4"):
        fidelity.main(["--clips", "4", "--resume", "--out", str(tmp_path / "study")])


def make_row(name, group, psnr, bits=6.0, skipped=0.0, accuracy=1.0):
    by_clip = None if psnr is None else [psnr - 1, psnr, psnr + 1]
    return {
        "name": name,
        "group": group,
        "solver": "DDIM",
        "psnr": by_clip and {"mean": psnr, "worst": psnr - 1},
        "ssim": {"mean": 0.9, "worst": 0.8},
        "latent_error": {"mean": 0.1, "worst": 0.2},
        "accuracy": dict.fromkeys(fidelity.SEMANTICS, accuracy),
        "mean_bits": bits,
        "mean_bits_computed": bits,
        "skip_share": skipped,
        "psnr_by_clip": by_clip or [None] * 3,
    }


def test_claims_follow_the_rows():
    rows = [
        make_row("bf16", "reference", None, 16.0),
        make_row("W4A8", "formats", 24.0, 8.0),
        make_row("DMPQ, 6 bits", "routing", 23.0),
        make_row("static sites, 6 bits", "routing", 23.5),
        make_row("DMPQ + TDC, naive (15 %, 6 bits)", "stacking", 20.0),
        make_row("DMPQ + TDC, PDR (15 %, 6 bits)", "stacking", 23.2, accuracy=0.99),
        make_row("DMPQ + TDC, PDR (30 %, 5 bits)", "stacking", 23.2, accuracy=0.9),
    ]
    found = {claim: (holds, evidence) for claim, holds, evidence in fidelity_report.claims(rows, None)}
    assert found["DMPQ at least as good as static allocations at 6 bits"][0] == "no"
    holds, evidence = found["PDR takes back what naive stacking loses (15 %, 6 bits)"]
    assert (holds, "80 %" in evidence) == ("yes", True)
    within = {c.partition(":")[0]: holds for c, (holds, _) in found.items() if "within 1 dB" in c}
    assert within == {"DMPQ + TDC, PDR (15 %, 6 bits)": "yes", "DMPQ + TDC, PDR (30 %, 5 bits)": "no"}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("DMPQ + TDC, naive, INT8 in the last steps (15 %, 6 bits)", "naive stacking"),
        ("W4A8 + TDC, naive, four over six (30 %, 5 bits)", "naive stacking"),
        ("W4A8 + TDC, 30 % skipped", "naive stacking"),
        ("W4A4 + TDC, PDR (30 %, 5 bits)", "purified, or routed otherwise"),
        ("DMPQ + TDC, INT8 after a skip (15 %, 6 bits)", "purified, or routed otherwise"),
        ("W4A8, PDR, every 2nd step skipped", "whole steps skipped"),
        ("W4A8, every 3rd step skipped", "whole steps skipped"),
    ],
)
def test_stacked_rows_are_told_apart_by_name(name, how):
    assert fidelity_report.stacked_how(name) == how
    assert how in fidelity_report.STACKED


def test_report_draws_every_figure(tmp_path):
    rows = [
        make_row("bf16", "reference", None, 16.0),
        make_row("bf16, 35 steps", "reference", 25.0, 11.2),
        make_row("W4A8", "formats", 24.0, 8.0),
        make_row("DMPQ, 6 bits", "routing", 23.0),
        make_row("TDC, 30 % skipped", "caching", 26.0, 11.2, 0.3),
        make_row("DMPQ + TDC, PDR (15 %, 6 bits)", "stacking", 23.2),
    ]
    rng = np.random.default_rng(0)
    rest = dict.fromkeys(("delta_change", "outlier", "delta_error", "cache_error"), np.zeros(()))
    measured = fidelity.measuring.Measured(volatility=rng.random((2, 5, 3)), error=rng.random((2, 5, 3, 4, 2)), **rest)
    fit = fidelity.Fit.of(measured)
    record = {
        "command": "python",
        "device": {"kind": "cpu"},
        "versions": {"jax": "0"},
        "settings": fidelity.setting(fidelity.Settings()),
        "calibration": {"DDIM": {"scatter": fit.scatter(), "correlation": fit.correlation.tolist()}},
        "rows": rows,
    }
    fidelity_report.write(tmp_path, record)
    names = {f"{name}_ddim.png" for name in ("stacking", "routing", "caching", "correlation")}
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", *names}
    assert all(f"({name})" in (tmp_path / "report.md").read_text() for name in names)
