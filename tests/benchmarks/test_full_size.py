"""The full-size benchmarks run on a CPU, with the bundled model and tiny sizes."""

import json

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from benchmarks import attention, blocks, conversion, end_to_end, start, weights
from pallas_kernels.common import device

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def lowering():
    """While JAX lowers, it puts descriptions of arrays in their place, which types of arrays forbid."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_attention(tmp_path):
    rows = attention.main(["--tiny", "--implementations", "xla", "--calls", "1", "--out", str(tmp_path / "a.json")])
    assert len(rows) == 3
    assert all(0 < row.error < 1e-2 and row.ms > 0 for row in rows)
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["implementation"] == "xla"


def test_the_bounded_row_is_of_the_bounded_kernel(monkeypatch):
    """On a Hopper GPU, whose place a program takes that says what it was asked for."""
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(
        attention.pallas_mosaic_gpu, "_attention", lambda q, k, v, *, bounded, **_: jnp.full_like(q, bounded)
    )
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 512, 3, 64), jnp.bfloat16)
    assert attention.bounded(q, k, v).all()
    assert not attention.attention(q, k, v, implementation="pallas_mosaic_gpu").any()


def test_benchmarked_logits_keep_to_their_bound():
    shape = (3, 100_000, 64)
    longest = jnp.linalg.norm(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16), axis=-1).max()
    assert longest**2 / 8 < attention.pallas_mosaic_gpu.LARGEST_LOGIT / 2


@pytest.mark.slow
def test_conversion(tmp_path):
    (row,) = conversion.main(["--models", "tiny", "--scratch", str(tmp_path), "--out", str(tmp_path / "c.json")])
    assert row.smaller > 1.5
    assert row.peak_gib < 2
    assert [p.name for p in tmp_path.iterdir()] in (["c.json", "c.md"], ["c.md", "c.json"])


@pytest.mark.slow
@pytest.mark.usefixtures("lowering")
def test_end_to_end(tmp_path):
    arguments = ["--models", "mini", "--steps", "5", "--shares", "0.4", "--block-shares", "0.2", "--bits", "6"]
    rows = end_to_end.main([*arguments, "--out", str(tmp_path / "e.json")])
    assert [row.name.split(",")[0] for row in rows] == ["bf16", "INT8", "INT8 and NVFP4", "INT8", "INT8"]
    assert [row.skip_share for row in rows] == [0, 0, 0, 0.4, 0.2]
    assert [row.mean_bits for row in rows] == [16, 8, 6, 4.8, 6.4]
    assert rows[3].peak_gib < rows[4].peak_gib
    assert rows[0].weights_gib > 2 * rows[1].weights_gib
    assert "16.0" in (tmp_path / "e.md").read_text()
    assert (tmp_path / "e.png").stat().st_size > 10_000


@pytest.mark.slow
# What reads profiles is made with a tool that Python warns of, and cannot bear its warning to be an error.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
@pytest.mark.usefixtures("lowering")
def test_blocks(tmp_path):
    """Every part of a block is seen in both ways to run it."""
    rows = blocks.main(["--layers", "2", "--steps", "4", "--out", str(tmp_path / "b.json")])
    parts = {name: {row.part for row in rows if row.configuration == name} for name in ("bf16", "INT8")}
    shared = {"attention", "norm_rotary", "modulation", "attn_in", "attn_out", "ff_in", "ff_out"}
    assert parts["bf16"] >= shared | {"norm"}
    assert parts["INT8"] >= shared | {"quantize", "cast", "cache", "reuse"}
    assert all(row.ms > 0 for row in rows)
    assert "a computed block" in (tmp_path / "b.md").read_text()


@pytest.mark.slow
def test_start(tmp_path):
    """Two processes, the second of which finds what the first compiled."""
    first, second = start.main(["--models", "mini", "--out", str(tmp_path / "s.json")])
    assert (first.cached, second.cached) == (False, True)
    for row in (first, second):
        assert 0 < row.imports_s < row.first_step_s
        assert row.weights_s + row.lowering_s + row.compile_s < row.first_step_s
    assert second.compile_s < first.compile_s


@pytest.mark.slow
def test_weights(tmp_path):
    """With few steps too, weights that are rounded for their inputs are nearer."""
    rows = {row.name: row for row in weights.main(["--clips", "8", "--steps", "8", "--out", str(tmp_path / "w.json")])}
    assert 0 < rows["text encoder in float32"].features < 0.02 < rows["text encoder in NVFP4"].features < 0.5
    assert rows["W4A16"].features == 0
    for name in ("W4A16", "W4A8"):
        better = rows[f"{name}, rounded for its inputs"]
        assert better.gain > 1
        assert better.psnr - rows[name].psnr == pytest.approx(better.gain, abs=0.02)
