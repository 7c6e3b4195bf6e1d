"""The casts of a packed NVFP4 array: every implementation against the definition; the definition against its aims."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import lowered

from pallas_kernels.common import device
from pallas_kernels.common import reference as codecs
from pallas_kernels.common.formats import CARRIERS, CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.nvfp4_cast import cast, pallas_triton, reference, xla
from pallas_kernels.rotate_quantize import reference as rotation
from pallas_kernels.rotate_quantize import rotate_quantize

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


def same_bytes(found, wanted):
    """Of two arrays; one NaN of a float32 or bfloat16 is as good as another."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    if wanted.dtype.name in ("float32", "bfloat16"):
        nan = np.isnan(wanted)
        return np.array_equal(np.isnan(found), nan) and found[~nan].tobytes() == wanted[~nan].tobytes()
    return found.tobytes() == wanted.tobytes()


def equal(found, wanted):
    if type(wanted) is np.ndarray:
        return same_bytes(found, wanted)
    return (
        type(found) is type(wanted)
        and same_bytes(found.codes, wanted.codes)
        and same_bytes(found.scale, wanted.scale)
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


pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
to_each = pytest.mark.parametrize("to", reference.TARGETS)


@to_each
@pytest.mark.parametrize("name", WEIGHTS)
def test_xla_equals_the_reference_in_every_byte(name, to):
    found = cast(jax.tree.map(jnp.asarray, WEIGHTS[name]), to=to, implementation="xla")
    if to != "bfloat16":
        found.validate()
    assert equal(found, reference.cast(WEIGHTS[name], to=to))


@to_each
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "small"])
def test_triton_equals_the_reference_in_every_byte(name, to):
    """A tile of 2 rows and 128 columns, which leaves tails of both; interpreted, sums of a rotation are exact."""
    with device.interpret():
        config = pallas_triton.Config(rows=16 if to == "bfloat16" else 2, columns=128, num_warps=4)
        found = pallas_triton.cast(jax.tree.map(jnp.asarray, WEIGHTS[name]), to=to, config=config)
    assert equal(found, reference.cast(WEIGHTS[name], to=to))


