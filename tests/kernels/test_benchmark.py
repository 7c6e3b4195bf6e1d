"""The accuracy benchmark runs, small, and its committed result is of the present code."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import formats
from pallas_kernels.common import reference as codecs
from pallas_kernels.rotate_quantize import reference


@pytest.mark.slow
def test_runs_and_says_the_same_twice(tmp_path):
    arguments = ["--rows", "4", "--size", "128", "--out-channels", "8", "--out", str(tmp_path / "formats.json")]
    formats.main(arguments)
    first = (tmp_path / "formats.json").read_text()
    formats.main(arguments)
    assert (tmp_path / "formats.json").read_text() == first
    assert len(json.loads(first)["rows"]) == 4 * 2 * 4
    assert (tmp_path / "formats.md").read_text().count("\n| normal | ") == 8


def test_committed_figures_are_what_the_code_gives():
    """A smaller draw of the same data: within 5 % of the committed errors of x on normal data."""
    committed = json.loads((Path(formats.__file__).parent / "results" / "formats.json").read_text())["rows"]
    wanted = {r["activation"]: r["x_error"] for r in committed if (r["data"], r["hadamard"]) == ("normal", 0)}
    x, _ = formats.draw(32, 3072, 1)["normal"]
    assert wanted.keys() == formats.ACTIVATIONS.keys()
    for name, options in formats.ACTIVATIONS.items():
        array, _ = reference.rotate_quantize(x, hadamard=0, **options)
        np.testing.assert_allclose(formats.relative_error(codecs.dequantize(array), x), wanted[name], rtol=0.05)
