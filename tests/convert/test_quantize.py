"""Conversion to NVFP4: the bytes of quantising the loaded model, one layer at a time, and taken up after a kill."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import published_folder
import pytest
from flax import nnx
from published_folder import sparse_transformer
from typer.testing import CliRunner

from convert import command, convert, quantize, store
from convert.__main__ import app
from convert.engine import dotted
from convert.errors import CheckpointError
from convert.store import read_manifest
from sixbit_jax import Pipeline, checkpoint, moments
from sixbit_jax.config import TransformerConfig
from sixbit_jax.errors import ArgumentError
from sixbit_jax.qtensor import TEXT_ENCODER_RULES, QuantLinear, quantize_model

LARGE = TransformerConfig(num_attention_heads=16, num_layers=8, text_embed_dim=64)
ALL = {"transformer": "nvfp4", "text_encoder": "nvfp4"}


CONFIGS = {
    "transformer": dataclasses.replace(published_folder.TRANSFORMER, time_embed_dim=32, text_embed_dim=32),
    "text_encoder": dataclasses.replace(published_folder.T5, d_model=32, d_kv=16, d_ff=64),
    "vae": published_folder.VAE,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder whose sizes blocks of 32 divide."""
    folder = tmp_path_factory.mktemp("published") / "model"
    rest = {"tokenizer": published_folder.build_tokenizer(), "scheduler": published_folder.SCHEDULER}
    return checkpoint.write_diffusers(folder, **published_folder.modules(**CONFIGS), **rest)


def converted_transformer(published, tmp_path):
    options = {"components": ["transformer"], "quantize": {"transformer": "nvfp4"}, "hadamard": 32, "progress": False}
    return convert(published, tmp_path / "out", **options)


@pytest.mark.parametrize("four_over_six", [False, True])
def test_same_bytes_as_quantising_the_loaded_model(published, tmp_path, four_over_six):
    options = {"hadamard": 32, "four_over_six": four_over_six}
    out = convert(published, tmp_path / "out", quantize=ALL, progress=False, **options)
    found, wanted = checkpoint.load(out, dtype=jnp.float32), checkpoint.load(published, dtype=jnp.float32)
    quantize_model(wanted.transformer, **options)
    quantize_model(wanted.text_encoder, TEXT_ENCODER_RULES, **options)
    for name in ("transformer", "text_encoder", "vae"):
        states = [nnx.split(getattr(loaded, name)) for loaded in (found, wanted)]
        assert states[0][0] == states[1][0]
        jax.tree.map(np.testing.assert_array_equal, *(state for _, state in states))
    assert isinstance(found.transformer.blocks.ff_in, QuantLinear)


def test_bytes_at_rest(published, tmp_path):
    out = converted_transformer(published, tmp_path)
    entry = read_manifest(out)["components"]["transformer"]
    arrays = entry["arrays"]
    assert "blocks.ff_in.kernel" not in arrays
    codes, scales = (arrays[f"blocks.ff_in.{name}"] for name in ("codes", "scales"))
    assert (codes["dtype"], codes["shape"]) == ("uint8", [3, 128, 16])
    assert (scales["dtype"], scales["shape"]) == ("uint8", [3, 128, 2])
    assert arrays["blocks.ff_in.tensor_scale"] == {"shape": [3], "dtype": "float32", "item": codes["item"]}
    assert "blocks.norm1.linear" in entry["quantized"]["linears"]
    assert entry["bytes"] == sum(np.dtype(a["dtype"]).itemsize * int(np.prod(a["shape"])) for a in arrays.values())
    seen = []
    checkpoint.load(out, components=["transformer"], progress=lambda *done_of: seen.append(done_of))
    assert seen[-1] == (entry["bytes"], entry["bytes"])


def test_rounded_for_what_prompts_show(published, tmp_path):
    """The bytes of quantising the loaded model with the moments of the same prompts."""
    prompts, steps = ["a red 3 moves left fast", "a blue 7 moves up slowly"], 3
    out = convert(
        published,
        tmp_path / "out",
        dtype="bfloat16",
        quantize={"transformer": "nvfp4"},
        prompts=prompts,
        num_inference_steps=steps,
        progress=False,
    )
    pipe = Pipeline.from_pretrained(published)
    seen = moments.gather(pipe, prompts, num_inference_steps=steps)
    rounded = pipe.quantized(moments=seen)
    wanted = rounded.transformer.merge()
    with pytest.raises(ArgumentError, match="quantised already, with a hadamard, four_over_six and moments"):
        rounded.quantized(moments=seen)
    found = checkpoint.load(out, dtype=jnp.bfloat16, components=["transformer"]).transformer
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(wanted))
    nearest = quantize_model(Pipeline.from_pretrained(published).transformer.merge())
    assert (found.blocks.ff_in.codes[...] != nearest.blocks.ff_in.codes[...]).any()
    entry = read_manifest(out)["components"]["transformer"]["quantized"]
    assert (entry["prompts"], entry["num_inference_steps"]) == (prompts, steps)


