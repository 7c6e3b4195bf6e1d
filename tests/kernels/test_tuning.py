"""Tuned configurations: how they are found, made and read; the timer; the workloads."""

import dataclasses
import functools
import json
import shlex

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tune, workloads
from pallas_kernels.common import device, timer, tuning
from pallas_kernels.nvfp4_cast import pallas_triton

TINY = list(workloads.everything(tiny=True))
CASTS = [w for w in TINY if w.operation == "nvfp4_cast"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("quick_compilation"),
]


def test_names():
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert (
        tuning.case_key(n=3072, k=512, to="int8") == tuning.case_key(to="int8", k=512, n=3072) == "k=512 n=3072 to=int8"
    )


def write(tmp_path, monkeypatch, configurations):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "cpu.json").write_text(json.dumps({"configurations": configurations}))
    monkeypatch.setattr(tuning.importlib.resources, "files", lambda package: tmp_path)
    tuning._configurations.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    tuning._configurations.cache_clear()


def test_a_tuned_configuration_is_taken_and_the_heuristic_else(tmp_path, monkeypatch):
    tuned = {"rows": 2, "columns": 256, "num_warps": 8}
    write(tmp_path, monkeypatch, {"nvfp4_cast/pallas_triton": {"k=512 n=64 to=int8": {"config": tuned, "ms": 1.0}}})
    find = functools.partial(tuning.configured, "nvfp4_cast/pallas_triton", pallas_triton.heuristic, to="int8", n=64)
    assert find(k=512) == pallas_triton.Config(**tuned)
    assert find(k=1024) == pallas_triton.heuristic(to="int8", n=64, k=1024)
    assert tuning.configuration("another", "k=512 n=64 to=int8") is None


def test_a_device_without_a_file_takes_heuristics():
    assert tuning.configuration("nvfp4_cast/pallas_triton", "k=512 n=64 to=int8") is None


def test_every_committed_file_holds_configurations_of_its_kernels():
    for file in tune.FOLDER.glob("*.json"):
        record = json.loads(file.read_text())
        assert tuning.slug(record["device"]["kind"]) == file.stem
        for operation, cases in record["configurations"].items():
            name, implementation = operation.split("/")
            workload = next(w for w in TINY if w.operation == name)
            config = workload.module(implementation).Config
            for found in cases.values():
                assert found["ms"] > 0
                config(**found["config"])


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = tmp_path / "a new folder" / "tuned.json"
    arguments = ["--tiny", "--operations", "nvfp4_cast", "--most", "1", "--run-ms", "0.1", "--out", str(out)]
    tune.main(arguments)
    record = json.loads(out.read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert shlex.split(record["command"]) == ["python", "-m", "pallas_kernels.tune", *arguments]
    cases = record["configurations"]["nvfp4_cast/pallas_triton"]
    assert cases.keys() == {tuning.case_key(**w.case("pallas_triton")) for w in CASTS}
    for case in cases.values():
        pallas_triton.Config(**case["config"])
        assert case["ms"] > 0
        assert case["wrong"] == case["failed"] == []
    # Cases that are not tuned again stay.
    tune.main([*arguments, "--only", "nothing has this name"])
    assert json.loads(out.read_text())["configurations"]["nvfp4_cast/pallas_triton"] == cases
    assert capsys.readouterr().out.count(" ms {") == 4


@pytest.mark.slow
def test_a_wrong_candidate_does_not_count(monkeypatch):
    """Whatever its time: a kernel that forgets the block scales."""
    right = pallas_triton.cast

    def wrong(array, *, to, config):
        if config.rows == 1:
            array = dataclasses.replace(array, scales=jnp.full_like(array.scales, 0x38))
        return right(array, to=to, config=config)

    configs = [pallas_triton.Config(rows=rows, columns=128, num_warps=4) for rows in (1, 4)]
    monkeypatch.setattr(pallas_triton, "cast", wrong)
    monkeypatch.setattr(pallas_triton, "heuristic", lambda *, to, n, k: configs[0])
    monkeypatch.setattr(pallas_triton, "candidates", lambda *, to, n, k: configs)
    with device.interpret(), tune.concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = tune.tune(CASTS[0], "pallas_triton", pool=pool, run_ms=0.1, most=2)
        assert found["config"]["rows"] == 4
        assert found["wrong"] == [str(configs[0])]
        with pytest.raises(RuntimeError, match=r"wrong \['Config\(rows=1"):
            tune.tune(CASTS[0], "pallas_triton", pool=pool, run_ms=0.1, most=1)


def test_the_timer_computes_every_call():
    """The work stays in the loop, and the results are those of the function."""
    sets = [(jnp.full((32, 32), float(i)), jnp.ones((32, 32))) for i in range(3)]
    program = timer.compile(lambda a, b: a @ b, sets, estimate_ms=0.1, run_ms=1)
    assert program.calls == 12
    for i, result in enumerate(program.run(sets)):
        assert (result == 32 * i).all()
    timing = timer.measure(program, sets, runs=3)
    assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
    assert timing.calls == 12
    assert timing.spread >= 0


@pytest.mark.parametrize("workload", TINY, ids=lambda w: f"{w.operation}, {w.name}, {w.target}")
def test_workloads_make_sound_operands(workload):
    """Which XLA runs; the names of its cases are those that a kernel's heuristic takes."""
    operands = workload.make(jax.random.key(0))
    result = jax.eval_shape(workload.function("xla"), *operands)
    assert jax.tree.leaves(result)
    for implementation in workloads.implementations(workload.operation):
        if implementation != "xla" and hasattr(workload.module(implementation), "heuristic"):
            workload.module(implementation).heuristic(**workload.case(implementation))


def test_every_full_shape_has_a_case():
    for workload in workloads.everything():
        for implementation in workloads.implementations(workload.operation):
            module = workload.module(implementation)
            if hasattr(module, "candidates"):
                assert module.candidates(**workload.case(implementation))


def test_the_relative_error_is_of_dequantised_values():
    weight = workloads.packed(jax.random.key(0), 8, 64)
    doubled = dataclasses.replace(weight, tensor_scale=2 * weight.tensor_scale)
    assert float(workloads.relative_error(doubled, weight)) == pytest.approx(1)
    assert float(workloads.relative_error((weight, jnp.ones(3)), (weight, jnp.ones(3)))) == 0
    assert not float(workloads.relative_error(jnp.full(3, jnp.nan), jnp.ones(3))) <= 1
