"""Damaged checkpoint folders: an error of our own, soon; nothing read from elsewhere, and nothing left behind.

What no test here can ask for: bytes flipped within the values of a tensor are other values. Neither safetensors nor the
arrays of our own checkpoints have a checksum, so such a folder converts, and loads, without a word.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import published_folder
import pytest
from hypothesis import strategies as st
from published_folder import edit_json, edit_tensors, same_bits
from typer.testing import CliRunner

import convert.__main__
from convert import convert as convert_folder
from convert import store
from convert.errors import CheckpointError
from convert.published import open_published, plan_all
from sixbit_jax import checkpoint
from sixbit_jax.checkpoint import write_diffusers
from sixbit_jax.pipeline import MINI_MODEL
from sixbit_jax.precision.calibration import FILE_NAME, Calibration
from sixbit_jax.training.tokenizer import build_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECONDS = 20
"""More than any of these takes on a busy machine, and less than to read 10 GB, or to wait for a pipe."""
INDEX = "text_encoder/model.safetensors.index.json"
SHARD = "text_encoder/model-00002-of-00004.safetensors"
CONFIG = "text_encoder/config.json"
few = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


class TooSlow(BaseException):
    """Not an Exception, so that nothing takes it for a file that cannot be read."""


@contextlib.contextmanager
def in_time():
    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Text encoder in shards, tokenizer and scheduler."""
    return write_diffusers(
        tmp_path_factory.mktemp("published") / "model",
        **published_folder.modules(text_encoder=published_folder.T5),
        tokenizer=build_tokenizer(),
        scheduler=published_folder.SCHEDULER,
        max_shard_size=6000,
    )


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    """The same, converted, each parameter in an item of its own: orbax warns later of others that it was reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ITEM_BYTES", 1)
        return convert_folder(published, tmp_path_factory.mktemp("ours") / "model", progress=False)


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def tree(folder: Path) -> dict:
    """Everything in it: kind, size and time of change, links not followed."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def failure(folder: Path) -> str:
    """The message of the conversion, which must fail and change nothing, here or beside."""
    before = tree(folder.parent)
    with in_time(), pytest.raises(CheckpointError) as caught:
        convert_folder(folder, folder.parent / "out", progress=False)
    assert tree(folder.parent) == before
    return str(caught.value)


def converts(folder: Path) -> Path:
    """The checkpoint, which must be made, and hold no more than its kind does."""
    with in_time():
        out = convert_folder(folder, folder.parent / "out", progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["sixbit.json", "text_encoder", "tokenizer"]
    return out


# JSON

TEXTS = {
    "empty": "",
    "no JSON": "{]",
    "list": "[]",
    "null": "null",
    "number": "3",
    "not a number": "NaN",
    "digits": f'{{"_x": {"9" * 5000}}}',
    "deep": '{"_x":' * 100_000,
    "deep and whole": '{"_x":' * 500 + "1" + "}" * 500,
    "no text": "\xff\xfe",
}


@pytest.mark.parametrize("file", ["model_index.json", CONFIG, INDEX, "scheduler/scheduler_config.json"])
def test_wrong_json(copy, file):
    for text in TEXTS.values():
        (copy / file).write_bytes(text.encode("latin-1"))
        assert Path(file).name in failure(copy)
    with open(copy / file, "wb") as large:
        large.truncate(10 << 30)
    assert "10737418240 bytes" in failure(copy)
    (copy / file).unlink()
    os.mkfifo(copy / file)
    message = failure(copy) if file not in ("model_index.json", INDEX) else None  # those are as good as absent
    assert message is None or "no regular file" in message


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["list", "deep", "no JSON", "number"])
def test_wrong_tokenizer(copy, file, text):
    (copy / "tokenizer" / file).write_text(TEXTS[text])
    with in_time(), pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        checkpoint.load(copy, components=["tokenizer"])


