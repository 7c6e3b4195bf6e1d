"""`scaled_matmul`: every implementation against float64, in every type of codes and with every epilogue."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import device
from pallas_kernels.common import reference as codecs
from pallas_kernels.common.choice import choose
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CARRIERS, CarriedArray, Int8Array
from pallas_kernels.scaled_matmul import pallas_mosaic_gpu, pallas_triton, reference, scaled_matmul, shapes, xla
from pallas_kernels.scaled_matmul.api import IMPLEMENTATIONS
from pallas_kernels.scaled_matmul.shapes import Shape

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

KINDS = ("int8", *CARRIERS)
F32 = jnp.dtype("float32")
MOSAIC = (
    Shape(name="gated, tails", batch=2, tokens=136, k=640, n=320, text_length=70, gated=True),
    Shape(name="gelu", batch=1, tokens=200, k=640, n=192, text_length=0, activation="gelu_tanh"),
)
"""More steps than stages, more tiles than blocks, and a tail in both directions."""
TOLERANCE = 2e-6
"""Of |y| + 1, which y is about: float32 sums of at most 640 products of order 1, in any order, and a dozen float32
roundings after them. float32 has 1.2e-7."""


def operand(rng, shape, kind):
    scale = rng.uniform(0.5, 1.5, shape[:-1]).astype(np.float32) / np.float32(shape[-1] ** 0.25)
    if kind == "int8":
        return Int8Array(codes=rng.integers(-127, 128, shape, np.int8), scale=scale / np.float32(64))
    return CarriedArray(codes=rng.standard_normal(shape).astype(CARRIERS[kind]), scale=scale)


def problem(shape, kind, seed=0, dtype=jnp.bfloat16):
    """Operands and epilogue of a shape, in NumPy."""
    rng = np.random.default_rng(seed)
    a, b = operand(rng, (shape.batch, shape.tokens, shape.k), kind), operand(rng, (shape.n, shape.k), kind)
    parts = {"bias": (shape.n,)}
    if shape.gated:
        parts |= {"gate": (shape.batch, 2, shape.n), "residual": (shape.batch, shape.tokens, shape.n)}
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in parts.items()}
    return a, b, Epilogue(**arrays, activation=shape.activation, text_length=shape.text_length if shape.gated else 0)


def keywords(epilogue):
    return {field.name: getattr(epilogue, field.name) for field in dataclasses.fields(epilogue)}


def run(a, b, epilogue, **options):
    a, b, epilogue = jax.tree.map(jnp.asarray, (a, b, epilogue))
    return np.asarray(scaled_matmul(a, b, **keywords(epilogue), **options))


def wrong_by(found, wanted):
    return (np.abs(found - wanted) / (np.abs(wanted) + 1)).max()


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda shape: shape.name)
def test_float32_results_are_those_of_the_reference(implementation, kind, shape):
    a, b, epilogue = problem(shape, kind)
    with device.interpret():
        found = run(a, b, epilogue, out_dtype=F32, implementation=implementation)
    assert wrong_by(found, reference.scaled_matmul(a, b, epilogue=epilogue)) < TOLERANCE


@pytest.mark.parametrize("shape", MOSAIC, ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_results_of_mosaic_gpu(kind, shape):
    a, b, epilogue = problem(shape, kind, dtype=np.float32)
    with device.interpret():
        found = run(a, b, epilogue, out_dtype=F32, implementation="pallas_mosaic_gpu")
    assert wrong_by(found, reference.scaled_matmul(a, b, epilogue=epilogue)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        pallas_mosaic_gpu.Config(tile_n=240, store_n=48, cluster=2),
        pallas_mosaic_gpu.Config(tile_n=128, stages=2, slots=4, group=1),
        pallas_mosaic_gpu.Config(tile_m=256, tile_n=128, store_n=64),
    ],
    ids=str,
)
def test_configurations_of_mosaic_gpu(config):
    """In bfloat16: half a unit in the last of 8 bits, 2^-9 of |y|, and what float32 adds."""
    a, b, epilogue = problem(dataclasses.replace(MOSAIC[0], n=512), "int8")
    with device.interpret():
        found = pallas_mosaic_gpu.scaled_matmul(
            *jax.tree.map(jnp.asarray, (a, b)),
            epilogue=jax.tree.map(jnp.asarray, epilogue),
            out_dtype=jnp.dtype("bfloat16"),
            config=config,
        )
    wanted = reference.scaled_matmul(a, b, epilogue=epilogue)
    assert wrong_by(np.asarray(found, np.float64), wanted) < 2**-8 * 1.01


def test_configurations_that_would_wait_forever():
    a, b, epilogue = jax.tree.map(jnp.asarray, problem(MOSAIC[0], "int8"))
    for config in (pallas_mosaic_gpu.Config(stages=1), pallas_mosaic_gpu.Config(slots=1)):
        with device.interpret(), pytest.raises(ValueError, match="each must be at least 2"):
            pallas_mosaic_gpu.scaled_matmul(a, b, epilogue=epilogue, out_dtype=jnp.dtype("bfloat16"), config=config)


@pytest.mark.parametrize("module", [pallas_mosaic_gpu, pallas_triton])
@pytest.mark.parametrize("shape", shapes.FULL, ids=lambda shape: shape.name)
def test_candidates_begin_with_the_heuristic(module, shape):
    case = {"rows": shape.batch * shape.tokens, "n": shape.n, "k": shape.k, "itemsize": 1, "gated": shape.gated}
    configs = module.candidates(**case)
    assert configs[0] == module.heuristic(**case)
    assert len(set(configs)) == len(configs) > 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_int32_accumulators_are_exact(implementation):
    """Largest products too, which float32 could not sum; twice, with the same result."""
    shape = dataclasses.replace(MOSAIC[0], batch=1)
    a, b, _ = problem(shape, "int8")
    a.codes[0, :3], b.codes[:3] = 127, -127
    b.codes[1] = 127
    with device.interpret():
        found = [run(a, b, Epilogue(), out_dtype=jnp.int32, implementation=implementation) for _ in range(2)]
    np.testing.assert_array_equal(found[0], reference.accumulators(a, b))
    np.testing.assert_array_equal(*found)
    assert found[0][0, 0, 1] == 127 * 127 * shape.k


def test_the_reference_is_a_product_of_the_dequantised():
    for kind in KINDS:
        a, b, _ = problem(shapes.SMALL[0], kind)
        wanted = codecs.dequantize(a).astype(np.float64) @ codecs.dequantize(b).astype(np.float64).T
        np.testing.assert_allclose(reference.scaled_matmul(a, b, epilogue=Epilogue()), wanted, atol=1e-5)


MUTATIONS = {
    "a's scale dropped": lambda a, b, e: (dataclasses.replace(a, scale=np.ones_like(a.scale)), b, e),
    "b's scale of the next column": lambda a, b, e: (a, dataclasses.replace(b, scale=np.roll(b.scale, 1)), e),
    "bias dropped": lambda a, b, e: (a, b, dataclasses.replace(e, bias=None)),
    "activation dropped": lambda a, b, e: (a, b, dataclasses.replace(e, activation=None)),
    "gates swapped": lambda a, b, e: (a, b, dataclasses.replace(e, gate=e.gate[:, ::-1])),
    "gate of the other sample": lambda a, b, e: (a, b, dataclasses.replace(e, gate=e.gate[::-1])),
    "one row more of text": lambda a, b, e: (a, b, dataclasses.replace(e, text_length=e.text_length + 1)),
    "residual dropped": lambda a, b, e: (a, b, dataclasses.replace(e, residual=0 * e.residual)),
    "last value of K dropped": lambda a, b, e: (
        dataclasses.replace(a, codes=a.codes * (np.arange(a.shape[-1]) < a.shape[-1] - 1).astype(np.int8)),
        b,
        e,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tolerance_notices(name):
    shape = dataclasses.replace(shapes.SMALL[1], activation="gelu_tanh")
    wanted = reference.scaled_matmul(*problem(shape, "int8")[:2], epilogue=problem(shape, "int8")[2])
    a, b, epilogue = MUTATIONS[name](*problem(shape, "int8"))
    assert wrong_by(run(a, b, epilogue, out_dtype=F32, implementation="xla"), wanted) > 100 * TOLERANCE


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounds_once_to_every_output_type(implementation, dtype):
    """The 16-bit result is the float32 result, rounded."""
    a, b, epilogue = problem(shapes.SMALL[1], "int8")
    with device.interpret():
        wanted = run(a, b, epilogue, out_dtype=F32, implementation=implementation)
        found = run(a, b, epilogue, out_dtype=dtype, implementation=implementation)
    np.testing.assert_array_equal(found, wanted.astype(dtype))


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
def test_vmap_is_a_loop(implementation):
    a, b, epilogue = jax.tree.map(jnp.asarray, problem(shapes.SMALL[0], "int8"))
    function = functools.partial(scaled_matmul, bias=epilogue.bias, implementation=implementation)
    with device.interpret():
        mapped = jax.vmap(function, in_axes=(0, None))(a, b)
        np.testing.assert_array_equal(mapped, function(a, b))
        assert function(jax.tree.map(lambda x: x[0, 0], a), b).shape == (shapes.SMALL[0].n,)


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
def test_a_nan_poisons_its_row_or_column_alone(implementation):
    a, b, epilogue = problem(shapes.SMALL[1], "int8")
    a.scale[1, 4], b.scale[7] = np.nan, np.nan
    with device.interpret():
        found = run(a, b, epilogue, implementation=implementation)
    wanted = np.zeros(found.shape, bool)
    wanted[1, 4], wanted[:, :, 7] = True, True
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), wanted)


def lower(function, *arguments, kind="NVIDIA H100 80GB HBM3", cores=132):
    """Text of the program for a GPU that this machine need not have."""
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=gpu)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def abstract(shape, kind):
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, problem(shape, kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", [pallas_mosaic_gpu, pallas_triton])
@pytest.mark.parametrize("shape", [MOSAIC[0], MOSAIC[1], shapes.FULL[1]], ids=lambda shape: shape.name)
def test_lowers_for_an_h100(module, kind, shape):
    if shape is shapes.FULL[1]:
        a = jax.eval_shape(lambda: operand_like(kind, (shape.batch, shape.tokens, shape.k)))
        b = jax.eval_shape(lambda: operand_like(kind, (shape.n, shape.k)))
        epilogue = Epilogue()
    else:
        a, b, epilogue = abstract(shape, kind)
    function = functools.partial(module.scaled_matmul, out_dtype=jnp.dtype("bfloat16"))
    text = lower(lambda a, b, epilogue: function(a, b, epilogue=epilogue), a, b, epilogue)
    assert ("mosaic_gpu" if module is pallas_mosaic_gpu else "triton") in text
    batched = jax.vmap(lambda a, b, epilogue: function(a, b, epilogue=epilogue), in_axes=(0, None, None))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), a)
    assert lower(batched, stacked, b, epilogue)


def operand_like(kind, shape):
    scale = jnp.ones(shape[:-1])
    if kind == "int8":
        return Int8Array(codes=jnp.ones(shape, jnp.int8), scale=scale)
    return CarriedArray(codes=jnp.ones(shape, CARRIERS[kind]), scale=scale)


@pytest.mark.parametrize("kind", ["int8", "exact"])
def test_triton_lowers_for_an_a100(kind):
    a, b, epilogue = abstract(shapes.SMALL[3], kind)
    function = functools.partial(pallas_triton.scaled_matmul, out_dtype=jnp.dtype("bfloat16"))
    assert "triton" in lower(
        lambda a, b, epilogue: function(a, b, epilogue=epilogue), a, b, epilogue, kind="NVIDIA A100", cores=108
    )


@pytest.mark.parametrize(
    ("capability", "shape", "kind", "taken"),
    [
        ("9.0", MOSAIC[0], "int8", pallas_mosaic_gpu),
        ("9.0", MOSAIC[0], "fp8", pallas_mosaic_gpu),
        ("9.0", shapes.SMALL[0], "int8", pallas_triton),
        ("9.0", shapes.SMALL[0], "fp8", xla),
        ("8.0", MOSAIC[0], "int8", pallas_triton),
        ("8.0", MOSAIC[0], "fp8", xla),
        ("8.9", MOSAIC[0], "fp8", pallas_triton),
        ("7.5", MOSAIC[0], "int8", xla),
    ],
)
def test_what_none_takes(monkeypatch, capability, shape, kind, taken):
    gpu = types.SimpleNamespace(device_kind="NVIDIA GPU", compute_capability=capability, core_count=132)
    monkeypatch.setattr(device, "default_device", lambda: gpu)
    a, b, epilogue = problem(shape, kind)
    call = {"epilogue": epilogue, "out_dtype": jnp.dtype("bfloat16")}
    assert choose("scaled_matmul", IMPLEMENTATIONS, None, a, b, **call) is taken.scaled_matmul


@pytest.mark.parametrize("implementation", ["pallas_triton", "pallas_mosaic_gpu"])
def test_a_named_implementation_runs_or_is_an_error(implementation):
    with pytest.raises(NotImplementedError, match=rf"{implementation}.*compute capability .*device is 'cpu'"):
        run(*problem(MOSAIC[0], "int8"), implementation=implementation)


def test_mosaic_gpu_says_what_does_not_fit():
    with device.interpret():
        for change, message in (
            ({"k": 100}, r"multiples of 128 bytes.*K = 100 of 1 bytes"),
            ({"tokens": 131}, "131 rows"),
            ({"n": 96, "batch": 1}, "N = 96"),
            ({"k": 256}, "K = 256"),
        ):
            with pytest.raises(NotImplementedError, match=message):
                run(*problem(dataclasses.replace(MOSAIC[0], **change), "int8"), implementation="pallas_mosaic_gpu")
        with pytest.raises(NotImplementedError, match="residual is bfloat16, and the result float32"):
            run(*problem(MOSAIC[0], "int8"), implementation="pallas_mosaic_gpu", out_dtype=F32)


def test_wrong_calls():
    a, b, epilogue = jax.tree.map(jnp.asarray, problem(shapes.SMALL[1], "int8"))
    carried = jax.tree.map(jnp.asarray, problem(shapes.SMALL[1], "exact"))
    fp8 = jax.tree.map(jnp.asarray, problem(shapes.SMALL[1], "fp8"))
    shorter = dataclasses.replace(b, codes=b.codes[:, 1:])
    parts = {"gate": epilogue.gate, "residual": epilogue.residual}
    one_sample = {name: array[:1] for name, array in parts.items()}
    for arguments, options, message in (
        ((a, carried[1]), {}, "Int8Array of int8 and CarriedArray of bfloat16"),
        ((carried[0], fp8[1]), {}, "bfloat16 and CarriedArray of float8_e4m3fn"),
        ((a, shorter), {}, r"\(2, 37, 64\) and \(64, 63\)"),
        ((a, a), {}, r"b \[N, K\], found"),
        ((a, dataclasses.replace(b, hadamard=64)), {}, "hadamard=0 and hadamard=64"),
        ((a, dataclasses.replace(b, scale=b.scale[1:])), {}, r"one scale a row, \(64,\), found \(63,\)"),
        ((a, b), {"out_dtype": "int8"}, "out_dtype must be one of .*found int8"),
        ((a, b), {"out_dtype": "int32", "bias": epilogue.bias}, "takes no epilogue"),
        (carried[:2], {"out_dtype": "int32"}, "accumulators of int8 codes"),
        ((a, b), {"bias": epilogue.bias[1:]}, r"bias must be \[N\] = \(64,\), found \(63,\)"),
        ((a, b), {"activation": "gelu"}, "unknown activation 'gelu'"),
        ((a, b), {"gate": epilogue.gate}, "gate and residual go together"),
        ((a, b), {**parts, "text_length": 38}, "text_length=38 must be 0 to 37"),
        (
            (a, b),
            one_sample,
            r"gate must be \[batch, 2, N\] = \(2, 2, 64\)",
        ),
        ((a, b), {"text_length": 3}, "text_length=3 is about the rows of a gate"),
        ((a, b), {"implementation": "cutlass"}, "'cutlass'; this version offers pallas_mosaic_gpu, pallas_triton, xla"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled_matmul(*arguments, **options)
