"""`attention` as one Pallas Mosaic GPU kernel: Hopper.

FlashAttention-3 (arXiv 2407.08608) as JAX's own `attention_mgpu` has it, with what that lacks: tokens that tiles do not
divide, and the scale. A block computes `warpgroups` tiles of queries against all keys. One more warpgroup copies keys
and values to shared memory through TMA. Two warpgroups can take turns: one multiplies, the other does its softmax.

Where no logit can be large (`LARGEST_LOGIT`), the softmax needs no running maximum: exp2 of a logit is then neither
infinite nor lost, whatever the others are. Nothing is rescaled either, so that the values' product of one step and the
keys' of the next follow each other on the tensor cores, and what is left of the softmax is one exp2 a weight.

TMA reads zeros past the last token and writes nothing there; the keys past it are masked in the last step alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.common import device
from pallas_kernels.common.shared_memory import swizzled

Operand = jax.Array | jax.ShapeDtypeStruct
REGISTERS = {2: (232, 40), 3: (160, 32)}
"""Registers of a thread that multiplies and of one that loads, by the number of warpgroups that multiply."""
LARGEST_LOGIT = 80 / math.log2(math.e)
"""Of logits whose softmax needs no maximum: weights are between 2^-80 and 2^80, and float32 holds 2^46 times as much:
room for the sum over all tokens of weights times values."""


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
    logit_bound: Float32[Array, ""] | None = None,
    config: Config | None = None,
) -> Float[Array, "batch tokens heads head"]:
    """See `api.attention`; `config` None takes the heuristic's."""
    operands, first = (query, key, value), (0, 0, 0)
    return _bounded_or_not(operands, logit_bound, heads=query.shape[2], first=first, config=config)


def packed_attention(
    qkv: Float[Array, "batch tokens three_heads head"],
    *,
    logit_bound: Float32[Array, ""] | None = None,
    config: Config | None = None,
) -> Float[Array, "batch tokens heads head"]:
    """See `api.packed_attention`; `config` None takes the heuristic's."""
    heads = qkv.shape[2] // 3
    return _bounded_or_not((qkv,), logit_bound, heads=heads, first=(0, heads, 2 * heads), config=config)


def _bounded_or_not(
    operands: tuple[Array, ...],
    logit_bound: Float32[Array, ""] | None,
    *,
    heads: int,
    first: tuple[int, int, int],
    config: Config | None,
) -> Float[Array, "batch tokens heads head"]:
    _, tokens, _, head = operands[0].shape
    config = config or heuristic(tokens=tokens, head=head)

    def run(*operands: Array, bounded: bool) -> Array:
        query, key, value = operands * (3 // len(operands))
        return _attention(query, key, value, heads=heads, first=first, config=config, bounded=bounded)

    plain, bounded = (functools.partial(run, bounded=choice) for choice in (False, True))
    if logit_bound is None or config.turns or operands[0].dtype == jnp.float16:  # 2^80 is infinite in float16
        return plain(*operands)
    return jax.lax.cond(logit_bound <= LARGEST_LOGIT, bounded, plain, *operands)


@functools.partial(jax.jit, static_argnames=("heads", "first", "config", "bounded"))
def _attention(
    query: Float[Array, "batch tokens query_heads head"],
    key: Float[Array, "batch tokens key_heads head"],
    value: Float[Array, "batch tokens value_heads head"],
    *,
    heads: int,
    first: tuple[int, int, int],
    config: Config,
    bounded: bool,
) -> Float[Array, "batch tokens {heads} head"]:
    """`heads` heads of each operand, from its `first` on."""
    batch, tokens, _, head = query.shape
    steps = pl.cdiv(tokens, config.keys)
    stages = min(config.stages, steps)
    attend = functools.partial(
        _attend_bounded if bounded else _attend,
        config=config,
        tokens=tokens,
        head=head,
        steps=steps,
        stages=stages,
        dtype=query.dtype,
    )
    return plgpu.kernel(
        functools.partial(_kernel, attend=attend, config=config, first=first, steps=steps, stages=stages),
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads, head), query.dtype),
        scratch_types={
            "tile": swizzled((config.warpgroups, config.rows, head), query.dtype),
            "keys": swizzled((stages, config.keys, head), query.dtype),
            "values": swizzled((stages, config.keys, head), query.dtype),
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


def _kernel(
    query,
    key,
    value,
    out,
    *,
    attend: Callable,
    config: Config,
    first: tuple[int, int, int],
    steps: int,
    stages: int,
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
        tile[...] = attend(tile, warpgroup, smem).astype(query.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[sample, rows, number])
        plgpu.wait_smem_to_gmem(0)


def _zeros(shape: tuple[int, ...], layout) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _inside(shape: tuple[int, int], step: Array, config: Config, tokens: int) -> Array:
    """Which of a step's keys there are, for each of its logits."""
    position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + step * config.keys
    return position < tokens


def _attend(
    tile, warpgroup, smem: dict, *, config: Config, tokens: int, head: int, steps: int, stages: int, dtype: jnp.dtype
):
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
            logits = jnp.where(_inside(shape, index, config, tokens), logits, -jnp.inf)

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
        _zeros((config.rows, head), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((config.rows,), -jnp.inf, jnp.float32), by_row),
        _zeros((config.rows,), by_row),
    )
    whole = tokens // config.keys
    carry = jax.lax.fori_loop(0, whole, step, carry)
    if whole < steps:
        carry = step(jnp.int32(whole), carry, masked=True)
    if config.turns:
        pl.when(warpgroup == 0)(next_turn)
    mixed, _, total = carry
    return mixed * jax.lax.broadcast_in_dim(1 / total, mixed.shape, [0])


def _attend_bounded(
    tile, warpgroup, smem: dict, *, config: Config, tokens: int, head: int, steps: int, stages: int, dtype: jnp.dtype
):
    """As `_attend`, of logits of at most `LARGEST_LOGIT`."""
    scale = math.log2(math.e) / math.sqrt(head)
    shape = (config.rows, config.keys)
    whole = tokens // config.keys

    def over_keys(mixed):
        def step(index, total, *, masked: bool = False):
            slot = jax.lax.rem(index, stages)
            plgpu.barrier_wait(smem["keys_loaded"].at[slot])

            def multiply_keys(accumulators):
                plgpu.wgmma(accumulators, tile, smem["keys"].at[slot].transpose((1, 0)))
                return accumulators[...]  # waits for this product and the last step's values

            logits = pl.run_scoped(multiply_keys, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(smem["keys_read"].at[slot])

            @pl.when(index > 0)
            def _():
                plgpu.barrier_arrive(smem["values_read"].at[jax.lax.rem(index + stages - 1, stages)])

            weights = jnp.exp2(logits * scale)
            if masked:
                weights = jnp.where(_inside(shape, index, config, tokens), weights, 0.0)
            total = total + weights.sum(axis=1)
            # Keeps the arithmetic above on this side of the barrier.
            total, rounded = jax.lax.optimization_barrier((total, weights.astype(dtype)))
            plgpu.barrier_wait(smem["values_loaded"].at[slot])
            plgpu.wgmma(mixed, rounded, smem["values"].at[slot])
            return total

        total = jax.lax.fori_loop(0, whole, step, _zeros((config.rows,), plgpu.Layout.WGMMA.reduce(1)))
        if whole < steps:
            total = step(jnp.int32(whole), total, masked=True)
        return mixed[...], total

    mixed, total = pl.run_scoped(over_keys, plgpu.ACC((config.rows, head), jnp.float32))
    return mixed * jax.lax.broadcast_in_dim(1 / total, mixed.shape, [0])
