"""`nvfp4_matmul`: packed operands in, the product of what their codes stand for out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import device
from pallas_kernels.common import reference as codecs
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.nvfp4_matmul import nvfp4_matmul, reference, xla
from pallas_kernels.rotate_quantize import rotate_quantize

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

BATCH, TOKENS, K, N = 2, 21, 256, 48
TOLERANCE = 2e-6
"""Of |y| + 1: as for `scaled_matmul`, whose products these are."""


def quantized(seed, *shape, scale_dims=0, hadamard=None):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    return rotate_quantize(x, format="nvfp4", scale_dims=scale_dims, hadamard=hadamard)[0]


A, B = quantized(0, BATCH, TOKENS, K, scale_dims=2), quantized(1, N, K)


def parts():
    rng = np.random.default_rng(2)
    shapes = {"bias": (N,), "gate": (BATCH, 2, N), "residual": (BATCH, TOKENS, N)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for name, shape in shapes.items()}
    return {**arrays, "activation": "gelu_tanh", "text_length": 4}


def wanted(a, b, carrier, **epilogue):
    return reference.nvfp4_matmul(*jax.tree.map(np.asarray, (a, b)), carrier=carrier, epilogue=Epilogue(**epilogue))


def wrong_by(found, wanted):
    return (np.abs(np.asarray(found) - wanted) / (np.abs(wanted) + 1)).max()


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
@pytest.mark.parametrize("carrier", ["exact", "fp8"])
def test_equals_the_reference(carrier, implementation):
    with device.interpret():
        found = nvfp4_matmul(A, B, carrier=carrier, **parts(), out_dtype="float32", implementation=implementation)
    assert wrong_by(found, wanted(A, B, carrier, **parts())) < TOLERANCE


@pytest.mark.parametrize("carrier", ["exact", "fp8", "native"])
def test_the_reference_is_a_product_of_the_dequantised(carrier):
    """exact and native but for float32 roundings; fp8 but for 2^-4 a value, which averages out."""
    product = codecs.dequantize(A).astype(np.float64) @ codecs.dequantize(B).astype(np.float64).T
    error = np.linalg.norm(wanted(A, B, carrier) - product) / np.linalg.norm(product)
    assert error < (0.05 if carrier == "fp8" else 1e-6)
    assert carrier != "fp8" or error > 0.005


def test_the_native_product_is_the_exact_one():
    """XLA decodes where there is no such instruction, so what is around it can be checked anywhere."""
    found = xla.native(A, B, epilogue=Epilogue(**parts()), out_dtype=jnp.dtype("float32"))
    assert wrong_by(found, wanted(A, B, "native", **parts())) < TOLERANCE
    # Mutations: nibbles swapped, tensor scale dropped.
    for wrong in (
        dataclasses.replace(A, codes=(A.codes >> 4) | (A.codes << 4)),
        dataclasses.replace(A, tensor_scale=jnp.ones_like(A.tensor_scale)),
    ):
        found = xla.native(wrong, B, epilogue=Epilogue(**parts()), out_dtype=jnp.dtype("float32"))
        assert wrong_by(found, wanted(A, B, "native", **parts())) > 1000 * TOLERANCE


def test_native_is_refused_but_on_blackwell():
    for implementation in (None, "xla"):
        with pytest.raises(NotImplementedError, match=r"compute capability 10.0 or newer; the default device is 'cpu'"):
            nvfp4_matmul(A, B, carrier="native", implementation=implementation)


def test_native_lowers_for_a_b200():
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA B200", num_cores=148, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=gpu)):
        traced = xla.native.trace(A, B, epilogue=Epilogue(**parts()), out_dtype=jnp.dtype("bfloat16"))
        assert "f4E2M1FN" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_wrong_calls():
    for arguments, options, message in (
        ((A, B), {"carrier": "fp4"}, "unknown carrier 'fp4'; carriers are exact, fp8, native"),
        ((A, A), {}, r"b \[N, K\], found \(2, 21, 256\) and \(2, 21, 256\)"),
        ((A, quantized(1, N, 128)), {}, r"\(2, 21, 256\) and \(48, 128\)"),
        ((A, quantized(1, N, K, hadamard=64)), {}, "hadamard=128 and hadamard=64"),
        ((A, B), {"out_dtype": "int32"}, "found int32"),
        ((A, B), {"bias": jnp.ones(N - 1)}, r"bias must be \[N\] = \(48,\)"),
        ((A, B), {"carrier": "native", "bias": jnp.ones(N - 1)}, r"bias must be \[N\] = \(48,\)"),
        ((A, B), {"implementation": "cutlass"}, "unknown implementation 'cutlass'"),
        ((A, B), {"carrier": "native", "implementation": "pallas_triton"}, "unknown implementation 'pallas_triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            nvfp4_matmul(*arguments, **options)
