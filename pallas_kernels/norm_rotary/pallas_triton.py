"""`norm_rotary` in one pass and in place, for compute capability 8.0 and up.

A program takes some tokens and some heads of one sample. The values' heads are never touched: the result is the
operand's own memory, unless something else still reads that.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.common import device
from pallas_kernels.norm_rotary.xla import Norm, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is divided; powers of two.

    Attributes:
        tokens, heads: of a program.
        num_warps: of a program.
    """

    tokens: int
    heads: int
    num_warps: int


def heuristic(*, heads: int) -> Config:
    """The configuration for this many heads of queries, unless another is asked for."""
    return Config(tokens=8, heads=min(8, pl.next_power_of_2(2 * heads)), num_warps=4)


def refusal(qkv: Float[Array, "batch tokens heads head"], **options) -> str | None:
    """See `common.choice.Implementation`."""
    head = qkv.shape[-1]
    if head & (head - 1) or head > 256:
        return f"it takes heads of a power of two up to 256, not {head}"
    return device.refusal(at_least=(8, 0))


def norm_rotary(
    qkv: Float[Array, "batch tokens heads head"],
    *,
    query: Norm,
    key: Norm,
    rotary: Rotary | None,
    epsilon: float,
    config: Config | None = None,
) -> Float[Array, "batch tokens heads head"]:
    """See `api.norm_rotary`."""
    config = config or heuristic(heads=qkv.shape[2] // 3)
    return _norm_rotary(qkv, query, key, rotary, epsilon=epsilon, config=config, interpret=device.interpreting())


@functools.partial(jax.jit, static_argnames=("epsilon", "config", "interpret"))
def _norm_rotary(
    qkv: Float[Array, "batch tokens heads head"],
    query: Norm,
    key: Norm,
    rotary: Rotary | None,
    *,
    epsilon: float,
    config: Config,
    interpret: bool,
) -> Float[Array, "batch tokens heads head"]:
    batch, tokens, heads, _ = qkv.shape
    norms = jnp.stack([jnp.stack(norm) for norm in (query, key)]).astype(jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, config=config, epsilon=epsilon),
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        grid=(pl.cdiv(tokens, config.tokens), pl.cdiv(2 * heads // 3, config.heads), batch),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="norm_rotary",
    )(qkv, norms, *(rotary or ()))


def _kernel(qkv_ref, norms_ref, *refs, config: Config, epsilon: float):
    *tables, out_ref = refs
    _, all_tokens, all_heads, head = qkv_ref.shape
    token, first_head, sample = (pl.program_id(axis) for axis in range(3))
    token, first_head = token * config.tokens, first_head * config.heads
    shape = (config.tokens, config.heads, head)
    both = 2 * all_heads // 3
    heads_of = first_head + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = None
    if all_tokens % config.tokens or both % config.heads:
        mask = (token + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < all_tokens) & (heads_of < both)
    place = (sample, pl.ds(token, config.tokens), pl.ds(first_head, config.heads), pl.ds(0, head))
    x = plgpu.load(qkv_ref.at[place], mask=mask, other=None if mask is None else 0).astype(jnp.float32)
    centred = x - x.sum(-1, keepdims=True) * (1 / head)
    variance = (centred * centred).sum(-1, keepdims=True) * (1 / head)
    scale, bias = (_by_head(heads_of < all_heads // 3, norms_ref[0, i], norms_ref[1, i]) for i in range(2))
    x = (centred * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(qkv_ref.dtype)
    if tables:
        x = _rotated(x.astype(jnp.float32), [_table(ref, token, config.tokens) for ref in tables]).astype(x.dtype)
    plgpu.store(out_ref.at[place], x, mask=mask)


def _by_head(is_query: Array, query: Float32[Array, " head"], key: Float32[Array, " head"]) -> Float32[Array, "..."]:
    query, key = (jnp.broadcast_to(v[None, None, :], is_query.shape) for v in (query, key))
    return jnp.where(is_query, query, key)


def _table(ref, token: Array, tokens: int) -> Float32[Array, "tokens 1 head"]:
    """The rows of these tokens."""
    shape = (tokens, ref.shape[1])
    mask = None
    if ref.shape[0] % tokens:
        mask = token + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < ref.shape[0]
    values = plgpu.load(ref.at[pl.ds(token, tokens), pl.ds(0, shape[1])], mask=mask, other=None if mask is None else 0)
    return values.reshape(tokens, 1, shape[1])


def _rotated(x: Float32[Array, "tokens heads head"], tables: list) -> Float32[Array, "tokens heads head"]:
    """Pairs (a, b) of neighbours to (a cos - b sin, b cos + a sin)."""

    def pairs(values: Array) -> tuple[Array, Array]:
        first, second = jnp.unstack(values.reshape(*values.shape[:-1], -1, 2), axis=-1)
        return first, second

    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (pairs(values) for values in (x, *tables))
    return jnp.stack([a * cos_a - b * sin_a, b * cos_b + a * sin_b], axis=-1).reshape(x.shape)
