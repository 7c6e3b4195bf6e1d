"""Every implementation on a GPU: the definitions, bit for bit where they say so, on sizes that no tile divides; real
shapes against XLA; the same bits twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import workloads
from pallas_kernels.adaln_quantize import adaln_quantize
from pallas_kernels.adaln_quantize import reference as adaln_reference
from pallas_kernels.adaln_quantize.api import IMPLEMENTATIONS as ADALN
from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common import reference as codecs
from pallas_kernels.common.choice import Implementation
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CARRIERS, CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.nvfp4_cast import cast
from pallas_kernels.nvfp4_cast import reference as cast_reference
from pallas_kernels.nvfp4_cast.api import IMPLEMENTATIONS as CASTS
from pallas_kernels.rotate_quantize import reference as rotate_reference
from pallas_kernels.rotate_quantize import rotate_quantize
from pallas_kernels.rotate_quantize.api import IMPLEMENTATIONS as ROTATIONS
from pallas_kernels.scaled_matmul import reference as matmul_reference
from pallas_kernels.scaled_matmul import scaled_matmul
from pallas_kernels.scaled_matmul.api import IMPLEMENTATIONS as MATMULS
from pallas_kernels.weight_only_matmul import reference as weight_only_reference
from pallas_kernels.weight_only_matmul import weight_only_matmul
from pallas_kernels.weight_only_matmul.api import IMPLEMENTATIONS as WEIGHT_ONLY

TARGETS = {
    "int8": {"format": "int8"},
    "nvfp4": {"format": "nvfp4", "scale_dims": 1},
    "nvfp4, one scale": {"format": "nvfp4"},
    "nvfp4 4/6": {"format": "nvfp4", "scale_dims": 1, "four_over_six": True},
    "fp8": {"format": "nvfp4", "scale_dims": 1, "carrier": "fp8"},
    "exact": {"format": "nvfp4", "scale_dims": 1, "carrier": "exact"},
}
each_target = pytest.mark.parametrize("target", TARGETS)


def skip_if_refused(table, name, *args, **kwargs):
    """Skips, with its reason, what an implementation says it can't do; that says so is tested elsewhere."""
    found = table[name]
    reason = found.refusal(*args, **kwargs) if isinstance(found, Implementation) else None
    if reason is not None:
        pytest.skip(reason)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def same_bits(found, wanted):
    """Whether all arrays of two trees have the same bytes, NaN of a float type being one value."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.kind == "f" or a.dtype.name in ("bfloat16", "float8_e4m3fn"):
            nan = np.isnan(b.astype(np.float32))
            if not np.array_equal(np.isnan(a.astype(np.float32)), nan):
                return False
            a, b = a[~nan], b[~nan]
        if a.tobytes() != b.tobytes():
            return False
    return True


def any_bytes(n, k, hadamard=0, leading=()):
    """Every code and every scale byte there is, NaN and negative ones too."""
    rng = np.random.default_rng(n + k)
    return NVFP4Array(
        codes=jnp.asarray(rng.integers(0, 256, (n, k // 2), np.uint8)),
        scales=jnp.asarray(rng.integers(0, 256, (n, k // 16), np.uint8)),
        tensor_scale=jnp.asarray(rng.uniform(1e-4, 1e-2, leading), jnp.float32),
        hadamard=hadamard,
    )


def stored(n, k, hadamard=128, **options):
    values = 0.02 * np.random.default_rng(n + k).standard_normal((n, k))
    array, _ = rotate_reference.rotate_quantize(values.astype(np.float32), format="nvfp4", hadamard=hadamard, **options)
    return jax.tree.map(jnp.asarray, array)


WEIGHTS = {
    "tails": lambda: stored(67, 1920),
    "a tensor scale a row": lambda: stored(131, 3072, scale_dims=1),
    "wide": lambda: stored(5, 12288),
    "blocks of 64": lambda: stored(33, 192, hadamard=64),
    "blocks of 32": lambda: stored(5, 96, hadamard=32),
    "not rotated": lambda: stored(9, 48, hadamard=0),
    "any bytes": lambda: any_bytes(64, 512),
    "any bytes, rotated": lambda: any_bytes(7, 384, 128, (7,)),
}


@pytest.mark.parametrize("to", cast_reference.TARGETS)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("implementation", CASTS)
def test_cast_is_the_reference(implementation, name, to):
    weight = WEIGHTS[name]()
    skip_if_refused(CASTS, implementation, weight, to=to)
    found = as_numpy(cast(weight, to=to, implementation=implementation))
    wanted = cast_reference.cast(as_numpy(weight), to=to)
    if implementation == "xla" and to == "int8":
        # XLA's division is not correctly rounded here: some codes at the middle between two are the other one.
        off = np.abs(found.codes.astype(np.int32) - wanted.codes)
        assert off.max() <= 1
        assert (off > 0).mean() < 0.02
        np.testing.assert_array_equal(found.scale, wanted.scale)
    elif to == "bfloat16" and weight.hadamard:
        # A sum of 128 of more than 24 bits may round otherwise, and fall to the other side of a bfloat16.
        a, b = found.astype(np.float32), wanted.astype(np.float32)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        units = codecs.in_code_units(as_numpy(weight))
        norms = np.linalg.norm(np.nan_to_num(units).reshape(len(units), -1, weight.hadamard), axis=-1)
        scale = np.broadcast_to(np.asarray(weight.tensor_scale), units.shape[:1])[:, None]
        room = 2.0**-8 * np.abs(b) + np.repeat(norms * scale * 2.0**-20, weight.hadamard, -1)
        assert (np.nan_to_num(np.abs(a - b)) <= np.nan_to_num(room)).all()
        assert np.nanmean(a != b) < 0.3
    else:
        assert same_bits(found, wanted)


def exact_rows(rows, size, dtype="bfloat16"):
    """Rows whose rotation is exact: small integers."""
    rng = np.random.default_rng(rows + size)
    values = rng.integers(-8, 9, (rows, size)) * 2.0 ** rng.integers(-20, 20, (rows, 1))
    return values.astype(dtype)


@each_target
@pytest.mark.parametrize(
    ("rows", "size"), [(67, 1920), (131, 3072), (136, 3072), (35, 12288), (34, 12288), (7, 192), (3, 96)]
)
@pytest.mark.parametrize("implementation", ROTATIONS)
def test_rotate_quantize_is_the_reference(implementation, rows, size, target):
    """Up to XLA's own division, see the cast; an exact rotation leaves everything else to the bit."""
    x = exact_rows(rows, size)
    hadamard = next(block for block in (128, 64, 32) if size % block == 0)
    options = TARGETS[target]
    skip_if_refused(ROTATIONS, implementation, x, **options, hadamard=hadamard)
    found, statistics = rotate_quantize(jnp.asarray(x), **options, implementation=implementation)
    wanted, wanted_statistics = rotate_reference.rotate_quantize(x, **options, hadamard=hadamard)
    np.testing.assert_array_equal(statistics.max_abs, wanted_statistics.max_abs)
    np.testing.assert_allclose(statistics.sum_abs, wanted_statistics.sum_abs, rtol=1e-5)
    if implementation == "xla":
        assert np.mean(np.asarray(found.codes) != wanted.codes) < 0.02
    else:
        assert same_bits(found, wanted)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("implementation", ROTATIONS)
