"""Layer norm and rotary positions of queries and keys, every implementation against float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import lowered

from pallas_kernels.common import device
from pallas_kernels.norm_rotary import logit_bound, norm_rotary, pallas_triton, reference, shapes
from pallas_kernels.norm_rotary.api import IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with contextlib.nullcontext() if request.param == "xla" else device.interpret():
        yield functools.partial(norm_rotary, implementation=request.param)


def problem(shape, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((shape.batch, shape.tokens, 3 * shape.heads, shape.head))
    qkv = (0.3 + qkv * rng.uniform(0.1, 10, (*qkv.shape[:-1], 1))).astype(dtype)
    norm = lambda: tuple((rng.standard_normal(shape.head) + one).astype(dtype) for one in (1, 0))  # noqa: E731
    call = {"query": norm(), "key": norm(), "rotary": None, "epsilon": 1e-6}
    if shape.rotary:
        angles = np.repeat(rng.uniform(0, 6, (shape.tokens, shape.head // 2)), 2, -1)
        call["rotary"] = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    return qkv, call


def on_device(tree):
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def error(found, wanted):
    found, wanted = (np.asarray(x).astype(np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-4, "float16": 4e-5}
"""Some values in a hundred round to the other neighbour."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
def test_against_float64(implementation, shape, dtype):
    qkv, call = problem(shape, dtype)
    found = implementation(jnp.asarray(qkv), **on_device(call))
    assert found.dtype == dtype
    assert error(found, reference.norm_rotary(qkv, **call)) < TOLERANCE[dtype]
    heads = 2 * shape.heads
    np.testing.assert_array_equal(np.asarray(found)[:, :, heads:], qkv[:, :, heads:])


@pytest.mark.parametrize(
    "mutate",
    [
        lambda c: {"query": c["key"], "key": c["query"]},
        lambda c: {"rotary": c["rotary"][::-1]},
        lambda c: {"rotary": (c["rotary"][0], -c["rotary"][1])},
        lambda c: {"epsilon": 1e-2},
        lambda c: {"rotary": tuple(np.roll(t, 1, 0) for t in c["rotary"])},
    ],
    ids=["norms swapped", "cosine for sine", "the other way", "another epsilon", "a token late"],
)
def test_the_tolerance_notices(mutate):
    qkv, call = problem(shapes.SMALL[1])
    wrong = reference.norm_rotary(qkv, **(call | mutate(call)))
    assert error(wrong, reference.norm_rotary(qkv, **call)) > 3 * TOLERANCE["bfloat16"]


def test_jit_and_vmap(implementation):
    qkv, call = problem(shapes.SMALL[1])
    qkv, call = jnp.asarray(qkv), on_device(call)
    one = jax.jit(lambda x: implementation(x, **call))(qkv)
    many = jax.jit(jax.vmap(lambda x: implementation(x, **call)))(jnp.stack([qkv, qkv[::-1]]))
    np.testing.assert_array_equal(many[0], one)
    np.testing.assert_array_equal(many[1], one[::-1])
    # On some CPUs its operations one by one round one value in some ten thousand to the other neighbour.
    by_itself = implementation(qkv, **call)
    away = np.subtract(*(jax.lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) for x in (by_itself, one)))
    assert np.abs(away).max() <= 1
    assert np.count_nonzero(away) < 1e-3 * away.size


@pytest.mark.parametrize("shape", shapes.FULL, ids=lambda s: s.name)
def test_lowers_for_an_h100_in_place(shape):
    qkv = jax.ShapeDtypeStruct((shape.batch, shape.tokens, 3 * shape.heads, shape.head), jnp.bfloat16)
    norm = (jax.ShapeDtypeStruct((shape.head,), jnp.bfloat16),) * 2
    table = (jax.ShapeDtypeStruct((shape.tokens, shape.head), jnp.float32),) * 2 if shape.rotary else None
    config = pallas_triton.heuristic(heads=shape.heads)
    run = functools.partial(pallas_triton._norm_rotary, epsilon=1e-6, config=config, interpret=False)
    text = lowered(run, qkv, norm, norm, table)
    assert "triton" in text
    assert "output_operand_alias" in text


def test_bad_calls():
    qkv, call = on_device(problem(shapes.SMALL[1]))
    with pytest.raises(ValueError, match=r"3 \* heads"):
        norm_rotary(qkv[:, :, :-1], **call)
    with pytest.raises(ValueError, match=r"rotary must be two of \(13, 64\)"):
        norm_rotary(qkv, **(call | {"rotary": call["query"]}))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        norm_rotary(qkv, **call, implementation="cuda")
    with pytest.raises(NotImplementedError, match="NVIDIA GPU of compute capability"):
        norm_rotary(qkv, **call, implementation="pallas_triton")
    with device.interpret(), pytest.raises(NotImplementedError, match="not 48"):
        norm_rotary(qkv[..., :48], query=(jnp.ones(48),) * 2, key=(jnp.ones(48),) * 2, implementation="pallas_triton")


def bound_of(*norms):
    return float(logit_bound(*(tuple(jnp.asarray(x, jnp.float32) for x in norm) for norm in norms)))


def largest_logit(query, key):
    """Of normalised and rotated rows, found by a random ascent from many starts."""
    rng = np.random.default_rng(0)
    head, starts = query[0].size, 64

    def logit(rows, angle):
        normed = rows - rows.mean(-1, keepdims=True)
        normed /= np.sqrt((normed**2).mean(-1, keepdims=True))
        q, k = (x * norm[0] + norm[1] for x, norm in zip(normed, (query, key), strict=True))
        pairs = (q[..., ::2] + 1j * q[..., 1::2]) * np.exp(1j * angle)
        return (pairs * np.conj(k[..., ::2] + 1j * k[..., 1::2])).real.sum(-1) / np.sqrt(head)

    along = np.stack([key[0] * key[1], query[0] * query[1]])[:, None]
    rows = rng.standard_normal((2, starts, head)) + rng.uniform(0, 5, (2, starts, 1)) * along
    angle = np.zeros((starts, head // 2))
    best = logit(rows, angle)
    for size in np.geomspace(1, 0.03, 400):
        moved = rows + size * rng.standard_normal(rows.shape), angle + size * rng.standard_normal(angle.shape)
        found = logit(*moved)
        better = found > best
        rows, angle = (np.where(better[:, None], new, old) for new, old in zip(moved, (rows, angle), strict=True))
        best = np.maximum(best, found)
    return best.max()


@pytest.mark.parametrize("head", [4, 16])
@pytest.mark.parametrize("kind", ["ones", "scales", "biases", "both"])
def test_no_logit_exceeds_the_bound(head, kind):
    rng = np.random.default_rng(head)
    ones, zeros = np.ones((2, head)), np.zeros((2, head))
    scales = rng.uniform(0.2, 3, (2, head)) if kind in ("scales", "both") else ones
    biases = rng.normal(0, 2, (2, head)) if kind in ("biases", "both") else zeros
    found, bound = largest_logit(*zip(scales, biases, strict=True)), bound_of(*zip(scales, biases, strict=True))
    assert 0.5 * bound < found <= bound
    if kind != "ones":
        assert found > bound_of(*zip(ones if kind == "scales" else scales, zeros, strict=True))
