"""The transformer on its own: arguments, batching, compilation, gradients, and which dtype computes what."""

import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from pallas_kernels.norm_rotary import norm_rotary
from sixbit_jax.config import TransformerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.layers import LayerNorm

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = tiny.TRANSFORMER


def build(dtype=jnp.float32, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return CogVideoXTransformer3DModel(config, dtype=dtype, rngs=nnx.Rngs(0))


def abstract(dtype=jnp.float32, **changes):
    return nnx.eval_shape(lambda: build(dtype, **changes))


def filled(dtype=jnp.float32, **changes):
    """Split model with random weights that keep activations near 1, biases and modulations included."""
    graph, state = nnx.split(abstract(dtype, **changes))
    random = np.random.default_rng(0)

    def fill(path, leaf):
        stacked = "blocks" in jax.tree_util.keystr(path)
        x = random.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(x / np.sqrt(leaf.shape[-2]) if leaf.ndim - stacked == 2 else 1 + x / 10)

    return graph, jax.tree_util.tree_map_with_path(fill, state)


def inputs(batch=2, seed=0, latents=(3, 4, 4, 4)):
    random = np.random.default_rng(seed)
    return (
        jnp.asarray(random.standard_normal((batch, *latents)), jnp.float32),
        jnp.asarray(random.standard_normal((batch, 5, CONFIG.text_embed_dim)), jnp.float32),
        jnp.asarray(random.integers(0, 1000, batch), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, *arguments):
    return nnx.merge(graph, params)(*arguments)


@pytest.fixture(scope="module")
def model():
    return filled()


@pytest.mark.parametrize(
    ("latents", "changes"),
    [
        ((3, 4, 4, 5), {}),
        ((3, 4, 3, 4), {}),
        ((3, 3, 4, 4), {}),
        ((3, 4, 4, 4), {"patch_size_t": 2}),
    ],
    ids=["width", "height", "channels", "frames"],
)
def test_latents_that_do_not_fit(latents, changes):
    """Without any array to compute with: sizes alone decide."""
    message = r"latents .* do not fit the model: frames must divide by \d, height and width by 2, channels be 4"
    with pytest.raises(ValueError, match=message):
        abstract(**changes).token_grid((2, *latents))
    graph, params = nnx.split(abstract(**changes))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(forward, graph), params, *inputs(latents=latents))


def test_token_grid():
    assert abstract().token_grid((2, 3, 4, 4, 6)) == (3, 2, 3)
    assert abstract(patch_size_t=2).token_grid((2, 4, 4, 4, 6)) == (2, 2, 3)


@pytest.mark.parametrize(("size", "ofs"), [(None, True), (8, False)])
def test_ofs_is_given_exactly_where_the_model_has_it(size, ofs):
    offsets = (jnp.full(2, 2.0),) if ofs else ()
    with pytest.raises(ValueError, match=f"ofs must be given exactly for models .*ofs_embed_dim={size}"):
        abstract(ofs_embed_dim=size)(*inputs(), *offsets)


def test_samples_of_a_batch_are_independent(model):
    """Bit for bit when only the neighbour changes. Alone, products are summed in another order: float32 rounding."""
    arguments = inputs()
    both = forward(*model, *arguments)
    changed = forward(*model, *(x.at[0].set(y[0]) for x, y in zip(arguments, inputs(seed=1), strict=True)))
    np.testing.assert_array_equal(both[1], changed[1])
    assert np.abs(both[0] - changed[0]).max() > 0.1
    np.testing.assert_allclose(forward(*model, *(x[1:] for x in arguments)), both[1:], rtol=1e-5, atol=1e-5)


def test_one_compilation_per_shape(model):
    forward.clear_cache()
    for seed in range(3):
        forward(*model, *inputs(seed=seed))
    assert forward._cache_size() == 1
    forward(*model, *inputs(batch=1))
    assert forward._cache_size() == 2


def test_program_size_does_not_depend_on_depth():
    """Two blocks or six: the same lines, and parameters that differ in a leading axis alone."""
    lines = []
    for layers in (2, 6):
        graph, params = nnx.split(abstract(num_layers=layers))
        blocks = jax.tree.leaves(params["blocks"])
        assert len(blocks) == 20
        assert {leaf.shape[0] for leaf in blocks} == {layers}
        lines.append(len(forward.lower(graph, params, *inputs()).as_text().splitlines()))
    assert lines[0] == lines[1] > 100


def test_every_weight_is_trained(model):
    graph, params = model

    def loss(params):
        return jnp.square(nnx.merge(graph, params)(*inputs())).mean()

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient[...]).all(), path
        assert np.any(gradient[...]), path


