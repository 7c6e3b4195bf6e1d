"""`weight_only_matmul`: every implementation against the exact product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import lowered

from pallas_kernels.common import device
from pallas_kernels.common import reference as codecs
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.rotate_quantize import reference as rotation
from pallas_kernels.rotate_quantize import rotate_quantize
from pallas_kernels.weight_only_matmul import pallas_triton, reference, shapes, weight_only_matmul
from pallas_kernels.weight_only_matmul.api import IMPLEMENTATIONS

F32 = np.float32
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def operands(rows, n, k, *, dtype="bfloat16", hadamard=None, scale_dims=0):
    """x [*rows, k] and a stored weight [n, k], as NumPy."""
    rng = np.random.default_rng(n + k)
    x = rng.standard_normal((*rows, k)).astype(dtype)
    values = jnp.asarray(0.02 * rng.standard_normal((n, k)), jnp.float32)
    weight, _ = rotate_quantize(values, format="nvfp4", hadamard=hadamard, scale_dims=scale_dims)
    return x, jax.tree.map(np.asarray, weight)


def parts(rows, n, dtype="bfloat16"):
    """A whole epilogue for a product [2, tokens, n] as the arguments of the operation."""
    rng = np.random.default_rng(n)
    batch, tokens = rows
    return {
        "bias": rng.standard_normal(n).astype(dtype),
        "gate": rng.standard_normal((batch, 2, n)).astype(dtype),
        "residual": rng.standard_normal((batch, tokens, n)).astype(dtype),
        "activation": "gelu_tanh",
        "text_length": tokens // 2,
    }


def as_jax(tree):
    """The same tree with JAX arrays for NumPy's."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def tolerance(x, weight, wanted):
    """Of every element: factors rounded to bfloat16 are each within 2^-9, and float32 sums far closer; the result
    rounded to bfloat16 is within 2^-8 of itself."""
    w = reference.rotate(codecs.dequantize(weight).astype(np.float64), weight.hadamard)
    return 2.0**-8 * (np.abs(x.astype(np.float64)) @ np.abs(w).T) + 2.0**-8 * np.abs(wanted) + 1e-6


def test_the_definition_multiplies_the_weight_before_its_rotation():
    """An orthonormal rotation of both factors changes no product."""
    x, weight = operands((4,), 24, 256, dtype="float32")
    rotated = rotation.rotate(x, 128).astype(np.float64) @ codecs.dequantize(weight).astype(np.float64).T
    found = reference.weight_only_matmul(x, weight, epilogue=Epilogue())
    np.testing.assert_allclose(found, rotated, atol=1e-5 * np.abs(rotated).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_the_product(shape, dtype, implementation):
    x, weight = operands((shape.rows,), shape.n, shape.k, dtype=dtype)
    wanted = reference.weight_only_matmul(x, weight, epilogue=Epilogue())
    with device.interpret():
        found = weight_only_matmul(jnp.asarray(x), as_jax(weight), implementation=implementation)
    assert found.dtype == dtype
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= tolerance(x, weight, wanted)).all()


@pytest.mark.parametrize("tokens", [5, 9])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_epilogue_and_a_tensor_scale_a_row(implementation, tokens):
    """Of few rows and of many."""
    x, weight = operands((2, tokens), 40, 128, scale_dims=1)
    arguments = parts((2, tokens), 40)
    wanted = reference.weight_only_matmul(x, weight, epilogue=Epilogue(**arguments))
    with device.interpret():
        found = weight_only_matmul(
            jnp.asarray(x),
            as_jax(weight),
            **as_jax(arguments),
            out_dtype=jnp.float32,
            implementation=implementation,
        )
    assert found.dtype == jnp.float32
    # No activation here has a slope over 1.13; the gate multiplies.
    gate = np.abs(arguments["gate"].astype(np.float64)).max()
    bound = 1.13 * gate * tolerance(x, weight, wanted) + 2.0**-8 * np.abs(wanted)
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= bound).all()


@pytest.mark.parametrize(("rows", "n", "k"), [(2, 18432, 512), (1, 71, 1920), (16, 3072, 12288)])
def test_few_rows_lower_for_an_h100(rows, n, k):
    """Two kernels: one that rotates x and one that multiplies."""
    leaf = jax.ShapeDtypeStruct
    weight = NVFP4Array(
        codes=leaf((n, k // 2), jnp.uint8),
        scales=leaf((n, k // 16), jnp.uint8),
        tensor_scale=leaf((n,), jnp.float32),
        hadamard=128,
    )

    def run(x, weight, bias, gate):
        epilogue = Epilogue(bias=bias, activation="gelu_tanh", gate=gate, residual=x[..., :1] * bias, text_length=1)
        return pallas_triton.weight_only_matmul(x, weight, epilogue=epilogue, out_dtype=jnp.bfloat16)

    x, bias, gate = (leaf(shape, jnp.bfloat16) for shape in ((1, rows, k), (n,), (1, 2, n)))
    assert lowered(run, x, weight, bias, gate).count("@__gpu$xla.gpu.triton(") == 2


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("swapped nibbles", lambda w: {"codes": (w.codes << 4) | (w.codes >> 4)}),
        ("dropped tensor scale", lambda w: {"tensor_scale": np.ones_like(w.tensor_scale)}),
        ("scales one block late", lambda w: {"scales": np.roll(w.scales, 1, -1)}),
        ("dropped rotation", lambda w: {"hadamard": 0}),
    ],
)
def test_the_tolerance_sees(name, mutate):
    x, weight = operands((3,), 40, 256)
    wanted = reference.weight_only_matmul(x, weight, epilogue=Epilogue())
    mutated = dataclasses.replace(weight, **mutate(weight))
    found = reference.weight_only_matmul(x, mutated, epilogue=Epilogue())
    assert (np.abs(found - wanted) > tolerance(x, weight, wanted)).mean() > 0.5


def test_vmap():
    x, weight = operands((4, 3), 24, 128)
    run = jax.jit(jax.vmap(lambda row: weight_only_matmul(row, as_jax(weight))))
    wanted = reference.weight_only_matmul(x, weight, epilogue=Epilogue())
    assert (np.abs(np.asarray(run(x), np.float64) - wanted) <= tolerance(x, weight, wanted)).all()


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 64), {}, r"found \(2, 64\) and \(24, 128\)"),
        ((), {}, r"found \(\) and \(24, 128\)"),
        ((0, 128), {}, r"found \(0, 128\)"),
        ((2, 128), {"bias": jnp.ones(23)}, r"\(24,\), found \(23,\)"),
        ((2, 128), {"out_dtype": jnp.int8}, "out_dtype must be of .*, found int8"),
        ((2, 128), {"activation": "relu"}, "unknown activation 'relu'"),
        ((2, 128), {"implementation": "cuda"}, "'cuda'; this version offers"),
    ],
)
def test_wrong_calls(shape, arguments, message):
    _, weight = operands((1,), 24, 128)
    with pytest.raises(ValueError, match=message):
        weight_only_matmul(jnp.ones(shape, jnp.bfloat16), as_jax(weight), **arguments)
