"""Bounds on errors against the references, collected into one table at the end of a run.

With SIXBIT_PARITY_REPORT set, the table is written to that file too, as Markdown.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np
import pytest

COLUMNS = ("float32", "bound", "bfloat16", "float16")
PROPERTY = "parity"


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> "Parity":
    return Parity(record_property)


class Parity:
    """Asserts a bound on an error, and records the error for the table under the name of a case."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def exact(self, case: str, found: np.ndarray, wanted: np.ndarray, bound: float) -> None:
        """float32: the relative L2 error is at most `bound`."""
        error = common.relative_l2(found, wanted)
        self._record(PROPERTY, {"case": case, "float32": error, "bound": bound})
        assert error <= bound, case

    def half(self, case: str, found: np.ndarray, wanted: np.ndarray, theirs: float, dtype: str = "bfloat16") -> None:
        """16 bits: the error against the float32 reference is at most twice `theirs`, that of the original."""
        ratio = common.relative_l2(found, wanted) / float(theirs)
        self._record(PROPERTY, {"case": case, dtype: ratio})
        assert ratio <= 2, case


def recorded(terminalreporter) -> Iterator[dict[str, object]]:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                yield from (value for name, value in report.user_properties if name == PROPERTY)


def table(records: Iterator[dict[str, object]]) -> list[str]:
    """Markdown lines, one case each, the largest of every figure."""
    rows: dict[str, dict[str, float]] = {}
    for record in records:
        row = rows.setdefault(record["case"], {})
        for column in COLUMNS:
            if column in record:
                row[column] = max(record[column], row.get(column, 0))
    if not rows:
        return []
    form = {"float32": "{:.1e}", "bound": "{:.0e}", "bfloat16": "{:.2f}", "float16": "{:.2f}"}
    cells = [
        (case, *(form[column].format(row[column]) if column in row else "" for column in COLUMNS))
        for case, row in sorted(rows.items())
    ]
    head = ("case", "float32 error", "at most", "bfloat16 error ÷ theirs", "float16 error ÷ theirs")
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in [head, *cells]]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def pytest_terminal_summary(terminalreporter) -> None:
    lines = table(recorded(terminalreporter))
    if not lines:
        return
    terminalreporter.section("parity")
    for line in lines:
        terminalreporter.line(line)
    if path := os.environ.get("SIXBIT_PARITY_REPORT"):
        Path(path).write_text("\n".join([*introduction(), "", *lines, ""]), encoding="utf-8")


def introduction() -> list[str]:
    theirs = json.loads((common.REFERENCES / "versions.json").read_text())
    ours = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    listed = [", ".join(f"{name} {version}" for name, version in side.items()) for side in (theirs, ours)]
    return [
        "# Parity with diffusers and transformers",
        "",
        "`float32 error`: relative L2 distance to the original's output in float32, and the bound that the test sets.",
        "`bfloat16 error ÷ theirs`: our error in bfloat16 divided by the original's own in bfloat16, both against the",
        "original in float32; at most 2. Of several tensors or steps under one name, the largest.",
        "",
        f"Original: {listed[0]}, CPU. Ours: {listed[1]}, Python {platform.python_version()}, {platform.machine()} CPU.",
        "Made by `SIXBIT_PARITY_REPORT=benchmarks/parity.md make parity`.",
    ]