def test_text_has_no_positions(model):
    """Its rows of the rotary tables rotate nothing, so the order of the text tokens changes nothing but rounding."""
    latents, text, timestep = inputs()
    stream, context = nnx.merge(*model).embed(latents, text, timestep)
    cos, sin = context.rotary
    assert cos.shape == sin.shape == (5 + 3 * 2 * 2, 16)
    np.testing.assert_array_equal(cos[:5], 1)
    np.testing.assert_array_equal(sin[:5], 0)
    assert (np.abs(sin[6:]).max(axis=1) > 0.1).all()
    rows, norm = jnp.tile(stream.reshape(*stream.shape[:2], 2, 16), (1, 1, 3, 1)), (jnp.ones(16), jnp.zeros(16))
    plain, rotated = (norm_rotary(rows, query=norm, key=norm, rotary=tables) for tables in (None, (cos, sin)))
    np.testing.assert_array_equal(rotated[:, :5], plain[:, :5])
    assert (np.abs(rotated - plain)[:, 6:, :4].max(axis=(0, 2, 3)) > 0.1).all()

    wanted = forward(*model, latents, text, timestep)
    np.testing.assert_allclose(forward(*model, latents, text[:, ::-1], timestep), wanted, rtol=1e-5, atol=1e-5)
    moved = forward(*model, latents[:, ::-1], text, timestep)[:, ::-1]
    assert np.abs(moved - wanted).max() > 0.1


def equations(jaxpr):
    """Every equation of a program, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_what_bfloat16_models_compute_in_float32():
    """Softmax, norm statistics and rotary positions; products take bfloat16, and so is the result."""
    graph, params = nnx.split(abstract(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    program = jax.make_jaxpr(lambda params, *rest: nnx.merge(graph, params)(*rest))(params, *inputs())
    assert [x.dtype for x in program.out_avals] == [jnp.bfloat16]
    found = {}
    for equation in equations(program.jaxpr):
        for x in equation.invars:
            found.setdefault(equation.primitive.name, set()).add(str(x.aval.dtype))
    assert found["exp"] == found["rsqrt"] == found["sin"] == found["cos"] == {"float32"}
    assert found["reduce_sum"] == {"float32"}
    assert found["dot_general"] == {"bfloat16"}


@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 2e-6), (1e3, 5e-4)])
def test_layer_norm_far_from_zero(mean, tolerance):
    """The mean of 48 values near 1e3 is rounded to 1e-4, which a scale of up to 3 multiplies.

    Squares about zero, which flax's own norm takes, lose far more than that.
    """
    random = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((4, 7, 48), (48,), (48,)))
    x = x + jnp.float32(mean)
    wide = np.asarray(x, np.float64)
    wide = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * scale + bias
    kw = {"epsilon": 1e-5, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    ours, half, flax = (
        LayerNorm(48, dtype=jnp.float32, **kw),
        LayerNorm(48, dtype=jnp.bfloat16, **kw),
        nnx.LayerNorm(48, dtype=jnp.float32, **kw),
    )
    for norm in (ours, half, flax):
        norm.scale[...], norm.bias[...] = scale, bias
    np.testing.assert_allclose(ours(x), wide, rtol=0, atol=tolerance)
    # Rounded once: half a unit of bfloat16's 8 bits, on top of that.
    assert half(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(half(x).astype(jnp.float32), wide, rtol=2**-8, atol=tolerance)
    assert mean == 0 or np.abs(flax(x) - wide).max() > 5 * tolerance


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TransformerConfig.cogvideox_2b, 1_693_783_872),
        (TransformerConfig.cogvideox_5b, 5_570_283_072),
        (TransformerConfig.cogvideox_1_5_5b, 5_570_676_352),
    ],
    ids=["2b", "5b", "1.5-5b"],
)
def test_published_sizes_are_described_without_allocation(config, size):
    before = {id(x) for x in jax.live_arrays()}
    model = nnx.eval_shape(lambda: CogVideoXTransformer3DModel(config(), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == size
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(x.size for x in jax.live_arrays() if id(x) not in before) < 1000  # random keys
