"""Storing and adding deltas: every implementation equal to the definition, sums but for rounding."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import lowered
from quantized import differences

from pallas_kernels.common import device
from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.common.quantize_tile import Instructions
from pallas_kernels.delta_cache import api, apply_delta, pallas_triton, reference, shapes, store_delta
from pallas_kernels.rotate_quantize.reference import rotate_quantize

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
STORED = [("pallas_triton", "nvfp4"), *(("xla", format) for format in ("16bit", "int8", "nvfp4"))]
"""What each implementation stores."""


@pytest.fixture(params=api.STORE)
def implementation(request):
    with contextlib.nullcontext() if request.param == "xla" else device.interpret():
        yield request.param


def entry(values, format):
    if format == "16bit":
        return values
    dims = {"scale_dims": 2} if format == "nvfp4" else {}
    return rotate_quantize(values, format=format, hadamard=0, **dims)[0]


def problem(shape, format="nvfp4", dtype="bfloat16", seed=0):
    """(before, after, stored), in NumPy."""
    rng = np.random.default_rng(seed)
    size = (shape.batch, shape.tokens, shape.dim)
    before = rng.standard_normal(size) * 10.0 ** rng.uniform(-2, 2, (*size[:2], 1))
    delta, old = (rng.standard_normal(size) * 0.1 * np.abs(before).mean(-1, keepdims=True) for _ in range(2))
    delta[..., 3] *= 50
    return before.astype(dtype), (before + delta).astype(dtype), entry((delta + 0.3 * old).astype(dtype), format)


def different(found, wanted):
    """Names of the fields whose bytes differ."""
    if isinstance(wanted, np.ndarray):
        return [] if np.asarray(found).tobytes() == wanted.tobytes() else ["values"]
    return differences(found, wanted)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize(("implementation", "format"), STORED, indirect=["implementation"])
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
def test_storing_is_the_definition(implementation, shape, format, compare):
    arguments = problem(shape, format)
    found, sums = store_delta(*on_device(arguments), compare=compare, implementation=implementation)
    wanted, wanted_sums = reference.store_delta(*arguments, compare=compare)
    assert different(found, wanted) == []
    for name in ("before", "delta", "change", "stored"):
        value, exact = getattr(sums, name), getattr(wanted_sums, name)
        assert (value is None) == (exact is None) == (name in ("change", "stored") and not compare)
        if value is not None:
            np.testing.assert_allclose(value, exact, rtol=1e-5)


@pytest.mark.parametrize(("implementation", "format"), STORED, indirect=["implementation"])
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
def test_adding_is_the_definition(implementation, shape, format):
    x, _, stored = problem(shape, format)
    found = np.asarray(apply_delta(*on_device((x, stored)), implementation=implementation))
    # The delta's last product may be fused with the sum, and fall to the other side of a midpoint.
    near = reference.apply_delta(x, stored)
    assert (found != near).mean() < 2e-3
    np.testing.assert_allclose(found.astype(np.float32), near.astype(np.float32), rtol=2.0**-7)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda d: {"codes": (d.codes << 4) | (d.codes >> 4)},
        lambda d: {"scales": np.roll(d.scales, 1, -1)},
        lambda d: {"tensor_scale": np.roll(d.tensor_scale, 1, -1)},
    ],
    ids=["swapped nibbles", "scales a block late", "another row's scale"],
)
def test_the_comparison_notices(mutate):
    x, after, stored = problem(shapes.SMALL[1])
    wrong = dataclasses.replace(stored, **mutate(stored))
    assert (reference.apply_delta(x, wrong) != reference.apply_delta(x, stored)).any()
    assert differences(wrong, stored) != []
    good, bad = (reference.store_delta(x, after, d, compare=True)[1] for d in (stored, wrong))
    assert not np.allclose(good.change, bad.change, rtol=1e-5)


def test_what_is_not_finite_stays_so(implementation):
    before, after, stored = problem(shapes.SMALL[1])
    after[0, 2, 40], after[1, 0, 3] = np.nan, np.inf
    found, sums = store_delta(*on_device((before, after, stored)), compare=True, implementation=implementation)
    with np.errstate(invalid="ignore"):
        wanted, _ = reference.store_delta(before, after, stored, compare=True)
    assert differences(found, wanted) == []
    for values in (sums.delta, sums.change):
        assert not np.isfinite(np.asarray(values)[[0, 1], [2, 0]]).any()
        assert np.isfinite(values).sum() == before.shape[0] * before.shape[1] - 2
    again = np.asarray(apply_delta(jnp.asarray(before), found, implementation=implementation), np.float32)
    assert np.isnan(again[0, 2, 32:48]).all()
    assert np.isnan(again[1, 0, :16]).all()
    assert np.isnan(again).sum() == 32


def test_jit_and_vmap(implementation):
    arguments = on_device(problem(shapes.SMALL[3]))
    run = functools.partial(store_delta, compare=True, implementation=implementation)
    one, many = run(*arguments), jax.jit(jax.vmap(run))(*jax.tree.map(lambda x: jnp.stack([x, x]), arguments))
    assert differences(jax.tree.map(lambda x: x[1], many[0]), one[0]) == []
    np.testing.assert_array_equal(many[1].change[0], one[1].change)


@pytest.mark.parametrize("shape", shapes.FULL, ids=lambda s: s.name)
def test_lowers_for_an_h100(shape):
    rows = (shape.batch, shape.tokens)
    x = jax.ShapeDtypeStruct((*rows, shape.dim), jnp.bfloat16)
    leaves = [
        jax.ShapeDtypeStruct((*rows, shape.dim // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*rows, shape.dim // 16), jnp.uint8),
        jax.ShapeDtypeStruct(rows, jnp.float32),
    ]
    config = pallas_triton.heuristic(k=shape.dim)

    def both(x, y, *leaves):
        stored = NVFP4Array(codes=leaves[0], scales=leaves[1], tensor_scale=leaves[2])
        options = {"config": config, "interpret": False}
        new = pallas_triton._store_delta(x, y, stored, compare=True, instructions=Instructions.of((9, 0)), **options)
        return jax.tree.leaves(new), pallas_triton._apply_delta(x, stored, **options)

    text = lowered(both, x, x, *leaves)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 2


def test_bad_calls():
    before, after, stored = on_device(problem(shapes.SMALL[1]))
    with pytest.raises(ValueError, match="must be alike"):
        store_delta(before, after.astype(jnp.float32), stored, compare=True)
    with pytest.raises(ValueError, match=r"stored delta of \(2, 7, 208\)"):
        apply_delta(before[:, :3], stored)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        apply_delta(before, stored, implementation="cuda")
    with pytest.raises(NotImplementedError, match="NVIDIA GPU of compute capability"):
        store_delta(before, after, stored, compare=True, implementation="pallas_triton")
    codes = Int8Array(codes=jnp.zeros(before.shape, jnp.int8), scale=jnp.ones(before.shape[:2]))
    with device.interpret(), pytest.raises(NotImplementedError, match="in NVFP4"):
        apply_delta(before, codes, implementation="pallas_triton")
