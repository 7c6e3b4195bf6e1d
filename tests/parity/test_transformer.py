"""The transformer against diffusers: sincos, rotary and temporally patched variants.

Tolerances: summation order differs between XLA and torch, about 1e-6 relative L2 at these depths, so 1e-5; a wrong
axis order, a missing modulation or shifted positions are off by over 1e-2. In bfloat16 our error against the float32
reference may be at most twice that of diffusers.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.engine import assemble, to_diffusers
from convert.rules_transformer import RULES
from sixbit_jax.config import TransformerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel

CASES = sorted(path.stem for path in common.REFERENCES.glob("transformer_*.json"))


def build(config, shapes, dtype):
    config = TransformerConfig.from_dict(config)
    abstract = nnx.eval_shape(
        lambda: CogVideoXTransformer3DModel(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(abstract)
    return graph, jax.tree.map(jnp.asarray, assemble(common.weights(shapes), RULES, state, dtype=dtype))


def run(case, dtype):
    config, shapes, wanted = common.load(case)
    graph, params = build(config, shapes, dtype)
    batch, frames, _, height, width = wanted["output"].shape
    latents = common.values("latents", (batch, frames, config["in_channels"], height, width))
    text = common.values("text", (batch, 7, config["text_embed_dim"]))
    timestep = np.array([999, 321][:batch], np.int32)
    ofs = np.full((batch,), 2.0, np.float32) if "ofs_embed_dim" in config else None
    forward = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    found = forward(params, latents, text, timestep, ofs)
    assert found.dtype == dtype
    return wanted, found.astype(jnp.float32)


def test_there_are_cases():
    assert len(CASES) == 6


@pytest.mark.parametrize("case", CASES)
def test_float32(parity, case):
    wanted, found = run(case, jnp.float32)
    parity.exact(case, found, wanted["output"], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(parity, case):
    wanted, found = run(case, jnp.bfloat16)
    parity.half(case, found, wanted["output"], wanted["bfloat16_error"])


@pytest.mark.parametrize("case", CASES)
def test_weights_return_to_the_same_keys(case):
    config, shapes, _ = common.load(case)
    shapes = {k: v for k, v in shapes.items() if not k.endswith("pos_embedding")}
    _, params = build(config, shapes, jnp.float32)
    published = dict(to_diffusers(params, RULES, shapes))
    for key, value in common.weights(shapes).items():
        np.testing.assert_array_equal(published.pop(key), value, err_msg=key)
    assert not published