@to_each
@pytest.mark.parametrize("shape", [(3072, 12288), (71, 1920)])
def test_triton_lowers_for_an_h100(shape, to):
    """One kernel each; every candidate of a configuration too."""
    (n, k), leaf = shape, jax.ShapeDtypeStruct
    weight = NVFP4Array(
        codes=leaf((n, k // 2), jnp.uint8),
        scales=leaf((n, k // 16), jnp.uint8),
        tensor_scale=leaf((), jnp.float32),
        hadamard=128,
    )
    for config in [None, *pallas_triton.candidates(to=to, n=n, k=k)[:: 1 if n == 71 else 100]]:
        text = lowered(lambda w, config=config: pallas_triton.cast(w, to=to, config=config), weight)
        assert text.count("@__gpu$xla.gpu.triton(") == 1


@to_each
def test_vmap_over_stacked_layers_is_the_same(to):
    weight = jax.tree.map(jnp.asarray, WEIGHTS["stacked layers"])
    found = jax.jit(jax.vmap(lambda w: cast(w, to=to)))(weight)
    assert equal(found, reference.cast(WEIGHTS["stacked layers"], to=to))


def test_int8_is_within_half_a_step_of_the_stored_weight():
    """Half a step of the output channel's scale, and 1e-5 of a step for float32 roundings."""
    weight = WEIGHTS["normal"]
    found = reference.cast(weight, to="int8")
    error = np.abs(codecs.dequantize(found) - codecs.dequantize(weight))
    assert (error <= found.scale[:, None] * (0.5 + 1e-5)).all()
    assert np.abs(found.codes).max(-1).min() == 127
    # Mutations: dropped tensor scale, one scale for all channels.
    for wrong in (found.scale / weight.tensor_scale, np.full_like(found.scale, found.scale.mean())):
        mutated = codecs.dequantize(dataclasses.replace(found, scale=wrong))
        assert not (np.abs(mutated - codecs.dequantize(weight)) <= found.scale[:, None] * (0.5 + 1e-5)).all()


def test_the_exact_carrier_is_exact():
    for weight in (WEIGHTS["normal"], random_bytes(0.37)):
        found = codecs.dequantize(reference.cast(weight, to="exact"))
        assert same_bytes(found, codecs.dequantize(weight))


def test_the_fp8_carrier_rounds_once_more():
    """By 1/16 of the value, or half of the step near zero, 2^-10 of an eighth of a code unit."""
    weight = random_bytes(0.37)
    exact, found = codecs.dequantize(weight), codecs.dequantize(reference.cast(weight, to="fp8"))
    assert np.array_equal(np.isnan(found), np.isnan(exact))
    finite = np.isfinite(exact)
    bound = np.maximum(np.abs(exact) / 16, 8 * 2.0**-10 * 0.37)[finite]
    assert (np.abs(found - exact)[finite] <= bound).all()
    # Mutations: a shift that overflows, one that was forgotten on the way back.
    assert not np.isfinite((codecs.in_code_units(weight)[finite] / 4).astype(CARRIERS["fp8"]).astype(F32)).all()
    assert not (np.abs(found / 8 - exact)[finite] <= bound).all()


def test_every_product_of_a_code_and_a_scale_rounds_to_e4m3_as_ml_dtypes_does():
    units = np.float32(np.arange(-16, 17)[:, None] * 2.0**-10 * np.arange(1, 2**12, dtype=F32))
    units = np.concatenate([units.ravel(), codecs.E2M1_TABLE[:, None] * codecs.E4M3_TABLE], None).astype(F32) / 8
    units = units[np.abs(units) <= 448]
    found = jax.jit(xla.encode_e4m3)(units)
    np.testing.assert_array_equal(found, units.astype(CARRIERS["fp8"]).view(np.uint8))
    np.testing.assert_array_equal(xla.encode_e4m3(jnp.asarray([np.nan, -np.nan], jnp.float32)), [0x7F, 0x7F])


def test_bfloat16_is_the_weight_before_its_rotation():
    """Its own rotation undone: within a rounding to bfloat16 of the float64 inverse."""
    weight = WEIGHTS["normal"]
    matrix = rotation.rotate(np.eye(128, dtype=F32), 128).astype(np.float64)
    exact = (codecs.dequantize(weight).astype(np.float64).reshape(-1, 128) @ matrix).reshape(weight.shape)
    found = reference.cast(weight, to="bfloat16").astype(np.float64)
    assert (np.abs(found - exact) <= np.abs(exact) * 2.0**-8 + 1e-7).all()
    assert not (np.abs(codecs.dequantize(weight) - exact) <= np.abs(exact) * 2.0**-8 + 1e-7).any(-1).all()


def test_codes_do_not_depend_on_the_tensor_scale():
    for to in ("int8", "exact", "fp8"):
        one, other = (reference.cast(random_bytes(scale), to=to) for scale in (1, 0.37))
        assert same_bytes(one.codes, other.codes)


def test_a_nan_scale_poisons_its_output_channel_alone():
    weight = jax.tree.map(jnp.asarray, stored())
    scale = cast(dataclasses.replace(weight, scales=weight.scales.at[3, 1].set(0x7F)), to="int8").scale
    assert np.isnan(scale[3])
    assert np.isfinite(np.delete(scale, 3)).all()


def test_wrong_calls():
    weight = jax.tree.map(jnp.asarray, stored())
    with pytest.raises(ValueError, match="unknown target 'int4'; targets are int8, exact, fp8, bfloat16"):
        cast(weight, to="int4")
    with pytest.raises(ValueError, match="'cuda'; this version offers "):
        cast(weight, to="int8", implementation="cuda")
    with pytest.raises(ValueError, match=r"scales must be \[..., K/16\] = \(24, 16\), found \(24, 8\)"):
        cast(dataclasses.replace(weight, scales=weight.scales[:, :8]), to="int8")
    with pytest.raises(ValueError, match="2 rows and 8 blocks is less than a block a thread of num_warps=4"):
        pallas_triton.cast(weight, to="int8", config=pallas_triton.Config(rows=2, columns=128, num_warps=4))
    assert isinstance(cast(weight, to="int8"), Int8Array)
    assert isinstance(cast(weight, to="fp8"), CarriedArray)