def test_a_carrier_is_the_cast_of_the_packed_array(implementation, carrier):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((67, 3072)), jnp.bfloat16)
    options = {"format": "nvfp4", "scale_dims": 1}
    skip_if_refused(ROTATIONS, implementation, x, **options, hadamard=128)
    array, _ = rotate_quantize(x, **options, implementation=implementation)
    carried, _ = rotate_quantize(x, **options, carrier=carrier, implementation=implementation)
    assert same_bits(carried, cast(array, to=carrier))


@each_target
@pytest.mark.parametrize(("tokens", "dim"), [(37, 1920), (67, 3072), (40, 1920), (72, 3072)])
@pytest.mark.parametrize("implementation", ADALN)
def test_adaln_quantize_is_near_the_reference(implementation, tokens, dim, target):
    options = {name: value for name, value in TARGETS[target].items() if name != "scale_dims"}
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((2, tokens, dim)).astype("bfloat16")
    vectors = {name: rng.standard_normal(dim).astype("bfloat16") for name in ("norm_scale", "norm_bias")}
    vectors |= {name: rng.standard_normal((2, 2, dim)).astype("bfloat16") for name in ("shift", "scale")}
    static = {"text_length": 11, "epsilon": 1e-5}
    norm = AdaptiveNorm(**vectors, **static)
    skip_if_refused(ADALN, implementation, x, norm, **options, hadamard=128)
    on_device = {name: jnp.asarray(value) for name, value in vectors.items()}
    found, _ = adaln_quantize(jnp.asarray(x), **on_device, **static, **options, implementation=implementation)
    wanted, _ = adaln_reference.adaln_quantize(x, norm, **options, hadamard=128)
    a, b = codecs.dequantize(as_numpy(found)), codecs.dequantize(wanted)
    assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


def matmul_operands(kind, rows, n, k):
    rng = np.random.default_rng((*rows, n))

    def operand(shape):
        scale = rng.uniform(0.5, 1.5, shape[:-1]).astype(np.float32) / np.float32(np.sqrt(k))
        if kind == "int8":
            return Int8Array(codes=rng.integers(-127, 128, shape, np.int8), scale=scale)
        return CarriedArray(codes=rng.standard_normal(shape).astype(CARRIERS[kind]), scale=scale)

    return operand(rows), operand((n, k))


@pytest.mark.parametrize(("rows", "n", "k"), [((2, 67), 3072, 3072), ((131,), 1920, 7680), ((2, 129), 136, 1920)])
@pytest.mark.parametrize("implementation", MATMULS)
def test_int32_accumulators_are_exact(implementation, rows, n, k):
    a, b = matmul_operands("int8", (*rows, k), n, k)
    call = {"epilogue": Epilogue(), "out_dtype": jnp.dtype("int32")}
    skip_if_refused(MATMULS, implementation, a, b, **call)
    a, b = jax.tree.map(jnp.asarray, (a, b))
    found = scaled_matmul(a, b, out_dtype=jnp.int32, implementation=implementation)
    # Exact in float64, and quicker.
    wanted = np.asarray(a.codes, np.float64) @ np.asarray(b.codes, np.float64).T
    np.testing.assert_array_equal(found, wanted.astype(np.int32))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["int8", *CARRIERS])
