"""Full attention of every token to every token, in one operation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.attention import pallas_mosaic_gpu, xla
from pallas_kernels.common.choice import Implementation, choose

IMPLEMENTATIONS = {
    "pallas_mosaic_gpu": Implementation(run=pallas_mosaic_gpu.attention, refusal=pallas_mosaic_gpu.refusal),
    "cudnn": Implementation(run=xla.cudnn_attention, refusal=xla.cudnn_refusal),
    "xla": xla.attention,
}


def attention(
    query: Float[Array, "..."],
    key: Float[Array, "..."],
    value: Float[Array, "..."],
    *,
    logit_bound: Float32[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """softmax(query key^T / sqrt(head)) value, for each sample and head.

    Products of 16-bit arrays accumulate in float32; the softmax is float32, and its weights are rounded to the inputs'
    dtype before they multiply the values.

    Args:
        query, key, value: [batch, tokens, heads, head], of one float dtype.
        logit_bound: what no |query key^T| / sqrt(head) exceeds, as `norm_rotary.logit_bound` gives it; None if that is
            not known. Where it is at most 55 the Mosaic kernel does without the running maximum of the softmax, which
            is exact then, and faster.
        implementation: a name in `IMPLEMENTATIONS`, or None for the best one here.

    Returns:
        [batch, tokens, heads, head], in that dtype.

    Raises:
        ValueError: if shapes or dtypes differ; the message has them.
        NotImplementedError: if an implementation is named that the device or the call rules out.
    """
    found = [f"{x.dtype}{list(x.shape)}" for x in (query, key, value)]
    if query.ndim != 4 or len(set(found)) != 1 or not query.size:
        raise ValueError(
            f"query, key and value must be [batch, tokens, heads, head], alike and not empty, found {', '.join(found)}"
        )
    run = choose("attention", IMPLEMENTATIONS, implementation, query, key, value)
    if run is pallas_mosaic_gpu.attention:
        return pallas_mosaic_gpu.attention(query, key, value, logit_bound=logit_bound)
    return run(query, key, value)


def packed_attention(
    qkv: Float[Array, "..."], *, logit_bound: Float32[Array, ""] | None = None, implementation: str | None = None
) -> Float[Array, "..."]:
    """`attention` of queries, keys and values that are the three thirds of the heads of one array.

    The Mosaic kernel reads them where they are; the other implementations copy them apart.

    Args:
        qkv: [batch, tokens, 3 * heads, head].
        logit_bound, implementation: as there.

    Returns:
        [batch, tokens, heads, head].

    Raises:
        ValueError: if qkv is of another shape.
        NotImplementedError: as there.
    """
    if qkv.ndim != 4 or qkv.shape[2] % 3 or not qkv.size:
        raise ValueError(f"qkv must be [batch, tokens, 3 * heads, head] and not empty, found {qkv.shape}")
    batch, tokens, heads, head = qkv.shape
    third = jax.ShapeDtypeStruct((batch, tokens, heads // 3, head), qkv.dtype)
    run = choose("attention", IMPLEMENTATIONS, implementation, third, third, third)
    if run is pallas_mosaic_gpu.attention:
        return pallas_mosaic_gpu.packed_attention(qkv, logit_bound=logit_bound)
    return run(*jnp.split(qkv, 3, axis=2))
