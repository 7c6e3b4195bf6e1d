"""The T5 encoder on its own: shapes, masking, transformations, dtypes, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sixbit_jax.config import T5Config
from sixbit_jax.models.t5 import T5EncoderModel, relative_position_buckets

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
IDS = jnp.array([[1, 2, 3, 4, 0, 0], [9, 8, 7, 6, 5, 49]])


def abstract(dtype):
    return nnx.eval_shape(lambda: T5EncoderModel(CONFIG, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return T5EncoderModel(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, ids, mask):
    return nnx.merge(graph, params)(ids, mask)


def encode(model, ids, mask=None):
    return forward(*nnx.split(model), ids, mask)


def cast(model, dtype):
    """The same weights in a model of another dtype."""
    graph, _ = nnx.split(abstract(dtype))
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(model)))


def test_parameters(model):
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert shapes == {
        "shared.embedding": (50, 24),
        "relative_attention_bias.embedding": (32, 2),
        "blocks.attn_norm.scale": (3, 24),
        "blocks.attn_in.kernel": (3, 24, 48),
        "blocks.attn_out.kernel": (3, 16, 24),
        "blocks.ff_norm.scale": (3, 24),
        "blocks.ff_in.kernel": (3, 24, 64),
        "blocks.ff_out.kernel": (3, 32, 24),
        "final_layer_norm.scale": (24,),
    }


def test_initial_blocks_differ_and_keep_logits_small(model):
    kernel = np.asarray(model.blocks.attn_in.kernel[...])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    # Standard deviations of 24 ** -0.5 from 384 to 768 draws: 10 % is three of their own deviations.
    np.testing.assert_allclose(kernel[:, :, 16:].std(), 24**-0.5, rtol=0.1)
    np.testing.assert_allclose(kernel[:, :, :16].std(), (24 * 8) ** -0.5, rtol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_dtype_and_shape(model, dtype):
    features = encode(cast(model, dtype), IDS)
    assert features.dtype == dtype
    assert features.shape == (2, 6, 24)
    assert jnp.isfinite(features).all()


def test_float16_survives_activations_beyond_its_range(model):
    """The feed-forward's output here exceeds 65504, which only a float32 residual stream holds."""
    model = cast(model, jnp.float16)
    model.blocks.ff_out.kernel[...] = jnp.full_like(model.blocks.ff_out.kernel[...], 6e4)
    graph, block = nnx.split(model.blocks)
    first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], block))
    x = jnp.ones((1, 4, 24), jnp.float32) * jnp.arange(24.0)
    assert jnp.abs(jax.jit(first)(x, jnp.zeros((1, 2, 4, 4)))).max() > 65504
    assert jnp.isfinite(encode(model, IDS)).all()


def test_batch_rows_do_not_mix(model):
    # One row is a smaller product: summation order may differ by a few roundings of 6e-8.
    np.testing.assert_allclose(encode(model, IDS)[1:], encode(model, IDS[1:]), rtol=0, atol=3e-6)


def test_masked_tokens_have_no_influence(model):
    mask = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1]])
    changed = jnp.where(mask == 0, 33, IDS)
    found, wanted = encode(model, changed, mask), encode(model, IDS, mask)
    np.testing.assert_array_equal(found[mask == 1], wanted[mask == 1])
    assert np.abs(encode(model, changed) - encode(model, IDS))[mask == 1].max() > 1e-3
    np.testing.assert_array_equal(encode(model, IDS, mask != 0), wanted)


def test_full_mask_changes_nothing(model):
    np.testing.assert_array_equal(encode(model, IDS, jnp.ones_like(IDS)), encode(model, IDS))


def test_empty_mask_is_finite(model):
    assert jnp.isfinite(encode(model, IDS, jnp.zeros_like(IDS))).all()


def test_positions_matter_only_relatively(model):
    """Attention biases see key minus query, never the positions themselves."""
    bias = np.asarray(model.attention_bias(9))[0]
    np.testing.assert_array_equal(bias[:, 1:, 1:], bias[:, :-1, :-1])
    assert np.abs(bias[:, 0, 1] - bias[:, 1, 0]).max() > 1e-3


def test_buckets():
    row = relative_position_buckets(200, 32, 128)[0]
    np.testing.assert_array_equal(row[:9], [0, 17, 18, 19, 20, 21, 22, 23, 24])
    assert row[127] == row[199] == 31
    column = relative_position_buckets(200, 32, 128)[:, 0]
    np.testing.assert_array_equal(column[1:], row[1:] - 16)
    assert (np.diff(row) >= 0).all()


def test_jit_and_vmap(model):
    graph, params = nnx.split(model)
    mask = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    plain = model(IDS, mask)
    # Compiled and batched differently: a few float32 roundings on values of size 1.
    np.testing.assert_allclose(forward(graph, params, IDS, mask), plain, rtol=0, atol=3e-6)
    rows = functools.partial(forward, graph)
    mapped = jax.vmap(rows, in_axes=(None, 0, 0))(params, IDS[:, None], mask[:, None])[:, 0]
    np.testing.assert_allclose(mapped, plain, rtol=0, atol=3e-6)


def test_gradients_are_finite_and_reach_every_parameter(model):
    graph, params = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(IDS)[:, :3]).sum()))(params)
    for path, leaf in nnx.to_flat_state(gradient):
        assert jnp.isfinite(leaf[...]).all(), path
        assert jnp.abs(leaf[...]).max() > 0, path


def test_abstract_construction_allocates_nothing():
    xxl = nnx.eval_shape(lambda: T5EncoderModel(T5Config(), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(xxl, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    # T5 v1.1 XXL's encoder, 4.76 billion parameters.
    assert sum(leaf.size for leaf in leaves) == 4_762_310_656


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, length >= 1\]; its shape is \(6,\)"):
        model(IDS[0])
    with pytest.raises(ValueError, match=r"its shape is \(2, 0\)"):
        model(IDS[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask \(2, 5\) must have the shape of input_ids \(2, 6\)"):
        model(IDS, jnp.ones((2, 5), jnp.int32))


def test_unknown_ids_are_not_silently_clamped(model):
    features = encode(model, IDS.at[0, 0].set(50))
    assert jnp.isnan(features[0]).all()
    assert jnp.isfinite(features[1]).all()
