"""The T5 encoder against transformers, with and without a mask.

Tolerances: summation order differs between XLA and torch, about 1e-6 relative L2 at these depths, so 1e-5. Scaled
attention, a wrong bucket or an ignored mask are off by over 1e-2. In 16 bits our error against the float32 reference
may be at most twice that of transformers.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.engine import assemble, to_diffusers
from convert.rules_t5 import RULES
from sixbit_jax.config import T5Config
from sixbit_jax.models.t5 import T5EncoderModel, relative_position_buckets

CASES = sorted(path.stem for path in common.REFERENCES.glob("t5_*.json"))


def build(config, shapes, dtype):
    config = T5Config.from_dict(config)
    abstract = nnx.eval_shape(lambda: T5EncoderModel(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return graph, jax.tree.map(jnp.asarray, assemble(common.weights(shapes), RULES, state, dtype=dtype))


def run(case, masking, dtype):
    config, shapes, wanted = common.load(case)
    graph, params = build(config, shapes, dtype)
    mask = wanted["mask"].astype(np.int32) if masking == "masked" else None
    forward = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    found = forward(params, wanted["ids"].astype(np.int32), mask)
    assert found.dtype == dtype
    return wanted, found.astype(jnp.float32)


def test_there_are_cases():
    assert len(CASES) == 4


@pytest.mark.parametrize("masking", ["plain", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_float32(parity, case, masking):
    wanted, found = run(case, masking, jnp.float32)
    parity.exact(case, found, wanted[masking], 1e-5)


@pytest.mark.parametrize("masking", ["plain", "masked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_16_bits(parity, case, masking, dtype):
    wanted, found = run(case, masking, jnp.dtype(dtype))
    parity.half(case, found, wanted[masking], wanted[f"{masking}_{dtype}_error"], dtype)


@pytest.mark.parametrize("case", CASES)
def test_buckets_are_the_same_integers(case):
    config, _, wanted = common.load(case)
    found = relative_position_buckets(
        len(wanted["buckets"]), config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
    )
    np.testing.assert_array_equal(found, wanted["buckets"])


def test_the_mask_matters():
    """The masked references would not notice a mask that both sides ignore."""
    for case in CASES:
        _, _, wanted = common.load(case)
        assert common.relative_l2(wanted["masked"], wanted["plain"]) > 1e-2


def test_rules_run_backwards():
    config, shapes, _ = common.load("t5_deep")
    weights = common.weights(shapes)
    _, params = build(config, shapes, jnp.float32)
    written = dict(to_diffusers(params, RULES, {}))
    assert set(written) == set(weights) - {"encoder.embed_tokens.weight"}
    for key, array in written.items():
        np.testing.assert_array_equal(array, weights[key])


def test_a_whole_t5_converts_without_its_decoder():
    config, shapes, _ = common.load("t5_one_block")
    d = config["d_model"]
    rest = {
        "lm_head.weight": (config["vocab_size"], d),
        "decoder.embed_tokens.weight": (config["vocab_size"], d),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": (48, d),
        "decoder.final_layer_norm.weight": (d,),
    }
    _, with_decoder = build(config, shapes | rest, jnp.float32)
    _, alone = build(config, shapes, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, with_decoder, alone)
