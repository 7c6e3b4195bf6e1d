"""The cast of a stored NVFP4 weight to INT8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import reference as codecs
from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.rotate_quantize import rotate_quantize
from pallas_kernels.weight_to_int8 import reference, weight_to_int8
from pallas_kernels.weight_to_int8.api import IMPLEMENTATIONS

F32 = np.float32


def stored(shape=(24, 256), *, seed=0, scale=0.02, hadamard=128, scale_dims=0):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    array, _ = rotate_quantize(
        jnp.asarray(values, jnp.float32), format="nvfp4", hadamard=hadamard, scale_dims=scale_dims
    )
    return jax.tree.map(np.asarray, array)


def random_bytes(tensor_scale):
    """Any checkpoint bytes: every code, every scale byte, negative and NaN scales too."""
    rng = np.random.default_rng(1)
    return NVFP4Array(
        codes=rng.integers(0, 256, (64, 64), np.uint8),
        scales=rng.permuted(np.arange(256, dtype=np.uint8)).repeat(2).reshape(64, 8),
        tensor_scale=np.asarray(tensor_scale, F32),
    )


def equal(found, wanted):
    return (
        np.asarray(found.codes).tobytes() == wanted.codes.tobytes()
        and np.array_equal(found.scale, wanted.scale, equal_nan=True)
        and found.hadamard == wanted.hadamard
    )


WEIGHTS = {
    "normal": stored(),
    "small": stored(scale=1e-20),
    "blocks of 32": stored((5, 96), hadamard=32),
    "stacked layers": stored((3, 8, 128), scale_dims=1),
    "zero": stored(scale=0.0),
    "any bytes": random_bytes(1e-3),
    "any bytes, smallest tensor scale": random_bytes(2.0**-100),
    "all zero bytes": NVFP4Array(
        codes=np.zeros((4, 8), np.uint8), scales=np.zeros((4, 1), np.uint8), tensor_scale=np.ones((), F32)
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_reference_in_every_byte(implementation, name):
    weight = jax.tree.map(jnp.asarray, WEIGHTS[name])
    found = weight_to_int8(weight, implementation=implementation)
    found.validate()
    assert equal(found, reference.weight_to_int8(WEIGHTS[name]))


def test_vmap_over_stacked_layers_is_the_same():
    weight = jax.tree.map(jnp.asarray, WEIGHTS["stacked layers"])
    assert equal(jax.jit(jax.vmap(weight_to_int8))(weight), reference.weight_to_int8(WEIGHTS["stacked layers"]))


def test_within_half_a_step_of_the_stored_weight():
    """Half a step of the output channel's scale, and 1e-5 of a step for float32 roundings."""
    weight = WEIGHTS["normal"]
    cast = reference.weight_to_int8(weight)
    error = np.abs(codecs.dequantize(cast) - codecs.dequantize(weight))
    assert (error <= cast.scale[:, None] * (0.5 + 1e-5)).all()
    assert np.abs(cast.codes).max(-1).min() == 127
    # Mutations: dropped tensor scale, one scale for all channels.
    for wrong in (cast.scale / weight.tensor_scale, np.full_like(cast.scale, cast.scale.mean())):
        mutated = codecs.dequantize(dataclasses.replace(cast, scale=wrong))
        assert not (np.abs(mutated - codecs.dequantize(weight)) <= cast.scale[:, None] * (0.5 + 1e-5)).all()


def test_codes_do_not_depend_on_the_tensor_scale():
    one, other = (reference.weight_to_int8(random_bytes(scale)) for scale in (1, 0.37))
    np.testing.assert_array_equal(one.codes, other.codes)


def test_a_nan_scale_poisons_its_output_channel_alone():
    weight = jax.tree.map(jnp.asarray, stored())
    scale = weight_to_int8(dataclasses.replace(weight, scales=weight.scales.at[3, 1].set(0x7F))).scale
    assert np.isnan(scale[3])
    assert np.isfinite(np.delete(scale, 3)).all()


def test_wrong_calls():
    weight = jax.tree.map(jnp.asarray, stored())
    with pytest.raises(ValueError, match="'pallas_triton'; this version offers xla"):
        weight_to_int8(weight, implementation="pallas_triton")
    with pytest.raises(ValueError, match=r"scales must be \[..., K/16\] = \(24, 16\), found \(24, 8\)"):
        weight_to_int8(dataclasses.replace(weight, scales=weight.scales[:, :8]))
    assert isinstance(weight_to_int8(weight), Int8Array)