def test_a_tokenizer_that_brings_code_is_not_asked_about(copy, tmp_path):
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    edit_json(copy / "tokenizer" / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")
    (copy / "tokenizer" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    with in_time(), contextlib.suppress(CheckpointError):
        checkpoint.load(copy, components=["tokenizer"])
    assert not (tmp_path / "ran").exists()


CONFIGS = {
    "text_encoder": (published_folder.T5, CONFIG),
    "scheduler": (published_folder.SCHEDULER, "scheduler/scheduler_config.json"),
    "transformer": (published_folder.TRANSFORMER, "transformer/config.json"),
    "vae": (published_folder.VAE, "vae/config.json"),
}
WRONG = ["x", [[1]], {}, 10**30, float("nan"), float("inf")]
ODD = [None, True, 0, -1, 10**6, 1e300, 2.5, []]


@pytest.fixture(scope="module")
def all_components(tmp_path_factory):
    return published_folder.write(tmp_path_factory.mktemp("all") / "model")


@few
@hypothesis.given(data=st.data(), name=st.sampled_from(list(CONFIGS)), value=st.sampled_from(WRONG + ODD))
def test_wrong_configurations(all_components, data, name, value):
    """A value of a wrong type is told by its field, before a module is made of it; one of a wrong size may be told by
    the tensors, or be none of their business."""
    config, file = CONFIGS[name]
    field = data.draw(st.sampled_from(sorted(config.to_dict())))
    content = (all_components / file).read_text()
    try:
        edit_json(all_components / file, **{field: value})
        with in_time():
            plan_all(open_published(all_components, [name]))
        message = None
    except CheckpointError as error:
        message = str(error)
    finally:
        (all_components / file).write_text(content)
    if value in WRONG and not isinstance(value, str):
        assert message is not None
        assert field.removeprefix("_") in message


@pytest.mark.parametrize("architectures", [3, True, "T5", {}, [{}]])
def test_wrong_architectures(copy, architectures):
    edit_json(copy / CONFIG, architectures=architectures)
    assert "is not supported" in failure(copy) if architectures else converts(copy)


# Index and shards


def test_index_that_names_a_file_elsewhere(copy, published):
    """All of these exist, or cannot; what is at the other end holds just the right tensors."""
    weight_map = json.loads((copy / INDEX).read_text())["weight_map"]
    shutil.copy(copy / SHARD, copy.parent / "x.safetensors")
    for name in ("../../x.safetensors", str(published / SHARD), "\0.safetensors", "\ud800.safetensors", "", ".."):
        moved = {key: name if file == Path(SHARD).name else file for key, file in weight_map.items()}
        (copy / INDEX).write_text(json.dumps({"weight_map": moved}))
        assert "x unreadable" in failure(copy)


def test_messages_do_nothing_to_a_terminal(copy):
    weight_map = json.loads((copy / INDEX).read_text())["weight_map"]
    key = "\x1b]0;title\x07\ud800"
    edit_json(copy / INDEX, weight_map=weight_map | {key: "\x1b[2J\ud800.safetensors"})
    done = CliRunner().invoke(convert.__main__.app, [str(copy), str(copy.parent / "out")])
    assert done.exit_code == 2
    assert "unreadable" in done.stderr
    assert r"\x1b[2J\ud800.safetensors" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_tensor_in_two_shards(copy):
    held = {}
    edit_tensors(copy / SHARD, held.update)
    key = next(iter(held))
    other = copy / "text_encoder" / "model-00003-of-00004.safetensors"
    edit_tensors(other, lambda tensors: tensors.update({key: held[key] + 1}))
    assert f"+ unexpected {key} (text_encoder/{other.name})" in failure(copy)


def header(claimed: int, content: bytes = b"{}") -> bytes:
    return struct.pack("<Q", claimed) + content


def tensor(shape: list[int], start: int, end: int) -> bytes:
    content = json.dumps({"shared.weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}).encode()
    return header(len(content), content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        header(10 << 30),
        header(2**64 - 1),
        header(1 << 20),
        tensor([40, 16], 0, 10 << 30),
        tensor([2**62, 16], 0, 2560) + b"\0" * 2560,
        tensor([40, 16], 2560, 0) + b"\0" * 2560,
        tensor([-1, 16], 0, 2560) + b"\0" * 2560,
        header(200_000, b"[" * 200_000),
        pickle.dumps({"a": 1}),
    ],
    ids=lambda content: f"{len(content)}-{content[:12].hex()}",
)
def test_a_shard_that_is_none(copy, content):
    (copy / SHARD).write_bytes(content)
    assert f"x unreadable {SHARD}" in failure(copy)


def test_a_shard_whose_header_claims_what_a_sparse_file_has(copy):
    with open(copy / SHARD, "wb") as file:
        file.write(header(10 << 30))
        file.truncate(11 << 30)
    assert f"x unreadable {SHARD}" in failure(copy)


@few
@hypothesis.given(data=st.data())
def test_headers_with_other_bytes(published, tmp_path_factory, data):
    """A header that still passes must describe the same tensors at the same places."""
    folder = tmp_path_factory.mktemp("header")
    copy = shutil.copytree(published, folder / "copy")
    good = (copy / SHARD).read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    changed = bytearray(good)
    for at in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)):
        changed[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0129-"{}[]:,')))
    (copy / SHARD).write_bytes(changed)
    with in_time():
        try:
            tensors = plan_all(open_published(copy)) and open_published(copy).parts["text_encoder"].tensors
        except CheckpointError:
            assert failure(copy)
        else:
            wanted = open_published(published).parts["text_encoder"].tensors
            assert all(np.array_equal(np.asarray(tensors[key]), np.asarray(wanted[key])) for key in wanted)
    shutil.rmtree(folder)


# Links, pipes and pickles


@pytest.mark.parametrize("name", [SHARD, INDEX, CONFIG, "text_encoder", "tokenizer", "tokenizer/more.json"])
def test_links_that_leave_the_folder(copy, published, name):
    """What they lead to would do: all of it is right, or just text."""
    path, elsewhere = copy / name, published / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    assert f"{path}: is a link to {elsewhere}, outside of the checkpoint" in failure(copy)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", SHARD])
def test_links_that_lead_to_no_file(copy, target):
    (copy / SHARD).unlink()
    (copy / SHARD).symlink_to(copy / target)
    message = failure(copy)
    assert "no such file" in message or "outside of the checkpoint" in message


def test_links_within_a_folder_and_of_the_hubs_cache(copy, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    for file in [path for path in copy.rglob("*") if path.is_file()]:
        link = snapshot / file.relative_to(copy)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha256(str(link).encode()).hexdigest()
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert converts(snapshot)
    (copy / SHARD).rename(copy / "here")
    (copy / SHARD).symlink_to("../here")
    (tmp_path / "whole").symlink_to(copy)
    assert converts(tmp_path / "whole")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_are_never_opened(copy, tmp_path):
    """Beside good weights, and instead of them; a pipe would be waited for, if one opened it."""
    pickles = ["text_encoder/pytorch_model.bin", "text_encoder/model.pt", "tokenizer/vocabulary.pkl"]
    for name in pickles:
        (copy / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    os.mkfifo(copy / "text_encoder" / "diffusion_pytorch_model.bin")
    out = converts(copy)
    assert not list(out.rglob("*.pkl"))
    for weights in (copy / "text_encoder").glob("*.safetensors*"):
        weights.unlink()
    shutil.rmtree(out)
    assert "a .bin is a pickle" in failure(copy)
    shutil.copy(copy / pickles[0], copy / "text_encoder" / "model.safetensors")
    assert "x unreadable text_encoder/model.safetensors" in failure(copy)
    assert not (tmp_path / "ran").exists()


def test_a_place_beside_the_destination_that_is_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    tag = hashlib.sha256(b"work").hexdigest()[:8]
    (tmp_path / f".out.{tag}.partial").symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="cannot be written"), store.staged(tmp_path / "out", "work"):
        pytest.fail("was opened")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Our own folders


def places(value, at=()):
    """The path of every value in a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            yield from places(inner, (*at, key))


@hypothesis.settings(few, max_examples=12)
@hypothesis.given(data=st.data(), value=st.sampled_from([*WRONG, *ODD, "../000", "/etc", "\0", "000"]))
def test_wrong_manifests(ours, tmp_path_factory, data, value):
    manifest = json.loads((ours / "sixbit.json").read_text())
    place = data.draw(st.sampled_from([p for p in places(manifest) if p[0] not in ("written_by", "tokenizer")]))
    copy = tmp_path_factory.mktemp("manifest") / "copy"
    shutil.copytree(ours, copy)
    node = manifest
    for key in place[:-1]:
        node = node[key]
    if data.draw(st.booleans()):
        node[place[-1]] = value
    else:
        del node[place[-1]]
    (copy / "sixbit.json").write_text(json.dumps(manifest))
    with in_time():
        with contextlib.suppress(CheckpointError):
            json.dumps(checkpoint.describe(copy))
        try:
            found = checkpoint.load(copy, dtype=jnp.float32, components=["text_encoder"])
        except CheckpointError:
            pass
        else:
            assert same_bits(found.text_encoder, checkpoint.load(ours, dtype=jnp.float32).text_encoder)
    shutil.rmtree(copy)


@pytest.mark.parametrize("item", ["../text_encoder/000", "/etc", "", ".", 3, None, "000\0"])
def test_items_elsewhere(ours, tmp_path, item):
    copy = shutil.copytree(ours, tmp_path / "copy")
    manifest = json.loads((copy / "sixbit.json").read_text())
    manifest["components"]["text_encoder"]["arrays"]["shared.embedding"]["item"] = item
    (copy / "sixbit.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"sixbit\.json: text_encoder: shared\.embedding: .*item"):
        checkpoint.load(copy)


def test_links_in_our_folder(ours, tmp_path):
    copy = shutil.copytree(ours, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder" / "000")
    (copy / "text_encoder" / "000").symlink_to(ours / "text_encoder" / "000")
    for act in (checkpoint.load, checkpoint.describe):
        with pytest.raises(CheckpointError, match="outside of the checkpoint"):
            act(copy)


# orbax leaves what it had begun to its own threads, which say so when they end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_items_that_are_cut(ours, tmp_path):
    """At any place of any file: an error that names the item, or the values as they were."""
    rng = np.random.default_rng(0)
    wanted = checkpoint.load(ours, dtype=jnp.float32, components=["text_encoder"]).text_encoder
    files = sorted(path for path in (ours / "text_encoder" / "000").rglob("*") if path.is_file())
    messages = []
    for number, file in enumerate(files):
        copy = shutil.copytree(ours, tmp_path / str(number))
        content = file.read_bytes()
        (copy / file.relative_to(ours)).write_bytes(content[: rng.integers(len(content) + 1)])
        with in_time():
            try:
                found = checkpoint.load(copy, dtype=jnp.float32, components=["text_encoder"]).text_encoder
            except CheckpointError as error:
                messages.append(str(error))
            else:
                assert same_bits(found, wanted)
    assert len(messages) >= 3
    assert all("text_encoder/000: cannot be read" in message for message in messages)


@few
@hypothesis.given(data=st.data())
def test_damaged_calibrations(tmp_path_factory, data):
    good = (MINI_MODEL / FILE_NAME).read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    changed = bytearray(good)
    for at in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)):
        changed[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0129-"{}[]:,')))
    path = tmp_path_factory.mktemp("calibration") / FILE_NAME
    path.write_bytes(bytes(changed[: data.draw(st.sampled_from([size - 1, size, len(good), len(good)]))]))
    with in_time(), contextlib.suppress(CheckpointError):
        Calibration.load(path)
