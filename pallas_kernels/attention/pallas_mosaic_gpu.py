"""`attention` as one Pallas Mosaic GPU kernel: Hopper.

FlashAttention-3 (arXiv 2407.08608) as JAX's own `attention_mgpu` has it, with what that lacks: tokens that tiles do not
divide, and the scale. A block computes `warpgroups` tiles of queries against all keys. One more warpgroup copies keys
and values to shared memory through TMA. Two warpgroups can take turns: one multiplies, the other does its softmax.

TMA reads zeros past the last token and writes nothing there; the keys past it are masked in the last step alone.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common import device

Operand = jax.Array | jax.ShapeDtypeStruct
REGISTERS = {1: (240, 40), 2: (232, 40), 3: (160, 32)}
"""Registers of a thread that multiplies and of one that loads, by the number of warpgroups that multiply."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        rows: queries of a warpgroup, a multiple of 64.
        keys: of a step, a multiple of 64.
        stages: steps of keys and values in shared memory, at least 2.
        warpgroups: that multiply, 2 or 3.
        turns: whether two warpgroups take turns on the tensor cores.
    """

    rows: int = 64
    keys: int = 128
    stages: int = 2
    warpgroups: int = 3
    turns: bool = False


def heuristic(*, tokens: int, head: int) -> Config:
    """What was fastest at 17,776 tokens and heads of 64 on an H200 (`python -m benchmarks.attention --candidates`)."""
    return Config()


def candidates(*, tokens: int, head: int) -> list[Config]:
    """Worth trying."""
    two = [
        Config(rows=rows, keys=keys, stages=stages, warpgroups=2, turns=turns)
        for rows, keys in ((64, 128), (64, 192), (128, 64), (128, 128), (64, 256))
        for stages in (2, 4)
        for turns in (True, False)
    ]
    three = [Config(rows=64, keys=keys, stages=stages, warpgroups=3) for keys in (64, 128, 192) for stages in (2, 4)]
    return two + three


def refusal(query: Operand, key: Operand, value: Operand) -> str | None:
    """Why this kernel can't do the call on the default device, if so."""
    if query.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {query.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"it takes heads of 64 and 128 values, not {query.shape[-1]}"
    if query.shape[1] < 512 or query.shape[1] % 8:
        return f"it takes a multiple of 8 tokens, from 512 on, not {query.shape[1]}"
    if device.interpreting():
        return "it is not interpreted"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def attention(
    query: Float[Array, "batch tokens heads head"],
    key: Float[Array, "batch tokens heads head"],
    value: Float[Array, "batch tokens heads head"],
    *,
    config: Config | None = None,
) -> Float[Array, "batch tokens heads head"]:
    """See `api.attention`; `config` None takes the heuristic's."""
    if config is None:
        config = heuristic(tokens=query.shape[1], head=query.shape[3])
    return _attention(query, key, value, heads=query.shape[2], first=(0, 0, 0), config=config)


def packed_attention(
    qkv: Float[Array, "batch tokens three_heads head"], *, config: Config | None = None
) -> Float[Array, "batch tokens heads head"]:
    """See `api.packed_attention`; `config` None takes the heuristic's."""
    _, tokens, heads, head = qkv.shape
    heads //= 3
    config = config or heuristic(tokens=tokens, head=head)
    return _attention(qkv, qkv, qkv, heads=heads, first=(0, heads, 2 * heads), config=config)


@functools.partial(jax.jit, static_argnames=("heads", "first", "config"))
def _attention(
    query: Float[Array, "batch tokens query_heads head"],
    key: Float[Array, "batch tokens key_heads head"],
    value: Float[Array, "batch tokens value_heads head"],
    *,
    heads: int,
    first: tuple[int, int, int],
    config: Config,
) -> Float[Array, "batch tokens {heads} head"]:
    """`heads` heads of each operand, from its `first` on."""
    batch, tokens, _, head = query.shape
    steps = pl.cdiv(tokens, config.keys)
    stages = min(config.stages, steps)
    kernel = functools.partial(
        _kernel, config=config, first=first, tokens=tokens, head=head, steps=steps, stages=stages, dtype=query.dtype
    )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads, head), query.dtype),
        scratch_types={
            "tile": _swizzled((config.warpgroups, config.rows, head), query.dtype),
            "keys": _swizzled((stages, config.keys, head), query.dtype),
            "values": _swizzled((stages, config.keys, head), query.dtype),
            "queries_loaded": plgpu.Barrier(num_barriers=config.warpgroups),
            "keys_loaded": plgpu.Barrier(num_barriers=stages),
            "values_loaded": plgpu.Barrier(num_barriers=stages),
            "keys_read": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
            "values_read": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=config.warpgroups),
        },
        grid=(heads, pl.cdiv(tokens, config.warpgroups * config.rows), batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(query, key, value)


def _swizzled(shape: tuple[int, ...], dtype: jnp.dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _kernel(
    query,
    key,
    value,
    out,
    *,
    config: Config,
    first: tuple[int, int, int],
    tokens: int,
    head: int,
    steps: int,
    stages: int,
    dtype,
    **smem,
):
    """A block: `warpgroups` tiles of queries of one sample and head."""
    sample, number, tiles = (jax.lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    warpgroup = jax.lax.axis_index("warpgroup")
    multiplying, loading = REGISTERS[config.warpgroups]

    @pl.when(warpgroup == config.warpgroups)
    def _():
        plgpu.set_max_registers(loading, action="decrease")

        @pl.loop(0, steps)
        def _(step):
            slot = jax.lax.rem(step, stages)
            rows = pl.ds(step * config.keys, config.keys)
            for name, ref, start in (("keys", key, first[1]), ("values", value, first[2])):

                @pl.when(step >= stages)
                def _(name=name):
                    plgpu.barrier_wait(smem[f"{name}_read"].at[slot])

                source = ref.at[sample, rows, start + number]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], smem[f"{name}_loaded"].at[slot])

    @pl.when(warpgroup < config.warpgroups)
    def _():
        plgpu.set_max_registers(multiplying, action="increase")
        row = (tiles * config.warpgroups + warpgroup) * config.rows
        tile = smem["tile"].at[warpgroup]
        rows = pl.ds(row, config.rows)
        plgpu.copy_gmem_to_smem(query.at[sample, rows, first[0] + number], tile, smem["queries_loaded"].at[warpgroup])
        plgpu.barrier_wait(smem["queries_loaded"].at[warpgroup])
        result = _attend(tile, warpgroup, smem, config, tokens, head, steps, stages, dtype)
        tile[...] = result.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[sample, rows, number])
        plgpu.wait_smem_to_gmem(0)


