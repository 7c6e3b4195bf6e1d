"""These tests need an NVIDIA GPU: `make test-gpu`. Elsewhere they are skipped.

After a run on a GPU the counts, with device and versions, go to benchmarks/results/test_gpu_<device>.json, or to the
file that the environment variable TEST_GPU_RESULT names.
"""

import collections
import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from pallas_kernels.common import device
from pallas_kernels.common.tuning import slug

HERE = Path(__file__).parent
outcomes: dict[str, str] = {}


def pytest_collection_modifyitems(items):
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"))
        if device.compute_capability() is None:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU; the default device is {device.kind()!r}"))


def pytest_runtest_logreport(report):
    if HERE.name in Path(report.fspath).parts and (report.when == "call" or report.outcome != "passed"):
        outcomes[report.nodeid.rpartition("/")[2]] = report.outcome


def pytest_sessionfinish():
    if device.compute_capability() is None or not outcomes:
        return
    default = HERE.parents[1] / "benchmarks" / "results" / f"test_gpu_{slug(device.kind())}.json"
    path = Path(os.environ.get("TEST_GPU_RESULT", default))
    record = {
        "device": {"kind": device.kind(), "compute_capability": device.compute_capability()},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        "command": "make test-gpu",
        "counts": dict(collections.Counter(outcomes.values())),
        "failed": sorted(name for name, outcome in outcomes.items() if outcome == "failed"),
        "skipped": sorted(name for name, outcome in outcomes.items() if outcome == "skipped"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