@pytest.mark.parametrize(("tokens", "n", "k"), [(67, 3072, 3072), (136, 1920, 7680)])
@pytest.mark.parametrize("implementation", MATMULS)
def test_matmul_and_epilogue_are_near_float64(implementation, tokens, n, k, kind, gated):
    a, b = matmul_operands(kind, (2, tokens, k), n, k)
    rng = np.random.default_rng(1)
    parts = {"bias": rng.standard_normal(n).astype("bfloat16")}
    static = {} if gated else {"activation": "gelu_tanh"}
    if gated:
        parts["gate"] = rng.standard_normal((2, 2, n)).astype("bfloat16")
        parts["residual"] = rng.standard_normal((2, tokens, n)).astype("bfloat16")
        static["text_length"] = 11
    wanted = matmul_reference.scaled_matmul(a, b, epilogue=Epilogue(**parts, **static))
    a, b, parts = jax.tree.map(jnp.asarray, (a, b, parts))
    call = {"epilogue": Epilogue(**parts, **static), "out_dtype": jnp.dtype("bfloat16")}
    skip_if_refused(MATMULS, implementation, a, b, **call)
    found = np.asarray(scaled_matmul(a, b, **parts, **static, implementation=implementation), np.float64)
    # One rounding to bfloat16, and sums that a tensor core may truncate: to 14 bits for E4M3 on Hopper.
    sums = 2.0**-8 if kind == "fp8" else 2.0**-10
    assert np.linalg.norm(found - wanted) <= (2.0**-9 + sums) * np.linalg.norm(wanted)
    assert (np.abs(found - wanted) <= 2.0**-7 * np.abs(wanted) + 8 * sums * wanted.std()).all()


@pytest.mark.parametrize("hadamard", [128, 0])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 71, 1920), (2, 18432, 512), (3, 131, 12288), (16, 67, 3072), (40, 67, 3072)]
)
@pytest.mark.parametrize("implementation", WEIGHT_ONLY)
def test_weight_only_matmul_is_near_float64(implementation, rows, n, k, hadamard):
    weight = stored(n, k, hadamard=hadamard)
    x = np.random.default_rng(rows).standard_normal((rows, k)).astype("bfloat16")
    bias = np.random.default_rng(n).standard_normal(n).astype("bfloat16")
    wanted = weight_only_reference.weight_only_matmul(x, as_numpy(weight), epilogue=Epilogue(bias=bias))
    found = weight_only_matmul(
        jnp.asarray(x), weight, bias=jnp.asarray(bias), out_dtype=jnp.float32, implementation=implementation
    )
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < (1e-3 if implementation == "pallas_triton" and rows <= 16 else 4e-3)


REAL = [
    workload
    for workload in workloads.everything()
    if ("5b" in workload.name or (workload.operation, workload.target) == ("adaln_quantize", "int8"))
    and not ("ff_out" in workload.name and workload.operation == "nvfp4_cast")
]


@pytest.mark.parametrize("workload", REAL, ids=lambda w: f"{w.operation}, {w.name}, {w.target}")
def test_real_shapes_agree_with_xla_and_with_themselves(workload):
    """Every implementation; twice, for the same bits."""
    operands = jax.jit(workload.make)(jax.random.key(0))
    # Only what it computes counts here, and timing Triton programs for an FP8 product takes minutes.
    wanted = jax.jit(workload.function("xla"), compiler_options={"xla_gpu_enable_triton_gemm": False})(*operands)
    for implementation in workloads.implementations(workload.operation):
        if workload.refusal(implementation) is None:
            run = jax.jit(workload.function(implementation))
            found, again = run(*operands), run(*operands)
            assert float(workloads.relative_error(found, wanted)) <= workload.tolerance
            equal = jax.tree.map(lambda a, b: bool((_bits(a) == _bits(b)).all()), found, again)
            assert all(jax.tree.leaves(equal)), implementation


def _bits(array):
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


@pytest.mark.parametrize(
    "mutate",
    [
        lambda w: {"codes": (w.codes << 4) | (w.codes >> 4)},
        lambda w: {"tensor_scale": jnp.ones_like(w.tensor_scale)},
        lambda w: {"scales": jnp.roll(w.scales, 1, -1)},
    ],
    ids=["swapped nibbles", "dropped tensor scale", "scales one block late"],
)
def test_the_comparison_with_xla_sees(mutate):
    (workload,) = [w for w in workloads.everything(tiny=True) if w.operation == "weight_only_matmul"]
    x, weight, bias = workload.make(jax.random.key(0))
    run = jax.jit(workload.function("xla"))
    mutated = run(x, dataclasses.replace(weight, **mutate(weight)), bias)
    assert float(workloads.relative_error(mutated, run(x, weight, bias))) > 4 * workload.tolerance
