import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from published_folder import edit_json, edit_tensors, write_text_encoder
from safetensors.numpy import load_file, save_file

from convert import convert
from convert.errors import CheckpointError, ConversionError
from convert.readers import open_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("single") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("sharded") / "model", max_shard_size=6000)


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "copy")


def failure(folder):
    """The message of the failed conversion, after checking that it left nothing."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(folder, folder.parent / "out", progress=False)
    assert sorted(folder.parent.iterdir()) == before
    return str(caught.value)


def test_sharded_holds_what_single_holds(single, sharded):
    (one, none), (many, nor) = (open_weights(folder / "text_encoder", "model") for folder in (single, sharded))
    assert none == nor == []
    assert one.keys() == many.keys()
    assert len({tensor.file for tensor in many.values()}) >= 3
    for key, tensor in one.items():
        np.testing.assert_array_equal(np.asarray(tensor), np.asarray(many[key]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_read_bit_for_bit(tmp_path, dtype):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    save_file({"x": x}, tmp_path / "model.safetensors")
    tensors, problems = open_weights(tmp_path, "model")
    assert problems == []
    assert tensors["x"].dtype == dtype
    assert np.asarray(tensors["x"]).tobytes() == x.tobytes()


def test_missing_shard(copy):
    (copy / "text_encoder" / "model-00002-of-00004.safetensors").unlink()
    message = failure(copy)
    assert "x unreadable text_encoder/model-00002-of-00004.safetensors: found no such file" in message
    assert "- missing" in message


def test_truncated_shard(copy):
    shard = copy / "text_encoder" / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "x unreadable text_encoder/model-00001-of-00004.safetensors" in failure(copy)


def test_index_and_shards_disagree(copy):
    shards = copy / "text_encoder"
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    key = "encoder.final_layer_norm.weight"
    file = weight_map[key]
    other = next(name for name in sorted(weight_map.values()) if name != file)
    edit_json(shards / INDEX, weight_map=weight_map | {key: other})
    message = failure(copy)
    assert f"- missing    {key} (text_encoder/{other}): wanted as {INDEX} says" in message
    assert f"+ unexpected {key} (text_encoder/{file}): found [16], wanted nothing: {INDEX} does not list it" in message
    assert "2 problems" in message


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/tmp/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "x.bin", "..", 3]
)
def test_index_that_leaves_the_folder_or_names_no_safetensors(copy, name):
    index = copy / "text_encoder" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"] | {"shared.weight": name}
    edit_json(index, weight_map=weight_map)
    message = failure(copy)
    assert f"x unreadable shared.weight (text_encoder/{INDEX}): found {name!r}" in message
    assert "the name of a .safetensors file in the same folder" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}", '"\\ud800"', "\xff"])
def test_bad_index(copy, text):
    (copy / "text_encoder" / INDEX).write_bytes(text.encode("latin-1"))
    assert f"x unreadable text_encoder/{INDEX}" in failure(copy)


def test_pickles_are_never_opened(single, tmp_path):
    folder = shutil.copytree(single, tmp_path / "copy")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    message = failure(folder)
    assert "found pytorch_model.bin, wanted model.safetensors or model.safetensors.index.json" in message
    assert "save_pretrained(folder, safe_serialization=True)" in message


def test_unsupported_dtype(single, tmp_path):
    folder = shutil.copytree(single, tmp_path / "copy")
    file = folder / "text_encoder" / "model.safetensors"
    edit_tensors(file, lambda held: held.update({"shared.weight": held["shared.weight"].astype(np.int32)}))
    message = failure(folder)
    assert "! wrong      shared.weight (text_encoder/model.safetensors): found dtype I32, wanted one of F32" in message
    assert "1 problem;" in message


def test_wrong_tensors_are_all_listed_with_their_files(copy):
    shards = copy / "text_encoder"
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    file = weight_map["shared.weight"]
    edit_tensors(shards / file, lambda held: held.update({"shared.weight": np.zeros((41, 16), np.float32)}))
    gone = weight_map.pop("encoder.block.1.layer.0.SelfAttention.o.weight")
    edit_tensors(shards / gone, lambda held: held.pop("encoder.block.1.layer.0.SelfAttention.o.weight"))
    edit_tensors(shards / gone, lambda held: held.update({"extra": np.zeros(3, np.float32)}))
    edit_json(shards / INDEX, weight_map=weight_map | {"extra": gone})
    assert failure(copy).splitlines() == [
        f"{copy}: 3 problems; nothing was converted",
        f"  ! wrong      shared.weight (text_encoder/{file}): found [41, 16], wanted [40, 16]",
        "  - missing    encoder.block.1.layer.0.SelfAttention.o.weight (text_encoder): wanted [16, 16]",
        f"  + unexpected extra (text_encoder/{gone}): found [3]",
    ]


def test_fuzzed_files_are_errors_and_leave_nothing(single, tmp_path):
    """Truncations and flipped header bits; a flip may only pass if every tensor is still read as it was."""
    folder = shutil.copytree(single, tmp_path / "copy")
    file = folder / "text_encoder" / "model.safetensors"
    good, wanted = file.read_bytes(), load_file(file)
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(good[:8], "little")
    cuts = [good[:n] for n in (0, 1, 7, 8, 9, header - 1, header, *rng.integers(0, len(good), 8))]
    flips = []
    for at in (0, 1, 4, 7, *rng.integers(8, header, 40)):
        flipped = bytearray(good)
        flipped[at] ^= 1 << int(rng.integers(8))
        flips.append(bytes(flipped))
    messages = []
    for content in cuts + flips:
        file.write_bytes(content)
        try:
            out = convert(folder, tmp_path / "out", progress=False)
        except ConversionError as error:
            messages.append(str(error))
        else:
            found = load_file(file)
            assert found.keys() == wanted.keys()
            assert all(found[key].tobytes() == wanted[key].tobytes() for key in wanted)
            shutil.rmtree(out)
        assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert len(messages) >= len(cuts) + 40
    assert all("text_encoder/model.safetensors" in message for message in messages)
