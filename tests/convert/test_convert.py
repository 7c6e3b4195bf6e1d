import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors
from flax import nnx
from published_folder import edit_json, edit_tensors, sparse_transformer, write, write_text_encoder
from typer.testing import CliRunner

from convert import command, convert, store
from convert.__main__ import app
from convert.errors import CheckpointError, ConversionError
from convert.store import read_manifest
from sixbit_jax import checkpoint
from sixbit_jax.config import TransformerConfig
from sixbit_jax.precision.calibration import FILE_NAME

LARGE = TransformerConfig(num_attention_heads=16, num_layers=8, text_embed_dim=64)
"""306 MB in bfloat16, of which the largest parameters have 67 MB each."""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def test_layout_on_disk(published, tmp_path):
    out = convert(published, tmp_path / "out", progress=False)
    assert sorted(p.name for p in out.iterdir()) == ["sixbit.json", "text_encoder", "tokenizer", "transformer", "vae"]
    assert [p.name for p in (out / "transformer").iterdir()] == ["000"]
    manifest = read_manifest(out)
    entry = manifest["components"]["transformer"]
    assert entry["arrays"]["blocks.attn_in.kernel"] == {"shape": [3, 32, 96], "dtype": "float32", "item": "000"}
    assert entry["bytes"] == 4 * entry["parameters"] == sum(4 * np.prod(a["shape"]) for a in entry["arrays"].values())
    assert entry["config"]["_class_name"] == "CogVideoXTransformer3DModel"
    assert manifest["source"] == str(published)
    assert manifest["scheduler"]["_class_name"] == "CogVideoXDDIMScheduler"
    for name in manifest["tokenizer"]:
        assert (out / "tokenizer" / name).read_bytes() == (published / "tokenizer" / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parameters_are_packed_into_items_and_never_split(published, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ITEM_BYTES", 10_000)
    out = convert(published, tmp_path / "out", components=["transformer"], progress=False)
    arrays = read_manifest(out)["components"]["transformer"]["arrays"]
    sizes: dict[str, list[int]] = {}
    for entry in arrays.values():
        sizes.setdefault(entry["item"], []).append(4 * int(np.prod(entry["shape"])))
    assert len(sizes) > 4
    assert max(len(held) for held in sizes.values()) > 1
    assert all(sum(held) <= 10_000 or len(held) == 1 for held in sizes.values())
    assert sorted(p.name for p in (out / "transformer").iterdir()) == sorted(sizes)


def test_subset_of_components(published, tmp_path):
    out = convert(published, tmp_path / "out", components=["vae", "scheduler"], progress=False)
    manifest = read_manifest(out)
    assert list(manifest["components"]) == ["vae"]
    assert manifest["tokenizer"] is None
    assert manifest["scheduler"] is not None


def test_absent_components_are_no_error_unless_asked_for(copy, tmp_path):
    shutil.rmtree(copy / "text_encoder")
    edit_json(copy / "model_index.json", vae=[None, None])
    out = convert(copy, tmp_path / "out", progress=False)
    assert list(read_manifest(out)["components"]) == ["transformer"]
    with pytest.raises(CheckpointError, match="has no vae, text_encoder; of what was asked for it has transformer"):
        convert(copy, tmp_path / "two", components=["vae", "text_encoder", "transformer"], progress=False)


def test_problems_of_all_components_come_in_one_error(copy, tmp_path):
    for name in ("transformer", "vae"):
        file = copy / name / "diffusion_pytorch_model.safetensors"
        edit_tensors(file, lambda held: held.update(extra=np.zeros(2, np.float32)))
    with pytest.raises(ConversionError) as caught:
        convert(copy, tmp_path / "out", progress=False)
    assert [(p.mark, p.where.split("/")[0], p.key) for p in caught.value.problems] == [
        ("+", "transformer", "extra"),
        ("+", "vae", "extra"),
    ]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "pipeline class 'FluxPipeline' is not supported"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae of class 'AutoencoderKL' is not supported"),
        ("transformer/config.json", {"_class_name": "WanTransformer3DModel"}, "class WanTransformer3DModel is not"),
        ("transformer/config.json", {"activation_fn": "relu"}, "activation_fn='relu' is not supported"),
        ("vae/config.json", {"norm_num_groups": 5}, "AutoencoderKLCogVideoX cannot be built: .*norm_num_groups=5"),
        ("vae/config.json", {"surprise": 1}, "unknown field.* surprise=1"),
        ("text_encoder/config.json", {"model_type": "umt5"}, "model_type 'umt5' is not supported"),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModel"]}, "class CLIPTextModel is not supported"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "'PNDMScheduler' is not supported"),
    ],
)
def test_unknown_classes_and_configurations(copy, tmp_path, file, changes, message):
    edit_json(copy / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(copy, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_bad_json(copy, tmp_path, file):
    (copy / file).write_text("{]")
    with pytest.raises(CheckpointError, match=f"{file}: not a readable JSON file"):
        convert(copy, tmp_path / "out", progress=False)


def test_wrong_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for source, message in (
        (tmp_path / "empty", "neither model_index.json nor transformer/config.json"),
        (tmp_path / "file", "is a file, where a checkpoint folder is needed"),
        (tmp_path / "absent", "no such folder, and not a hub id"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "out", progress=False)


def test_hub_ids_are_downloaded_without_what_is_not_needed(published, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, *, allow_patterns):
        asked[repo_id] = allow_patterns
        return str(published)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("some/model", tmp_path / "out", components=["vae", "scheduler"], progress=False)
    assert asked["some/model"] == [
        "model_index.json",
        store.MANIFEST,
        FILE_NAME,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model-*-of-*.safetensors",
        "vae/[0-9]*/*",
        "scheduler/*",
    ]

    def unreachable(repo_id, *, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"some/model: no such local folder, and the hub .*: no net"):
        convert("some/model", tmp_path / "other", progress=False)


def downloading(held, cache):
    """A `snapshot_download` of the folder `held`, which copies what is asked for."""

    def download(repo_id, *, allow_patterns):
        names = [str(path.relative_to(held)) for path in held.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(held / name, cache / name)
        return str(cache)

    return download


@pytest.mark.parametrize("kind", ["diffusers", "sixbit"])
def test_a_model_on_the_hub_is_described_without_its_tensors(published, tmp_path, monkeypatch, kind):
    held = published if kind == "diffusers" else convert(published, tmp_path / "ours", progress=False)
    asked = []

    def header(repo_id, filename):
        asked.append(filename)
        with safetensors.safe_open(held / filename, framework="numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        about = {k: {"dtype": s.get_dtype(), "shape": s.get_shape(), "data_offsets": (0, 0)} for k, s in slices.items()}
        tensors = {key: huggingface_hub.utils.TensorInfo(**values) for key, values in about.items()}
        return huggingface_hub.utils.SafetensorsFileMetadata(metadata={}, tensors=tensors)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloading(held, tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", header)
    found, wanted = checkpoint.describe("some/model"), checkpoint.describe(held)
    assert found | {"path": wanted["path"]} == wanted
    weights = {str(path.relative_to(held)) for path in held.glob("*/*.safetensors")}
    assert set(asked) == weights
    assert found["kind"] == kind
    assert not [*(tmp_path / "cache").glob("*/*.safetensors"), *(tmp_path / "cache").glob("*/[0-9]*")]
    if kind == "sixbit":
        return

    errors = huggingface_hub.errors
    for kind in (errors.SafetensorsParsingError, errors.HfHubHTTPError.__bases__[0], ConnectionError):

        def refused(repo_id, filename, kind=kind):
            raise kind("no header")

        monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", refused)
        with pytest.raises(CheckpointError, match=r"some/model: the hub did not give the header of .*: no header"):
            checkpoint.describe("some/model")
    shutil.copytree(published, tmp_path / "cache", dirs_exist_ok=True)  # what was loaded before is read there
    assert checkpoint.describe("some/model")["components"] == wanted["components"]


def test_our_own_checkpoints_come_from_the_hub_too(published, tmp_path, monkeypatch):
    ours = convert(published, tmp_path / "ours", progress=False)
    for other in ("README.md", "transformer/notes.txt", FILE_NAME):
        (ours / other).write_text("x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloading(ours, tmp_path / "cache"))
    found, wanted = checkpoint.load("some/model"), checkpoint.load(ours)
    for name in ("transformer", "vae", "text_encoder"):
        states = [nnx.state(getattr(loaded, name)) for loaded in (found, wanted)]
        jax.tree.map(np.testing.assert_array_equal, *states)
    assert found.scheduler == wanted.scheduler
    assert (tmp_path / "cache" / FILE_NAME).is_file()
    assert not (tmp_path / "cache" / "transformer" / "notes.txt").exists()


def test_existing_destinations(published, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(published, out, components=["scheduler"], progress=False)
    with pytest.raises(CheckpointError, match="exists; choose another place"):
        convert(published, out, components=["scheduler"], progress=False)
    convert(published, out, components=["tokenizer"], progress=False, overwrite=True)
    assert read_manifest(out)["scheduler"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="already a converted checkpoint"):
        convert(out, tmp_path / "again", progress=False)


def test_destinations_that_are_never_overwritten(copy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    (tmp_path / "link").symlink_to(other)
    for destination, message in (
        (other, "is not a checkpoint, so it is not overwritten"),
        (other / "thesis.txt", "exists and is not a folder"),
        (tmp_path / "link", "exists and is not a folder"),
        (copy, "would replace the folder that is being converted"),
        (tmp_path / "no" / "where", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(copy, destination, progress=False, overwrite=True)
    assert (other / "thesis.txt").exists()


def test_place_is_checked_before_work(published, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_model", None)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(CheckpointError, match=r"needs 0.02 GB of disk, 0.01 GB are free"):
        convert(published, tmp_path / "out", progress=False)
    monkeypatch.setattr(store.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="no permission to write"):
        convert(published, tmp_path / "out", progress=False)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_conversion_leaves_what_was_there(published, tmp_path, monkeypatch, problem, overwrite):
    out = tmp_path / "out"
    if overwrite:
        convert(published, out, components=["scheduler"], progress=False)
    before = sorted(tmp_path.rglob("*"))
    count = 0

    def build(*args, original=command.build_arrays, **options):
        nonlocal count
        count += 1
        if count == 40:
            raise problem
        return original(*args, **options)

    monkeypatch.setattr(command, "build_arrays", build)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(published, out, progress=False, overwrite=overwrite)
    assert count == 40
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_replacement_keeps_the_old_checkpoint(published, tmp_path, monkeypatch):
    out = convert(published, tmp_path / "out", components=["scheduler"], progress=False)

    original = type(out).rename

    def rename(self, target):
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(type(out), "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        convert(published, out, components=["tokenizer"], progress=False, overwrite=True)
    assert read_manifest(out)["scheduler"] is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_killed_command_leaves_nothing(tmp_path, number):
    """The signal comes while orbax is writing; orbax's own threads must not bring the folder back."""
    sparse_transformer(tmp_path / "model", LARGE)
    arguments = [sys.executable, "-m", "convert", tmp_path / "model", tmp_path / "out", "--quiet"]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/transformer/00*")):
        assert process.poll() is None, "finished before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_peak_memory_is_that_of_the_largest_parameter(tmp_path):
    """306 MB in parameters of at most 67 MB. Holding the component would add 306 MB; 150 is the largest parameter, its
    published pieces, and 64 MB for what the allocator and the libraries keep."""
    total = sparse_transformer(tmp_path / "model", LARGE)
    code = """if True:
        import resource, sys, jax
        from convert import convert
        jax.numpy.zeros(()).block_until_ready()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        convert(sys.argv[1], sys.argv[2], progress=False)
        print((peak() - before) * 1024)
    """
    arguments = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "out"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert total > 300e6
    assert int(done.stdout) < 150e6


def test_command(tmp_path):
    source = write_text_encoder(tmp_path / "model")
    run = CliRunner().invoke
    done = run(app, [str(source), str(tmp_path / "out"), "--dtype", "bfloat16", "--components", "text_encoder"])
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out'}" in done.output
    arrays = read_manifest(tmp_path / "out")["components"]["text_encoder"]["arrays"]
    assert {entry["dtype"] for entry in arrays.values()} == {"bfloat16"}
    for arguments, message in (
        (["--overwrite", "--dtype", "int8"], "dtype 'int8': one of float32, bfloat16, float16 is needed"),
        (["--overwrite", "--components", "unet"], "components: unet unknown"),
        ([], "exists; choose another place"),
    ):
        failed = run(app, [str(source), str(tmp_path / "out"), *arguments])
        assert failed.exit_code == 2
        assert message in failed.output
