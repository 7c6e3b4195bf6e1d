"""Attention against float64; the Hopper kernel itself runs in tests/gpu and is lowered here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import lowered

from pallas_kernels.attention import attention, packed_attention, pallas_mosaic_gpu, reference, shapes
from pallas_kernels.common import device


def operands(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    size = (shape.batch, shape.tokens, shape.heads, shape.head)
    return [jnp.asarray(rng.standard_normal(size), dtype) for _ in range(3)]


@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 6e-3), ("float16", 1e-3)])
def test_xla_against_float64(shape, dtype, tolerance):
    q, k, v = operands(shape, dtype)
    found = attention(q, k, v, implementation="xla")
    assert found.dtype == dtype
    wanted = reference.attention(*(np.asarray(x.astype(jnp.float32)) for x in (q, k, v)))
    error = np.linalg.norm(np.asarray(found.astype(jnp.float32)) - wanted) / np.linalg.norm(wanted)
    assert error < tolerance


def test_the_tolerance_notices_a_wrong_scale_and_an_unmasked_tail():
    q, k, v = (np.asarray(x) for x in operands(shapes.SMALL[1], "float32"))
    wanted = reference.attention(q, k, v)
    padded = [np.pad(x, ((0, 0), (0, 51), (0, 0), (0, 0))) for x in (q, k, v)]
    for wrong in (reference.attention(q * 1.1, k, v), reference.attention(*padded)[:, : q.shape[1]]):
        assert np.linalg.norm(wrong - wanted) / np.linalg.norm(wanted) > 3e-2


@pytest.mark.parametrize("tokens", [17_776, 17_792, 1000])
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("turns", [True, False])
def test_lowers_for_an_h100(tokens, head, turns):
    x = jax.ShapeDtypeStruct((2, tokens, 3, head), jnp.bfloat16)
    config = pallas_mosaic_gpu.Config(stages=2, warpgroups=2 if turns else 3, turns=turns)
    text = lowered(lambda q, k, v: pallas_mosaic_gpu.attention(q, k, v, config=config), x, x, x)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


def test_packed_attention_lowers_for_an_h100_without_a_copy():
    qkv = jax.ShapeDtypeStruct((2, 17_776, 9, 64), jnp.bfloat16)
    text = lowered(pallas_mosaic_gpu.packed_attention, qkv)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "stablehlo.slice" not in text


def test_packed_attention_is_attention():
    parts = operands(shapes.SMALL[1], "float32")
    found = packed_attention(jnp.concatenate(parts, axis=2))
    np.testing.assert_array_equal(found, attention(*parts))
    with pytest.raises(ValueError, match=r"3 \* heads"):
        packed_attention(parts[0][:, :, :2])


@pytest.mark.parametrize("name", ["pallas_mosaic_gpu", "cudnn"])
def test_what_a_cpu_cannot_run_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match="NVIDIA GPU of compute capability"):
        attention(*operands(shapes.Shape(name="", batch=1, tokens=512, heads=1), "bfloat16"), implementation=name)


def test_what_the_kernel_does_not_take():
    for dtype, tokens, head, message in (
        ("float32", 512, 64, "float32"),
        ("bfloat16", 512, 96, "not 96"),
        ("bfloat16", 104, 64, "not 104"),
        ("bfloat16", 1001, 64, "not 1001"),
    ):
        x = jnp.zeros((1, tokens, 1, head), dtype)
        assert message in pallas_mosaic_gpu.refusal(x, x, x)
    x = jnp.zeros((1, 512, 1, 64), jnp.bfloat16)
    with device.interpret():
        assert "interpreted" in pallas_mosaic_gpu.refusal(x, x, x)


def test_bad_calls():
    q, k, v = operands(shapes.SMALL[0], "float32")
    for wrong in ((q[:, :1], k, v), (q.astype(jnp.bfloat16), k, v), (q[0], k[0], v[0]), (q[:0], k[:0], v[:0])):
        with pytest.raises(ValueError, match="alike and not empty"):
            attention(*wrong)
    with pytest.raises(ValueError, match="unknown implementation 'flash'"):
        attention(q, k, v, implementation="flash")


def test_vmap():
    q, k, v = (x[:, None] for x in operands(shapes.SMALL[1], "float32"))
    found = jax.vmap(lambda q, k, v: attention(q, k, v, implementation="xla"))(q, k, v)
    np.testing.assert_allclose(found[:, 0], attention(q[:, 0], k[:, 0], v[:, 0]), rtol=0, atol=1e-6)


def test_bounded_logits_lower_for_an_h100_beside_any_others():
    qkv = jax.ShapeDtypeStruct((2, 17_776, 9, 64), jnp.bfloat16)
    bound = jax.ShapeDtypeStruct((), jnp.float32)

    def run(qkv, bound):
        return pallas_mosaic_gpu.packed_attention(qkv, logit_bound=bound)

    text = lowered(run, qkv, bound)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert text.count("stablehlo.case") == 1
    assert "stablehlo.slice" not in text
    half = jax.ShapeDtypeStruct(qkv.shape, jnp.float16)
    assert lowered(run, half, bound).count("stablehlo.custom_call @mosaic_gpu") == 1


def test_a_bound_changes_nothing_elsewhere():
    q, k, v = operands(shapes.SMALL[1], "bfloat16")
    found = attention(q, k, v, logit_bound=jnp.float32(8))
    np.testing.assert_array_equal(*(x.astype(jnp.float32) for x in (found, attention(q, k, v))))
