"""Files of compressed-tensors and ModelOpt, read, written back, and run in our transformer.

Values: each library multiplies code, block scale and tensor scale in its own order, with up to two roundings of float32
more than we have (three for compressed-tensors, whose reciprocal we round as well): each at most 2^-24 of the value. A
dropped tensor scale, swapped nibbles or the reciprocal taken the wrong way round change nearly every value by far more.
In bfloat16, which is what the libraries compute in, the same values; ModelOpt decodes -0 as 0, which compares equal.
"""

import common
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import deserialize

from convert import interchange
from convert.engine import assemble
from convert.interchange_models import load_into, published
from convert.rules_transformer import RULES, published_shapes
from pallas_kernels.common.reference import dequantize
from sixbit_jax.config import TransformerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.qtensor import QuantLinear

ROUNDINGS = {"modelopt": 2, "compressed-tensors": 3}
CONVENTIONS = tuple(ROUNDINGS)


@pytest.fixture(params=CONVENTIONS)
def theirs(request, tmp_path):
    """-> convention, the file, config.json, weight shapes, values by "dtype:layer"."""
    config, shapes, outputs = common.load(f"interchange_{request.param.replace('-', '_')}")
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(outputs.pop("bytes").tobytes())
    return request.param, file, config, shapes, outputs


def transformer(config):
    config = TransformerConfig.from_dict({k: v for k, v in config.items() if k != "quantization_config"})
    return nnx.eval_shape(lambda: CogVideoXTransformer3DModel(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))


def test_the_libraries_values(theirs):
    convention, file, _, shapes, values = theirs
    arrays, others = interchange.read(file)
    assert len(arrays) == 2 * 8 + 4
    assert {f"{name}.weight" for name in arrays} | set(others) == set(shapes)
    assert len(values) == 6
    for name in (key.removeprefix("float32:") for key in values if key.startswith("float32:")):
        found = dequantize(arrays[name])
        wanted = values[f"float32:{name}"]
        assert (abs(found - wanted) <= ROUNDINGS[convention] * 2.0**-24 * abs(wanted)).all()
        half = values[f"bfloat16:{name}"].view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16), half)


def test_written_back(theirs, tmp_path):
    """ModelOpt's tensors come back bit for bit; of compressed-tensors', the global scale to one unit."""
    convention, file, *_ = theirs
    arrays, others = interchange.read(file)
    out = interchange.write(arrays, tmp_path / "ours.safetensors", convention=convention, others=others)
    wanted, found = (dict(deserialize(path.read_bytes())) for path in (file, out))
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        if key.endswith("weight_global_scale"):
            scales = [np.frombuffer(stored.pop("data"), np.float32) for stored in (found[key], tensor)]
            np.testing.assert_array_max_ulp(*scales, 1)
        assert found[key] == tensor


def test_quantization_config(theirs):
    """Ours says what theirs says, and nothing that theirs does not; entries of theirs that ours lacks are empty."""
    convention, _, config, *_ = theirs

    def compare(found, wanted):
        assert found.keys() <= wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, dict) and key in found:
                compare(found[key], value)
            elif key in found:
                assert found[key] == value
            else:
                assert not value

    found, wanted = interchange.quantization_config(convention, ["proj_out"]), config["quantization_config"]
    for made_by in ("producer", "version"):
        found.pop(made_by, None), wanted.pop(made_by, None)
    compare(found, wanted)


def test_in_our_transformer(theirs):
    """The result of the dense model that has the dequantised weights, but for rounding of both factors to bfloat16.

    Each is off by at most 2^-9 of its value. Weights in the wrong place are off by over 0.1.
    """
    _, file, config, *_ = theirs
    arrays, others = interchange.read(file)
    model = load_into(transformer(config), arrays, RULES, others)
    assert isinstance(model.blocks.attn_in, QuantLinear)
    assert isinstance(model.proj_out, nnx.Linear)
    # The libraries quantised query, key and value apart.
    assert model.blocks.attn_in.weight.tensor_scale.shape == (2, 96)
    assert model.blocks.ff_in.weight.tensor_scale.shape == (2,)

    weights = others | {f"{name}.weight": dequantize(array) for name, array in arrays.items()}
    graph, state = nnx.split(transformer(config))
    dense = nnx.merge(graph, jax.tree.map(jnp.asarray, assemble(weights, RULES, state)))
    inputs = [(1, 2, 4, 8, 8), (1, 8, 16)]
    inputs = [jnp.asarray(common.values(f"input {shape}", shape)) for shape in inputs]
    outputs = [module(*inputs, jnp.array([500])) for module in (model, dense)]
    assert common.relative_l2(*outputs) < 2.0**-8

    moved = dict(arrays)
    for i in range(2):
        key, value = (f"transformer_blocks.{i}.attn1.to_{x}" for x in "kv")
        moved |= {key: arrays[value], value: arrays[key]}
    wrong = load_into(transformer(config), moved, RULES, others)(*inputs, jnp.array([500]))
    assert common.relative_l2(wrong, outputs[1]) > 0.1

    again, rest = published(model, RULES, published_shapes(model.config))
    assert rest.keys() == others.keys()
    for name, array in arrays.items():
        jax.tree.map(np.testing.assert_array_equal, again[name], array)
    for key, tensor in others.items():
        np.testing.assert_array_equal(rest[key], tensor)