def _attend(tile, warpgroup, smem: dict, config: Config, tokens: int, head: int, steps: int, stages: int, dtype):
    """One warpgroup's queries against all keys -> float32 [rows, head].

    The running maximum is kept in units of log2, so that a weight is one multiply-add and one exp2.
    """
    scale = math.log2(math.e) / math.sqrt(head)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    shape = (config.rows, config.keys)

    def next_turn():
        plgpu.barrier_arrive(smem["turn"])
        plgpu.barrier_wait(smem["turn"])

    def step(index, carry, *, masked: bool = False):
        mixed, largest, total = carry
        slot = jax.lax.rem(index, stages)
        plgpu.barrier_wait(smem["keys_loaded"].at[slot])

        def multiply_keys(accumulators):
            plgpu.wgmma(accumulators, tile, smem["keys"].at[slot].transpose((1, 0)))
            if config.turns:
                next_turn()
            return accumulators[...]

        logits = pl.run_scoped(multiply_keys, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(smem["keys_read"].at[slot])
        if masked:
            position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + index * config.keys
            logits = jnp.where(position < tokens, logits, -jnp.inf)

        new_largest = jnp.maximum(largest, logits.max(axis=1) * scale)
        shrink = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(logits * scale - jax.lax.broadcast_in_dim(new_largest, shape, [0]))
        mixed = mixed * jax.lax.broadcast_in_dim(shrink, mixed.shape, [0])
        total = total * shrink + weights.sum(axis=1)
        rounded = weights.astype(dtype)
        # Keeps the arithmetic above on this side of the barriers.
        mixed, total, new_largest, rounded = jax.lax.optimization_barrier((mixed, total, new_largest, rounded))
        if config.turns:
            plgpu.barrier_arrive(smem["turn"])
        plgpu.barrier_wait(smem["values_loaded"].at[slot])
        if config.turns:
            plgpu.barrier_wait(smem["turn"])

        def multiply_values(accumulators):
            plgpu.wgmma(accumulators, rounded, smem["values"].at[slot])

        mixed = pl.run_state(multiply_values)(plgpu.ACC.init(mixed))
        plgpu.barrier_arrive(smem["values_read"].at[slot])
        return mixed, new_largest, total

    if config.turns:
        pl.when(warpgroup == 1)(next_turn)
    carry = (
        plgpu.layout_cast(jnp.zeros((config.rows, head), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((config.rows,), -jnp.inf, jnp.float32), by_row),
        plgpu.layout_cast(jnp.zeros((config.rows,), jnp.float32), by_row),
    )
    whole = tokens // config.keys
    carry = jax.lax.fori_loop(0, whole, step, carry)
    if whole < steps:
        carry = step(jnp.int32(whole), carry, masked=True)
    if config.turns:
        pl.when(warpgroup == 0)(next_turn)
    mixed, _, total = carry
    return mixed * jax.lax.broadcast_in_dim(1 / total, mixed.shape, [0])
