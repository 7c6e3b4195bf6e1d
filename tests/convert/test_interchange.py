"""NVFP4 files in two conventions, there and back. Files that the libraries wrote are in parity/test_interchange.py."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published_folder
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert import interchange
from convert.errors import CheckpointError, ConversionError
from convert.interchange import from_tensors, read, to_tensors, write
from convert.interchange_models import load_into, published
from convert.rules_transformer import RULES, published_shapes
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.common.reference import dequantize
from sixbit_jax.qtensor import QuantLinear, quantize_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONVENTIONS = tuple(interchange.CONVENTIONS)
E4M3 = ml_dtypes.float8_e4m3fn
TRANSFORMER = dataclasses.replace(published_folder.TRANSFORMER, time_embed_dim=32)


def array(rows=8, size=32, *, seed=0, tensor_scale=0.75, hadamard=0):
    """Any bytes at all, all of which are legal."""
    rng = np.random.default_rng(seed)
    return NVFP4Array(
        codes=rng.integers(0, 256, (rows, size // 2), np.uint8),
        scales=rng.integers(0, 256, (rows, size // 16), np.uint8),
        tensor_scale=np.array(tensor_scale, np.float32),
        hadamard=hadamard,
    )


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and np.shape(x) == np.shape(y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def by_hand(convention):
    """The tensors of one layer "a" [2, 16], whose dequantised value is written down below."""
    tensors = {
        "codes": np.array([[0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED, 0x0F], [0x00] * 7 + [0x70]], np.uint8),
        "scales": np.array([[2.0], [448.0]], E4M3),
    }
    if convention == "modelopt":
        return {
            "a.weight": tensors["codes"],
            "a.weight_scale": tensors["scales"],
            "a.weight_scale_2": np.float32([0.25]),
        }
    return {
        "a.weight_packed": tensors["codes"],
        "a.weight_scale": tensors["scales"],
        "a.weight_global_scale": np.float32([4]),
    }


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_values_by_hand(convention):
    first = [0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6, 0]
    wanted = np.array([[x / 2 for x in first], [0] * 15 + [6 * 448 / 4]], np.float32)
    found = from_tensors(by_hand(convention), convention, "a")
    found.validate()
    np.testing.assert_array_equal(dequantize(found), wanted)
    assert found.tensor_scale.shape == ()


@given(
    tensor_scale=st.floats(2.0**-126, 2.0**126, width=32),
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
)
def test_there_and_back(tensor_scale, seed, rows, blocks):
    """Codes and block scales never change; the tensor scale at most once, by one unit, where it is stored inverted."""
    ours = array(rows, 16 * blocks, seed=seed, tensor_scale=tensor_scale)
    for convention in CONVENTIONS:
        stored = to_tensors(ours, convention, "a.b")
        again = from_tensors(stored, convention, "a.b")
        assert same((ours.codes, ours.scales), (again.codes, again.scales))
        np.testing.assert_array_max_ulp(again.tensor_scale, ours.tensor_scale, 1)
        once_more = to_tensors(again, convention, "a.b")
        assert all(stored[key].tobytes() == once_more[key].tobytes() for key in stored)
        if convention == "modelopt" or np.frexp(ours.tensor_scale)[0] == 0.5:
            assert same(ours, again)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_files(tmp_path, convention):
    arrays = {"blocks.0.q": array(seed=1), "head": array(4, 48, seed=2)}
    others = {
        "head.bias": np.arange(4, dtype=ml_dtypes.bfloat16),
        "norm.weight": np.ones((3, 2), np.float32).T,
        "fp8.weight": np.ones((2, 2), E4M3),
        "fp8.weight_scale": np.float32(2).reshape(()),
        f"head.{interchange.CONVENTIONS[convention].activation}": np.ones((), np.float32),
    }
    out = write(arrays, tmp_path / "model.safetensors", convention=convention, others=others)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "other").touch()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode
    for found, rest in (read(out), read(tmp_path, convention)):
        assert found.keys() == arrays.keys()
        assert all(same(found[name], arrays[name]) for name in arrays)
        assert rest.keys() == others.keys()
        for key, tensor in others.items():
            assert rest[key].dtype == tensor.dtype
            np.testing.assert_array_equal(rest[key], tensor)


def test_one_layer_without_a_name(tmp_path):
    write({"": array()}, tmp_path / "one.safetensors", convention="modelopt")
    assert same(read(tmp_path / "one.safetensors")[0][""], array())


@pytest.mark.parametrize(
    ("convention", "change", "lines"),
    [
        ("modelopt", {"a.weight_scale": None}, ["- missing    a.weight_scale (a): wanted float8_e4m3fn"]),
        (
            "modelopt",
            {"a.weight_scale_2": None, "a.weight": np.zeros((2, 12), np.uint8)},
            [
                "! wrong      a.weight (a): found uint8 [2, 12], wanted [N, K/2], K a positive multiple of 16",
                "- missing    a.weight_scale_2 (a): wanted float32",
            ],
        ),
        (
            "modelopt",
            {"a.weight": np.zeros((2, 8), np.float32)},
            ["! wrong      a.weight (a): found float32 [2, 8], wanted uint8"],
        ),
        ("modelopt", {"a.weight": None}, ["- missing    a.weight (a): wanted uint8"]),
        (
            "modelopt",
            {"a.pre_quant_scale": np.ones(16, np.float32)},
            ["+ unexpected a.pre_quant_scale (a): found [16], wanted none: it makes the layer more than codes times"],
        ),
        (
            "compressed-tensors",
            {"a.weight_scale": np.ones((2, 2), E4M3), "a.weight_global_scale": np.float32([0])},
            [
                "! wrong      a.weight_global_scale (a): found 0.0, wanted a positive normal float32",
                "! wrong      a.weight_scale (a): found float8_e4m3fn [2, 2], wanted [N, K/16] = [2, 1]",
            ],
        ),
        (
            "compressed-tensors",
            {"a.weight_scale": np.ones((2, 1), np.uint8), "a.weight_global_scale": np.ones(2, np.float32)},
            [
                "! wrong      a.weight_global_scale (a): found float32 [2], wanted one value",
                "! wrong      a.weight_scale (a): found uint8 [2, 1], wanted float8_e4m3fn",
            ],
        ),
        (
            "compressed-tensors",
            {"b.weight_global_scale": np.float32([np.nan])},
            ["found nan", "- missing    b.weight_packed (b): wanted uint8", "- missing    b.weight_scale (b)"],
        ),
    ],
)
def test_everything_that_is_wrong_is_listed(tmp_path, convention, change, lines):
    tensors = {key: value for key, value in (by_hand(convention) | change).items() if value is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        read(tmp_path / "model.safetensors", convention)
    found = str(caught.value).splitlines()
    assert all(any(line in text for text in found) for line in lines), caught.value
    assert len(found) == 1 + len(lines)


def test_telling_the_convention(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.ones((2, 2), np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no NVFP4 weight"):
        read(path)
    both = by_hand("modelopt") | {f"b{key[1:]}": value for key, value in by_hand("compressed-tensors").items()}
    save_file(both, path)
    with pytest.raises(CheckpointError, match="layers of compressed-tensors and modelopt"):
        read(path)
    arrays, others = read(path, "modelopt")
    assert (list(arrays), len(others)) == (["a"], 3)
    with pytest.raises(ValueError, match="unknown convention 'gguf'; conventions are compressed-tensors, modelopt"):
        read(path, "gguf")


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match="no safetensors file"):
            read(path)
    path = write({"a": array()}, tmp_path / "a.safetensors", convention="modelopt")
    (tmp_path / "b.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ConversionError, match=r"a\.weight \(b\.safetensors\): wanted each name in one file"):
        read(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConversionError, match=r"unreadable b\.safetensors: found .*, wanted a complete"):
        read(tmp_path)
    header = json.dumps({"a.weight": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    with pytest.raises(ConversionError, match=r"a\.weight \(a\.safetensors\): found F4, wanted a dtype that NumPy"):
        read(path)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_cannot_be_written(tmp_path, convention):
    one = array()
    arrays = {
        "good": one,
        "rotated": dataclasses.replace(one, hadamard=32),
        "rows": dataclasses.replace(one, tensor_scale=np.ones(8, np.float32)),
        "stacked": jax.tree.map(lambda x: np.stack([x, x]), one),
        "zero": dataclasses.replace(one, tensor_scale=np.zeros((), np.float32)),
    }
    others = {"good.weight_scale": np.ones(1, np.float32)}
    with pytest.raises(ConversionError) as caught:
        write(arrays, tmp_path / "model.safetensors", convention=convention, others=others)
    found = str(caught.value)
    for line in (
        "good.weight_scale (others): wanted a name that no weight takes",
        "rotated: found hadamard=32, wanted 0: the conventions have no rotation, so quantise with hadamard=0",
        "rows: found tensor_scale [8], wanted one tensor scale",
        "stacked: found [2, 8, 32], wanted [N, K], one layer",
        "stacked: found tensor_scale [2], wanted one tensor scale",
        "zero: found tensor_scale 0.0, wanted a positive normal float32",
    ):
        assert line in found
    assert len(found.splitlines()) == 7
    with pytest.raises(ValueError, match=r"scales must be \[\.\.\., K/16\]"):
        write(
            {"a": dataclasses.replace(one, scales=one.scales[:, :1])}, tmp_path / "x.safetensors", convention=convention
        )
    assert not list(tmp_path.iterdir())


def test_destination(tmp_path, monkeypatch):
    path = write({"a": array()}, tmp_path / "model.safetensors", convention="modelopt")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists; choose another place"):
        write({"b": array()}, path, convention="modelopt")
    with pytest.raises(CheckpointError, match="exists"):
        write({"b": array()}, tmp_path, convention="modelopt", overwrite=True)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        write({"b": array()}, tmp_path / "absent" / "model.safetensors", convention="modelopt")

    def failing(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(interchange, "save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            write({"b": array()}, path, convention="modelopt", overwrite=True)
    assert path.read_bytes() == before
    write({"b": array()}, path, convention="modelopt", overwrite=True)
    assert list(read(path)[0]) == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.fixture
def quantized():
    model = published_folder.modules(transformer=TRANSFORMER)["transformer"]
    return quantize_model(model, hadamard=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_model_there_and_back(quantized, tmp_path, convention):
    arrays, others = published(quantized, RULES, published_shapes(TRANSFORMER))
    assert arrays["transformer_blocks.2.attn1.to_v"].shape == (32, 32)
    path = write(arrays, tmp_path / "model.safetensors", convention=convention, others=others)
    empty = nnx.eval_shape(lambda: published_folder.modules(transformer=TRANSFORMER)["transformer"])
    other = nnx.eval_shape(lambda: quantize_model(published_folder.modules(transformer=TRANSFORMER)["transformer"]))
    for module in (empty, other):
        found, rest = read(path)
        load_into(module, found, RULES, rest)
        assert module.blocks.attn_in.hadamard == 0
        states = [nnx.split(model) for model in (module, quantized)]
        assert states[0][0] == states[1][0]
        for a, b in zip(*(jax.tree.leaves(state) for _, state in states), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_array_max_ulp(
                np.asarray(a), np.asarray(b), 1 if convention == "compressed-tensors" else 0
            )


def test_some_layers_of_a_model(quantized):
    """Those that are named change, and nothing else does; parts of different tensor scales get one a row."""
    arrays, _ = published(quantized, RULES)
    names = [f"transformer_blocks.{i}.attn1.to_{x}" for i in range(3) for x in "qkv"]
    some = {
        name: dataclasses.replace(arrays[name], tensor_scale=np.float32(i + 1).reshape(()))
        for i, name in enumerate(names)
    }
    model = published_folder.modules(transformer=TRANSFORMER)["transformer"]
    before = nnx.to_pure_dict(nnx.state(model))
    assert load_into(model, some, RULES) is model
    assert isinstance(model.blocks.attn_in, QuantLinear)
    wanted = np.repeat(np.arange(1, 10, dtype=np.float32), 32).reshape(3, 96)
    np.testing.assert_array_equal(model.blocks.attn_in.weight.tensor_scale, wanted)
    np.testing.assert_array_equal(model.blocks.attn_in.bias[...], before["blocks"]["attn_in"]["bias"])
    np.testing.assert_array_equal(model.blocks.ff_in.kernel[...], before["blocks"]["ff_in"]["kernel"])
    assert all(same(published(model, RULES)[0][name], some[name]) for name in names)


def test_weights_that_do_not_fit_the_model(quantized):
    arrays, others = published(quantized, RULES, published_shapes(TRANSFORMER))
    arrays["transformer_blocks.0.ff.net.2"] = array(32, 64)
    arrays["transformer_blocks.3.ff.net.2"] = array(32, 128)
    del arrays["transformer_blocks.1.attn1.to_q"]
    model = published_folder.modules(transformer=TRANSFORMER)["transformer"]
    with pytest.raises(ConversionError) as caught:
        load_into(model, arrays, RULES, others)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "! wrong      transformer_blocks.0.ff.net.2 (blocks.ff_out): found [32, 64], wanted [32, 128]",
        "+ unexpected transformer_blocks.3.ff.net.2 (arrays): found [32, 128]",
        "- missing    transformer_blocks.1.attn1.to_q (blocks.attn_in): wanted [32, 32]",
    ]
    arrays, others = published(quantized, RULES, published_shapes(TRANSFORMER))
    del others["norm_final.weight"]
    with pytest.raises(ConversionError, match=r"missing +norm_final\.weight"):
        load_into(model, arrays, RULES, others)
    assert isinstance(model.blocks.attn_in, nnx.Linear)
    with pytest.raises(ValueError, match="unknown convention"):
        interchange.quantization_config("awq")


def test_jax_arrays_are_taken(tmp_path):
    ours = jax.tree.map(jnp.asarray, array())
    assert same(read(write({"a": ours}, tmp_path / "a.safetensors", convention="modelopt"))[0]["a"], ours)
