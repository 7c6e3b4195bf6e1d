"""The full-size benchmarks run on a CPU, with the bundled model and tiny sizes."""

import json

import pytest

from benchmarks import attention, conversion, end_to_end

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_attention(tmp_path):
    rows = attention.main(["--tiny", "--implementations", "xla", "--calls", "1", "--out", str(tmp_path / "a.json")])
    assert len(rows) == 3
    assert all(0 < row.error < 1e-2 and row.ms > 0 for row in rows)
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["implementation"] == "xla"


def test_conversion(tmp_path):
    (row,) = conversion.main(["--models", "tiny", "--scratch", str(tmp_path), "--out", str(tmp_path / "c.json")])
    assert row.smaller > 1.5
    assert row.peak_gib < 2
    assert [p.name for p in tmp_path.iterdir()] in (["c.json", "c.md"], ["c.md", "c.json"])


def test_end_to_end(tmp_path):
    rows = end_to_end.main(["--models", "mini", "--steps", "5", "--out", str(tmp_path / "e.json")])
    assert [row.name.split(",")[0] for row in rows] == ["bf16", "INT8", "INT8", "INT8", "INT8"]
    assert [row.skip_share for row in rows] == [0, 0, 0, 0.2, 0.2]
    assert [row.mean_bits for row in rows] == [16, 8, 8, 6.4, 6.4]
    assert rows[0].weights_gib > 2 * rows[1].weights_gib
    assert "16.0" in (tmp_path / "e.md").read_text()
