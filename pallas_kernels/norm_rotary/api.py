"""Layer norm of queries and keys, and rotary positions, in one operation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.norm_rotary import pallas_triton, xla

IMPLEMENTATIONS = {
    "pallas_triton": Implementation(run=pallas_triton.norm_rotary, refusal=pallas_triton.refusal),
    "xla": xla.norm_rotary,
}


def norm_rotary(
    qkv: Float[Array, "..."],
    *,
    query: tuple[Float[Array, "..."], Float[Array, "..."]],
    key: tuple[Float[Array, "..."], Float[Array, "..."]],
    rotary: tuple[Float[Array, "..."], Float[Array, "..."]] | None = None,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Layer norm over each head of the queries and keys, then the rotation of neighbouring features.

    Both in float32, each rounded to the rows' dtype (`norm_q`, `norm_k` and `apply_rotary_emb` of diffusers'
    `CogVideoXAttnProcessor2_0`). Under jit the result takes the memory of `qkv` where nothing else reads it.

    Args:
        qkv: [batch, tokens, 3 * heads, head]: the heads of the queries, then of the keys, then of the values, which
            stay as they are.
        query, key: (scale, bias) of the norm, each [head].
        rotary: (cos, sin), each float32 [tokens, head]; None for none.
        epsilon: added to the variance.
        implementation: a name in `IMPLEMENTATIONS`, or None for the best one here.

    Returns:
        As `qkv`; its first two thirds of heads are normalised and rotated.

    Raises:
        ValueError: if shapes do not fit; the message has them.
        NotImplementedError: if the named implementation can't do this call here.
    """
    if qkv.ndim != 4 or qkv.shape[2] % 3 or qkv.shape[3] % 2 or not qkv.size:
        raise ValueError(
            f"qkv must be [batch, tokens, 3 * heads, head] with an even head and not empty, found {qkv.shape}"
        )
    _, tokens, _, head = qkv.shape
    for name, pair, wanted in (("query", query, (head,)), ("key", key, (head,)), ("rotary", rotary, (tokens, head))):
        if pair is not None and any(part.shape != wanted for part in pair):
            raise ValueError(f"{name} must be two of {wanted} for qkv of {qkv.shape}, found {[p.shape for p in pair]}")
    options = {"query": query, "key": key, "rotary": rotary, "epsilon": epsilon}
    return choose("norm_rotary", IMPLEMENTATIONS, implementation, qkv, **options)(qkv, **options)


def logit_bound(
    query: tuple[Float[Array, " head"], Float[Array, " head"]], key: tuple[Float[Array, " head"], Float[Array, " head"]]
) -> Float32[Array, ""]:
    """What no |query key^T| / sqrt(head) of rows that `norm_rotary` gives exceeds, whatever the rows are.

    By Cauchy and Schwarz: a normalised row is no longer than sqrt(head), and a rotation keeps the length of each pair
    of neighbouring features. For scales of 1 without biases it is sqrt(head).

    Args:
        query, key: (scale, bias) of the norm, each [head].
    """
    (q_scale, q_bias), (k_scale, k_bias) = (
        [jnp.abs(part.astype(jnp.float32)).reshape(-1, 2) for part in pair] for pair in (query, key)
    )
    q_scale, k_scale = q_scale.max(1), k_scale.max(1)
    q_bias, k_bias = jnp.linalg.norm(q_bias, axis=1), jnp.linalg.norm(k_bias, axis=1)
    length = (2 * q_scale.size) ** 0.5
    mixed = jnp.linalg.norm(q_scale * k_bias) + jnp.linalg.norm(k_scale * q_bias)
    rounding = 1 + 2.0**-7  # of queries and keys to 16 bit
    return rounding * ((q_scale * k_scale).max() * length + mixed + (q_bias * k_bias).sum() / length)