def test_what_is_there_needs_no_prompts_run_again(published, tmp_path, monkeypatch):
    """A process that is killed past the transformer leaves what another need not sample for."""
    arguments = {"quantize": {"transformer": "nvfp4"}, "prompts": ["up"], "num_inference_steps": 1, "progress": False}
    runs = []
    monkeypatch.setattr(command, "gather", lambda *a, **k: runs.append(a) or moments.gather(*a, **k))

    def killed(*arguments, **options):
        left.append(shutil.copytree(*(tmp_path.glob(".out.*.partial")), tmp_path / "left"))
        raise OSError("killed")

    left: list = []
    with monkeypatch.context() as dying:
        dying.setattr(command, "write_manifest", killed)
        with pytest.raises(OSError, match="killed"):
            convert(published, tmp_path / "out", **arguments)
    assert len(runs) == 1
    beside = []

    def space(destination, needed, work):
        beside.append(store._beside(destination, work))
        shutil.copytree(left[0], beside[0])
        # All that is needed is there.
        free = shutil.disk_usage(tmp_path)._replace(free=command.DISK_MARGIN * 2)
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda path: free)
            store.check_space(destination, needed, work)
            with pytest.raises(CheckpointError, match=r"needs .* GB of disk more, beside 0\.0. GB in .*partial"):
                store.check_space(destination, 2 * needed, work)

    monkeypatch.setattr(command, "check_space", space)
    out = convert(published, tmp_path / "out", **arguments)
    assert len(runs) == 1
    assert checkpoint.load(out, components=["transformer"]).transformer is not None


def test_what_cannot_be_quantised(tmp_path):
    no_scheduler = checkpoint.write_diffusers(tmp_path / "model", **published_folder.modules(**CONFIGS))
    for options, message in (
        ({"quantize": {"vae": "nvfp4"}}, "vae can't be quantised; transformer, text_encoder can"),
        ({"quantize": {"transformer": "int4"}}, "transformer='int4'; the format is 'nvfp4'"),
        ({"quantize": {"transformer": "nvfp4"}, "components": ["vae"]}, "what is converted: vae"),
        ({"quantize": {"transformer": "nvfp4"}, "hadamard": 128}, "hadamard=128 does not divide"),
        ({"prompts": ["a"]}, "prompts: are to round the transformer's weights"),
        ({"prompts": ["a"], "quantize": {"transformer": "nvfp4"}, "four_over_six": True}, "not with four_over_six"),
        ({"prompts": ["a"], "quantize": {"transformer": "nvfp4"}}, "a pipeline needs a transformer and a scheduler"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(no_scheduler, tmp_path / "out", progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "int4"}, "quantised to 'int4'"), ({"linears": ["blocks.absent"]}, "there is no linear blocks.absent")],
)
def test_a_manifest_that_does_not_fit(published, tmp_path, change, message):
    out = converted_transformer(published, tmp_path)
    manifest = read_manifest(out)
    manifest["components"]["transformer"]["quantized"] |= change
    store.write_manifest(out, **{k: v for k, v in manifest.items() if k not in ("format", "version", "written_by")})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(out)


def test_a_killed_conversion_is_taken_up(tmp_path, monkeypatch):
    sparse_transformer(tmp_path / "model", LARGE)
    arguments = [
        sys.executable,
        "-m",
        "convert",
        tmp_path / "model",
        tmp_path / "out",
        "--quiet",
        "--quantize",
        "nvfp4",
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 120
    while not (done := [p for p in tmp_path.glob(".out.*.partial/transformer/*") if p.name.isdigit()]):
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_ino for p in done}

    built = []
    monkeypatch.setattr(command, "build_arrays", lambda t, **k: built.append(t.path) or quantize.build_arrays(t, **k))
    out = convert(tmp_path / "model", tmp_path / "out", quantize={"transformer": "nvfp4"}, progress=False)
    arrays = read_manifest(out)["components"]["transformer"]["arrays"]
    for name, inode in before.items():
        assert (out / "transformer" / name).stat().st_ino == inode
    kept = {path for path, entry in arrays.items() if entry["item"] in before}
    assert kept
    assert not {path for path in built if path in kept or f"{path}.codes" in kept}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    state = nnx.state(checkpoint.load(out, components=["transformer"]).transformer)
    assert {leaf.dtype.name for leaf in dotted(state).values()} == {"bfloat16", "uint8", "float32"}


def test_two_conversions_of_one_folder(published, tmp_path, monkeypatch):
    def second(*args):
        convert(published, tmp_path / "out", progress=False)

    monkeypatch.setattr(command, "write_model", second)
    with pytest.raises(CheckpointError, match="is being written by another process"):
        convert(published, tmp_path / "out", progress=False)


def test_command(published, tmp_path):
    arguments = [str(published), str(tmp_path / "out"), "--quantize", "nvfp4", "--components", "transformer"]
    failed = CliRunner().invoke(app, [*arguments, "--steps", "3"])
    assert failed.exit_code == 2
    assert "goes with --prompts" in failed.output
    failed = CliRunner().invoke(app, [*arguments, "--quantize-text-encoder", "nvfp4"])
    assert failed.exit_code == 2
    assert "text_encoder='nvfp4'" in failed.output
