"""The benchmark of the kernels runs, tiny, on a CPU."""

import json
import math

import jax
import pytest

from benchmarks import kernels
from pallas_kernels import workloads

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("quick_compilation"),
]


def test_command(tmp_path, capsys):
    out = tmp_path / "new" / "kernels.json"
    arguments = ["--tiny", "--run-ms", "0.1", "--out", str(out)]
    operations = ["nvfp4_cast", "plain matmul", "scaled_matmul", "whole linear"]
    kernels.main([*arguments, "--operations", *operations, "--only", "odd rows", "int8"])
    record = json.loads(out.read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["command"].startswith("python -m benchmarks.kernels --tiny --run-ms 0.1 --out ")
    rows = record["rows"]
    assert {row["operation"] for row in rows} == {"copy", "nvfp4_cast"}
    assert {row["implementation"] for row in rows[1:]} == set(workloads.implementations("nvfp4_cast"))
    for row in rows:
        assert math.isfinite(row["ms"])
        assert row["ms"] > 0
        assert (row["error"] is None) == (row["implementation"] in ("xla", "XLA"))
        assert row["error"] is None or row["error"] < 0.01
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.endswith(text)
    assert text.count("| odd rows 7x384 |") == len(rows) - 1


@pytest.mark.slow
def test_whole_linears_are_compared_with_the_bfloat16_layer(tmp_path):
    out = tmp_path / "kernels.json"
    kernels.main(["--tiny", "--run-ms", "0.1", "--out", str(out), "--operations", "whole linear", "plain matmul"])
    rows = [row for row in json.loads(out.read_text())["rows"] if row["operation"] == "whole linear"]
    assert [row["target"] for row in rows] == list(kernels.LINEARS)
    assert rows[0]["times_xla_bfloat16"] == 1
    assert all(row["temporary_bytes"] is not None for row in rows)
    # What quantising the activation costs: INT8 about 1 %, NVFP4 about 10 %.
    errors = [row["error"] for row in rows]
    assert errors[0] is None
    assert 0.002 < errors[1] < 0.02 < errors[2] < 0.15
    assert 0.02 < errors[3] < 0.15


def test_every_group_of_the_full_benchmark_has_a_ceiling_and_a_rival():
    """Without running it."""
    jobs = [job for group in kernels.groups(tiny=False) for job in group.jobs]
    plain = {(job.shape, job.target) for job in jobs if job.operation == "plain matmul"}
    for job in jobs:
        assert job.limit == "copy" or any(target == job.limit for _, target in plain)
        if job.operation in ("scaled_matmul", "weight_only_matmul"):
            assert (job.shape, "bfloat16") in plain
    assert {job.operation for job in jobs} == {"copy", "plain matmul", "whole linear", *workloads.FUNCTIONS}
