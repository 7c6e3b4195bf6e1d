"""What lies between the linears, on a GPU: equal to the definitions on real sizes and odd ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, packed_attention
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.delta_cache import apply_delta, store_delta
from pallas_kernels.delta_cache import shapes as delta_shapes
from pallas_kernels.norm_rotary import norm_rotary
from pallas_kernels.norm_rotary import shapes as rotary_shapes


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@pytest.mark.parametrize("shape", [*rotary_shapes.FULL, *rotary_shapes.SMALL], ids=lambda s: s.name)
def test_norm_rotary_is_near_xla(shape):
    qkv = normal(0, shape.batch, shape.tokens, 3 * shape.heads, shape.head)
    norms = [(1 + normal(i, shape.head), normal(i + 1, shape.head)) for i in (1, 3)]
    angles = jnp.repeat(jax.random.uniform(jax.random.key(9), (shape.tokens, shape.head // 2)), 2, -1)
    rotary = (jnp.cos(angles), jnp.sin(angles)) if shape.rotary else None
    call = {"query": norms[0], "key": norms[1], "rotary": rotary}
    wanted, found = (norm_rotary(qkv, **call, implementation=name) for name in ("xla", "pallas_triton"))
    assert (found != wanted).mean() < 0.01
    error = jnp.linalg.norm((found - wanted).astype(jnp.float32)) / jnp.linalg.norm(wanted.astype(jnp.float32))
    assert error < 5e-4


@pytest.mark.parametrize("shape", [*delta_shapes.FULL, *delta_shapes.SMALL], ids=lambda s: s.name)
def test_deltas_are_those_of_xla(shape):
    size = (shape.batch, shape.tokens, shape.dim)
    before, after, older = normal(0, *size), normal(1, *size), normal(2, *size)
    empty = NVFP4Array(
        codes=jnp.zeros((*size[:2], shape.dim // 2), jnp.uint8),
        scales=jnp.zeros((*size[:2], shape.dim // 16), jnp.uint8),
        tensor_scale=jnp.zeros(size[:2]),
    )
    stored, _ = store_delta(before, older, empty, compare=False, implementation="xla")
    wanted, found = (
        store_delta(before, after, stored, compare=True, implementation=i) for i in ("xla", "pallas_triton")
    )
    for field in ("codes", "scales", "tensor_scale"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(wanted[0], field), err_msg=field)
    for field in ("before", "delta", "change", "stored"):
        np.testing.assert_allclose(getattr(found[1], field), getattr(wanted[1], field), rtol=1e-5)
    wanted, found = (apply_delta(before, stored, implementation=i) for i in ("xla", "pallas_triton"))
    assert (found != wanted).mean() < 2e-3
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2.0**-7)


@pytest.mark.parametrize(("tokens", "head"), [(1000, 64), (2048, 128), (17_776, 64)])
def test_packed_attention_is_attention(tokens, head):
    qkv = normal(0, 2, tokens, 9, head)
    found = packed_attention(qkv, implementation="pallas_mosaic_gpu")
    parts = jnp.split(qkv, 3, axis=2)
    np.testing.assert_array_equal(found, attention(*parts, implementation="pallas_mosaic_gpu"))
    wanted = attention(*parts, implementation="cudnn").astype(jnp.float32)
    error = jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
    assert error < 5e-3


@pytest.mark.parametrize(("tokens", "head"), [(1000, 64), (1024, 64), (2048, 128), (17_776, 64)])
@pytest.mark.parametrize("largest", [1.0, 50.0])
def test_attention_without_a_running_maximum_is_attention(tokens, head, largest):
    qkv = normal(0, 2, tokens, 9, head)
    # Queries and keys that are as long as they can be with logits of that size, which the first of them reach.
    paired = qkv[:, :, :6].astype(jnp.float32)
    paired = paired.at[:, 0, 3:].set(paired[:, 0, :3])
    paired *= (largest * head**0.5) ** 0.5 / jnp.linalg.norm(paired, axis=-1, keepdims=True)
    qkv = jnp.concatenate([paired.astype(jnp.bfloat16), qkv[:, :, 6:]], axis=2)
    plain = packed_attention(qkv, implementation="pallas_mosaic_gpu")
    large, small = (
        packed_attention(qkv, logit_bound=jnp.float32(bound), implementation="pallas_mosaic_gpu")
        for bound in (70.0, largest * 1.01)
    )
    np.testing.assert_array_equal(large.astype(jnp.float32), plain.astype(jnp.float32))
    wanted = attention(*jnp.split(qkv, 3, axis=2), implementation="cudnn").astype(jnp.float32)
    for found in (plain, small):
        error = jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
        assert error < 5e-3
