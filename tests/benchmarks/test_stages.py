"""The stage benchmark runs on a CPU, with the bundled model and with random weights of tiny configurations."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from published_folder import T5, TRANSFORMER, VAE

from benchmarks import stages
from pallas_kernels.attention.pallas_mosaic_gpu import LARGEST_LOGIT
from pallas_kernels.norm_rotary import logit_bound
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.t5 import T5EncoderModel

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = dataclasses.replace(TRANSFORMER, temporal_compression_ratio=2, sample_frames=5)


def check(row, frames, height, width, steps):
    assert (row.frames, row.height, row.width, row.steps) == (frames, height, width, steps)
    times = (row.text_encoder_s, row.step_ms, row.sampling_s, row.vae_s, row.compilation_s)
    assert all(math.isfinite(x) and x > 0 for x in times)
    # Both are rounded, to 10 microseconds a step and to a millisecond.
    assert row.sampling_s == pytest.approx(50 * row.step_ms / 1000, abs=0.002)


@pytest.mark.slow
def test_random_weights():
    model = stages.random_model(T5EncoderModel, T5)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    kernel = model.params["blocks"]["ff_in"]["kernel"][...].astype(jnp.float32)
    assert 0.01 < float(kernel.std()) < 0.03
    assert len({layer.tobytes() for layer in jax.device_get(kernel)}) == T5.num_layers
    check(stages.measure("tiny", stages.random_pipeline(TINY, VAE, T5), 2), 5, 16, 16, 2)


def test_random_norms_keep_logits_small():
    """So that attention takes the kernel that a trained model's norms are assumed to choose."""
    config = dataclasses.replace(TRANSFORMER, attention_head_dim=64)
    blocks = stages.random_model(CogVideoXTransformer3DModel, config).params["blocks"]
    (q_scale, q_bias), (k_scale, k_bias) = (
        (blocks[name]["scale"][...], blocks[name]["bias"][...]) for name in ("norm_q", "norm_k")
    )
    bounds = [float(logit_bound((q_scale[i], q_bias[i]), (k_scale[i], k_bias[i]))) for i in range(config.num_layers)]
    assert all(8 < bound < LARGEST_LOGIT / 2 for bound in bounds)


@pytest.mark.slow
def test_command(tmp_path, capsys):
    rows = stages.main(["--models", "mini", "--steps", "1", "--out", str(tmp_path / "new" / "stages.json")])
    check(rows[0], 17, 64, 64, 1)
    record = json.loads((tmp_path / "new" / "stages.json").read_text())
    assert record["rows"] == [dataclasses.asdict(rows[0])]
    assert record["versions"]["jax"] == jax.__version__
    assert record["command"].startswith("python -m benchmarks.stages --models mini --steps 1 --out ")
    text = (tmp_path / "new" / "stages.md").read_text()
    assert text == capsys.readouterr().out
    assert "| mini | 17 x 64 x 64 |" in text
    assert " s (from 1) |" in text


def test_every_model_has_its_own_number_of_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "MODELS", {"mini": (lambda: "model", 50), "5b": (lambda: "large", 10)})
    monkeypatch.setattr(stages, "measure", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(stages, "table", lambda rows: "")
    stages.main(["--models", "mini", "5b"])
    stages.main(["--models", "5b", "--steps", "3"])
    assert asked == [("mini", "model", 50), ("5b", "large", 10), ("5b", "large", 3)]
