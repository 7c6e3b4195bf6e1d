"""NVFP4 against JAX's own block-scaled product, `jax.nn.scaled_dot_general`, which shares no code with ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import reference as codecs
from pallas_kernels.rotate_quantize import rotate_quantize

F32 = np.float32


def scaled_dot(x, weight, x_scale, weight_scale):
    """x [M, K] times weight [N, K], both quantised by JAX with these tensor scales; float32 [M, N]."""
    configs = [
        jax.nn.get_scaled_dot_general_config("nvfp4", global_scale=jnp.asarray([scale], jnp.float32))
        for scale in (x_scale, weight_scale, 1)
    ]
    with jax.numpy_dtype_promotion("standard"):
        product = jax.nn.scaled_dot_general(
            jnp.asarray(x)[None], jnp.asarray(weight)[None], (((2,), (2,)), ((0,), (0,))), jnp.float32, configs
        )
    return np.asarray(product)[0]


@pytest.mark.parametrize("draw", ["standard_normal", "laplace"])
@pytest.mark.parametrize("tensor_scale", [2.0**-9, 2.0**-6])
def test_same_codes_and_scales(draw, tensor_scale):
    """With a power of two as tensor scale, and 6 times the identity (which NVFP4 holds exactly) as the other operand,
    the product is 6 * E2M1 * E4M3 * tensor scale without any rounding: equal products are equal codes and scales."""
    x = getattr(np.random.default_rng(0), draw)(size=(32, 128)).astype(F32)
    array, _ = rotate_quantize(jnp.asarray(x), format="nvfp4", hadamard=0, tensor_scale=jnp.float32(tensor_scale))
    wanted = scaled_dot(x, 6 * np.eye(128, dtype=F32), tensor_scale, 1)
    np.testing.assert_array_equal(6 * codecs.dequantize(array), wanted)


def quantised_pair():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((16, 256)) * np.where(rng.random(256) < 0.03, 30, 1)).astype(F32)
    weight = (0.02 * rng.standard_normal((48, 256))).astype(F32)
    return x, weight, *(rotate_quantize(jnp.asarray(v), format="nvfp4", hadamard=0)[0] for v in (x, weight))


BOUND = 2e-6
"""Relative L2 of a product of 256 terms: float32 accumulation. JAX divides by the tensor scale where we multiply by its
reciprocal; one code that it rounded to the other side of a midpoint would not pass, and there is none here."""


def product_error(array, other, wanted):
    product = codecs.dequantize(array).astype(np.float64) @ codecs.dequantize(other).astype(np.float64).T
    return np.linalg.norm(product - wanted) / np.linalg.norm(wanted)


def test_same_product():
    x, weight, x_array, weight_array = quantised_pair()
    wanted = scaled_dot(x, weight, x_array.tensor_scale, weight_array.tensor_scale)
    assert product_error(x_array, weight_array, wanted) <= BOUND


@pytest.mark.parametrize("mutation", ["swapped nibbles", "dropped tensor scale", "wrong axis"])
def test_the_bound_fails_on(mutation):
    x, weight, x_array, weight_array = quantised_pair()
    wanted = scaled_dot(x, weight, x_array.tensor_scale, weight_array.tensor_scale)
    match mutation:
        case "swapped nibbles":
            mutated = {"codes": (x_array.codes << 4) | (x_array.codes >> 4)}
        case "dropped tensor scale":
            mutated = {"tensor_scale": jnp.ones_like(x_array.tensor_scale)}
        case "wrong axis":
            turned, _ = rotate_quantize(jnp.asarray(x.T), format="nvfp4", hadamard=0)
            mutated = {"codes": codecs.pack(codecs.unpack(np.asarray(turned.codes)).T)}
    assert product_error(type(x_array)(**(vars(x_array) | mutated)), weight_array, wanted) > 100 * BOUND
