"""The benchmark of torch's side, run by the environment that has torch; this one has none."""

import json
import subprocess
from pathlib import Path

import pytest

from sixbit_jax.config import TransformerConfig

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-parity" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-parity; `make parity` makes it")

COMPILED_CACHE = """
import dataclasses, json

from benchmarks import rivals

rival = dataclasses.replace(rivals.RIVALS["dbcache_compile"], cudnn=False)
print(json.dumps(dataclasses.asdict(rivals.measure("tiny", rival, "cpu", 1, "default"))))
"""

DESCRIBE = """
import json, sys
from types import SimpleNamespace

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from benchmarks import rivals

configs = {}
for name, config in rivals.CONFIGS.items():
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**config)
    configs[name] = dict(model.config)
    # What the pipeline itself would pass for a video of the native size; its VAE takes 8 x 8 pixels to one.
    given = rivals.inputs(model.config, "cpu")
    if given["image_rotary_emb"] is not None:
        pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
        height, width = model.config.sample_height * 8, model.config.sample_width * 8
        frames = given["hidden_states"].shape[1]
        wanted = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, height, width, frames, "cpu")
        assert all(map(torch.equal, given["image_rotary_emb"], wanted)), name
    configs[name]["shapes"] = [list(given[key].shape) for key in ("hidden_states", "encoder_hidden_states")]

named = dict(rivals.random_model(rivals.CONFIGS["tiny"], "cpu").named_parameters())
norms = [x for name, x in named.items() if x.ndim == 1 and "norm" in name and name.endswith("weight")]
assert len(norms) == 2 * 4 + 2 and all(0.9 < float(x.min()) and float(x.max()) < 1.1 for x in norms)
weights = [x for name, x in named.items() if "norm" not in name]
assert {x.dtype for x in weights} == {torch.bfloat16}
assert torch.get_default_dtype() == torch.float32
assert 0.019 < torch.cat([x.flatten() for x in weights]).float().std() < 0.021
assert rivals.stored_bytes(weights[0]) == 2 * weights[0].numel()
assert "jax" not in sys.modules
print(json.dumps(configs))
"""


def run(*arguments):
    done = subprocess.run([PYTHON, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_are_the_published_ones():
    configs = json.loads(run("-c", DESCRIBE).splitlines()[-1])
    for name, ours in (("2b", TransformerConfig.cogvideox_2b()), ("5b", TransformerConfig.cogvideox_5b())):
        latents, text = configs[name].pop("shapes")
        assert TransformerConfig.from_dict(configs[name]) == ours
        assert latents == [2, 13, 16, 60, 90]
        assert text == [2, 226, 4096]


def test_command(tmp_path):
    out = tmp_path / "new" / "rivals.json"
    printed = run("-m", "benchmarks.rivals", "--rows", "cudnn", "int8", "eager", "--calls", "2", "--out", out)
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert (row["model"], row["name"], row["calls"]) == ("tiny", "diffusers bf16, eager", 2)
    assert row["attention"] == "flash"
    assert row["step_ms"] > 0
    assert row["peak_gib"] is None
    assert record["device"] == {"kind": "cpu", "platform": "cpu"}
    assert {"torch", "diffusers"} <= set(record["versions"])
    assert "not measured: cuDNN attention needs CUDA" in printed
    assert len(record["not_measured"]) == 2
    table = out.with_suffix(".md").read_text()
    assert "| tiny | diffusers bf16, eager | flash |  |" in table
    assert all(f"{name}: not measured: {reason}" in table for name, reason in record["not_measured"].items())


def test_caches_leave_out_what_they_are_for(tmp_path):
    """Of every three steps one repeats another: all but the first of two blocks; and every second attention."""
    out = tmp_path / "rivals.json"
    run("-m", "benchmarks.rivals", "--rows", "first_block", "broadcast", "dbcache", "--calls", "2", "--out", out)
    record = json.loads(out.read_text())
    wanted = ["17% of the blocks", "50% of the attentions", "17% of the blocks"]
    assert [row["left_out"] for row in record["rows"]] == wanted
    assert "cache_dit" in record["versions"]
    assert all(row["step_ms"] > 0 for row in record["rows"])


@pytest.mark.slow
def test_compiled(tmp_path):
    out = tmp_path / "rivals.json"
    run("-m", "benchmarks.rivals", "--rows", "compile", "--calls", "1", "--out", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["name"] == "diffusers bf16, torch.compile"
    assert row["compile_s"] > 1
    assert row["attention"] == "flash"


@pytest.mark.slow
def test_compiled_with_a_cache():
    row = json.loads(run("-c", COMPILED_CACHE).splitlines()[-1])
    assert row["left_out"] == "17% of the blocks"
    assert row["compile_s"] > 1
    assert row["attention"] == "flash"
