"""The epilogue of a linear layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.epilogue import Epilogue, apply, finish, gelu_tanh, tanh_by_exp2

Y = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)


def part(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("tanh", [jnp.tanh, tanh_by_exp2])
def test_gelu_is_jax_nn_gelu_in_float64(tanh):
    """A few units of float32 in the last place of the half that tanh is added to: 4 * 2^-24 * |y|."""
    y = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]]).astype(np.float32)
    exact = 0.5 * wide(y) * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide(y) + 0.044715 * wide(y) ** 3)))
    found = wide(gelu_tanh(jnp.asarray(y), tanh))
    assert (np.abs(found - exact) <= 4 * 2**-24 * np.abs(y)).all()
    np.testing.assert_allclose(found[:4001], wide(jax.nn.gelu(y[:4001], approximate=True)), atol=1e-5)
    assert gelu_tanh(jnp.float32(np.inf), tanh) == np.inf
    assert np.isnan(gelu_tanh(jnp.float32(np.nan), tanh))


def test_parts_in_order():
    """Bias, then activation, then gate, then residual; rows of text take gate 0; sums of a few float32 roundings."""
    bias, gate, residual = part(1, 7), part(2, 2, 2, 7), part(3, 2, 5, 7)
    epilogue = Epilogue(bias=bias, activation="gelu_tanh", gate=gate, residual=residual, text_length=2)
    epilogue.validate(Y.shape)
    assert not epilogue.empty
    found = jax.jit(apply)(epilogue, jnp.asarray(Y))
    y = wide(gelu_tanh(jnp.asarray(Y) + bias.astype(jnp.float32)))
    rows = np.where(np.arange(5)[:, None] < 2, wide(gate)[:, :1], wide(gate)[:, 1:])
    np.testing.assert_allclose(found, wide(residual) + rows * y, atol=2e-6)
    assert found.dtype == jnp.float32


def test_an_empty_epilogue_changes_nothing():
    assert Epilogue().empty
    Epilogue().validate((3,))
    np.testing.assert_array_equal(apply(Epilogue(), jnp.asarray(Y)), Y)
    np.testing.assert_array_equal(finish(jnp.asarray(Y)), Y)


@pytest.mark.parametrize("text_length", [0, 5])
def test_all_video_and_all_text(text_length):
    gate, residual = part(2, 2, 2, 7), part(3, 2, 5, 7)
    epilogue = Epilogue(gate=gate, residual=residual, text_length=text_length)
    epilogue.validate(Y.shape)
    one = wide(gate)[:, :1] if text_length else wide(gate)[:, 1:]
    np.testing.assert_allclose(apply(epilogue, jnp.asarray(Y)), wide(residual) + one * Y, atol=1e-6)
