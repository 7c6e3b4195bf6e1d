"""`scaled_matmul` as one Pallas Mosaic GPU kernel: Hopper.

A persistent, warp-specialised kernel, in the manner of JAX's own Hopper matmul. One warpgroup copies tiles of the
operands to shared memory through TMA; others multiply them there with wgmma, a share of the tile's rows each, and
finish their share from registers. Tails need no care of ours: TMA reads zeros past the end of an array, and writes
nothing there.

What the epilogue needs of a row or a column comes as two small float32 arrays, loaded with each tile: `rows` [samples,
tokens], the scale of a, and `columns` [samples, parts, N], the scale of b, the bias and the two gates.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.common import device
from pallas_kernels.common.epilogue import Epilogue, finish, select_gate, tanh_by_exp2
from pallas_kernels.common.formats import CarriedArray, Int8Array
from pallas_kernels.common.shared_memory import swizzled
from pallas_kernels.common.tuning import configured
from pallas_kernels.scaled_matmul.case import case

STEP_BYTES = 128
"""Bytes of a row that a step multiplies: the width of the widest swizzle."""
SHARED_MEMORY = 226 * 1024
"""Bytes of a block for operands and results; Hopper has 227 KiB, and barriers take a little."""
WARPGROUPS = 2
"""Those that multiply; one more loads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        tile_m: rows of the result that a block computes at a time, 128 or 256.
        tile_n: columns, a multiple of `store_n`; tile_m * tile_n is at most 128 * 256.
        stages: steps of operands in shared memory, as far as it holds so many; at least 2.
        store_n: columns that are finished and stored at a time, a multiple of 16 bytes of them.
        slots: such pieces in shared memory, at least 2.
        group: tiles of columns done for each row of tiles before the next row; the order of tiles, for the L2 cache.
        cluster: blocks that share their tiles of b: 1 or 2, one above the other.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    store_n: int = 32
    slots: int = 2
    group: int = 8
    cluster: int = 1


NARROW = {"tile_n": 192, "store_n": 64}


def heuristic(*, rows: int, n: int, k: int, itemsize: int, gated: bool) -> Config:
    """What was fastest on the shapes of CogVideoX on an H200.

    A tile of 256 columns moves the fewest bytes. For short sums one of 192 is taken where it wastes less of the last
    tiles, and for gated products, whose epilogue is then a large part of the work.
    """
    if n < 192:
        return Config(tile_n=128)
    short = k * itemsize <= 8192
    wasteful = _columns_computed(rows, n, 256) > 1.015 * _columns_computed(rows, n, 192)
    if n < 256 or (short and (gated or wasteful)):
        return Config(**NARROW)
    return Config(slots=3 if gated else 2)


def candidates(*, rows: int, n: int, k: int, itemsize: int, gated: bool) -> list[Config]:
    """What is worth timing, the heuristic's first."""
    wide = [Config(slots=slots, group=group) for slots in (2, 3) for group in (8, 16, 36)]
    others = [
        *wide,
        Config(cluster=2),
        Config(stages=3, store_n=64),
        Config(**NARROW),
        Config(**NARROW, slots=3),
        Config(**NARROW, group=16),
        Config(**NARROW, cluster=2),
        Config(tile_n=240, store_n=48),
        Config(tile_n=128, store_n=64, stages=5),
    ]
    first = heuristic(rows=rows, n=n, k=k, itemsize=itemsize, gated=gated)
    return list(dict.fromkeys([first, *(config for config in others if config.tile_n <= n)]))


def _columns_computed(rows: int, n: int, tile_n: int) -> int:
    """Columns that the busiest block computes, for tiles of 128 rows on as many blocks as an H100 has."""
    return pl.cdiv(pl.cdiv(rows, 128) * pl.cdiv(n, tile_n), 132) * tile_n


def refusal(
    a: Int8Array | CarriedArray, b: Int8Array | CarriedArray, *, epilogue: Epilogue, out_dtype: DTypeLike
) -> str | None:
    """Why this kernel can't do the call on the default device, if so."""
    n, k = b.shape
    tokens = a.shape[-2] if epilogue.gate is not None else math.prod(a.shape[:-1])
    itemsize, out_itemsize = a.codes.dtype.itemsize, jnp.dtype(out_dtype).itemsize
    if k * itemsize % STEP_BYTES or n * out_itemsize % STEP_BYTES or tokens % 8:
        return (
            f"rows of operands and result must be multiples of {STEP_BYTES} bytes, and come by 8; here {tokens} rows,"
            f" K = {k} of {itemsize} bytes, N = {n} of {out_itemsize}"
        )
    if k * itemsize <= 2 * STEP_BYTES or tokens < 128 or n < 128:
        return f"its tiles are larger than a product of {tokens} rows, N = {n}, K = {k}"
    if epilogue.residual is not None and epilogue.residual.dtype != out_dtype:
        return f"the residual is {epilogue.residual.dtype}, and the result {jnp.dtype(out_dtype)}"
    return device.refusal(at_least=(9, 0), below=(10, 0))


def scaled_matmul(
    a: Int8Array | CarriedArray,
    b: Int8Array | CarriedArray,
    *,
    epilogue: Epilogue,
    out_dtype: DTypeLike,
    config: Config | None = None,
) -> Float[Array, "*rows n"] | Int32[Array, "*rows n"]:
    """See `api.scaled_matmul`; `config` None takes what `tuning.configured` finds."""
    if config is None:
        config = configured("scaled_matmul/pallas_mosaic_gpu", heuristic, **case(a, b, epilogue))
    interpret = device.interpreting()
    blocks = config.cluster * 2 if interpret else device.core_count()
    return _scaled_matmul(a, b, epilogue, out_dtype=out_dtype, config=config, blocks=blocks, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "blocks", "interpret"))
def _scaled_matmul(
    a: Int8Array | CarriedArray,
    b: Int8Array | CarriedArray,
    epilogue: Epilogue,
    *,
    out_dtype: DTypeLike,
    config: Config,
    blocks: int,
    interpret: bool,
) -> Float[Array, "*rows n"] | Int32[Array, "*rows n"]:
    (n, k), rows = b.shape, a.shape[:-1]
    # Only a gate tells samples apart; a tile never crosses from one to the next.
    samples, tokens = rows if epilogue.gate is not None else (1, math.prod(rows))
    scaled = out_dtype != jnp.int32
    operands = {"a": a.codes.reshape(samples, tokens, k), "b": b.codes}
    if scaled:
        operands |= {
            "rows": _rows(jnp.reshape(a.scale, (samples, tokens))),
            "columns": _columns(jnp.asarray(b.scale), epilogue, samples),
        }
    if epilogue.residual is not None:
        operands["residual"] = epilogue.residual
    plan = _Plan(
        samples=samples,
        tokens=tokens,
        n=n,
        k=k,
        dtype=a.codes.dtype,
        out_dtype=jnp.dtype(out_dtype),
        parts=operands["columns"].shape[1] if scaled else 0,
        epilogue=jax.tree.map(lambda _: True, epilogue),
        config=config,
    )
    if min(plan.stages, plan.slots) < 2:
        raise ValueError(f"{config} comes to {plan.stages} stages and {plan.slots} slots; each must be at least 2")
    result = plgpu.kernel(
        functools.partial(_kernel, plan=plan, names=tuple(operands)),
        out_type=jax.ShapeDtypeStruct((samples, tokens, n), out_dtype),
        scratch_types=plan.scratch(),
        grid=(min(blocks // config.cluster, plan.tiles),),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands.values())
    return result.reshape(*rows, n)


def _rows(scale: Float32[Array, "samples tokens"]) -> Float32[Array, "samples padded"]:
    """With rows that TMA can address: multiples of 16 bytes."""
    return jnp.pad(scale, ((0, 0), (0, -scale.shape[1] % 4)))


def _columns(scale: Float32[Array, " n"], epilogue: Epilogue, samples: int) -> Float32[Array, "samples parts n"]:
    """Scale, and bias and both gates if there are any."""
    shared = [scale] if epilogue.bias is None else [scale, epilogue.bias.astype(jnp.float32)]
    columns = jnp.broadcast_to(jnp.stack(shared), (samples, len(shared), *scale.shape))
    return columns if epilogue.gate is None else jnp.concatenate([columns, epilogue.gate.astype(jnp.float32)], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Sizes of one call; `epilogue` has True for each array that is there."""

    samples: int
    tokens: int
    n: int
    k: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    parts: int
    epilogue: Epilogue
    config: Config

    @property
    def share_m(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.config.tile_m // WARPGROUPS

    @property
    def step(self) -> int:
        return STEP_BYTES // self.dtype.itemsize

    @property
    def steps(self) -> int:
        return pl.cdiv(self.k, self.step)

    @property
    def stages(self) -> int:
        """As many as fit, and fewer than steps: the vectors of a tile have two slots, and who loads those of the tile
        after next has then seen a step of the next tile multiplied, so that the slot is free."""
        operands = (self.config.tile_m + self.config.tile_n) * STEP_BYTES
        results = WARPGROUPS * self.slots * self.share_m * self.config.store_n * self.out_dtype.itemsize
        vectors = 2 * (self.config.tile_m + self.parts * self.config.tile_n) * 4
        return min(self.config.stages, self.steps - 1, (SHARED_MEMORY - results - vectors) // operands)

    @property
    def pieces(self) -> int:
        return self.config.tile_n // self.config.store_n

    @property
    def slots(self) -> int:
        return min(self.config.slots, self.pieces)

    @property
    def tiles_n(self) -> int:
        return pl.cdiv(self.n, self.config.tile_n)

    @property
    def tiles_m(self) -> int:
        """Of one sample, in clusters."""
        return pl.cdiv(self.tokens, self.config.tile_m * self.config.cluster)

    @property
    def tiles(self) -> int:
        return self.samples * self.tiles_m * self.tiles_n

    @property
    def accumulator(self) -> jnp.dtype:
        return jnp.dtype(jnp.int32 if self.dtype == jnp.int8 else jnp.float32)

    def scratch(self) -> dict:
        config = self.config
        arrivals = {"num_arrivals": WARPGROUPS, "num_barriers": self.stages}
        scratch = {
            "a_smem": swizzled((self.stages, WARPGROUPS, self.share_m, self.step), self.dtype),
            "b_smem": swizzled((self.stages, config.tile_n, self.step), self.dtype),
            "out_smem": swizzled((WARPGROUPS, self.slots, self.share_m, config.store_n), self.out_dtype),
            "loaded": plgpu.Barrier(num_arrivals=WARPGROUPS + 1, num_barriers=self.stages),
            "multiplied": plgpu.Barrier(**arrivals)
            if config.cluster == 1
            else plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals),
        }
        if self.parts:
            scratch |= {
                "rows_smem": plgpu.SMEM((2, config.tile_m), jnp.float32),
                "columns_smem": plgpu.SMEM((2, self.parts, config.tile_n), jnp.float32),
                "vectors_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            }
        if self.epilogue.residual:
            scratch["residual_loaded"] = plgpu.Barrier(num_barriers=WARPGROUPS * self.slots)
        return scratch


def _kernel(*refs, plan: _Plan, names: tuple[str, ...], **smem) -> None:
    """A block: it takes every so-manieth tile."""
    *inputs, out_gmem = refs
    gmem = dict(zip(names, inputs, strict=True)) | {"out": out_gmem}
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _load(gmem, smem, plan)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _multiply(gmem, smem, plan, warpgroup)


def _each_tile(plan: _Plan):
    """Decorates a function of (number of the tile in this block, sample, first row, first column) to run it for each.

    Tiles go down in bands of `group` columns of tiles, and the next band goes up.
    """
    config = plan.config

    def decorator(body):
        @plgpu.nd_loop((plan.samples, plan.tiles_m * plan.tiles_n), collective_axes="block")
        def _(loop):
            sample, tile = loop.index
            row, column = plgpu.planar_snake(tile, (plan.tiles_m, plan.tiles_n), 1, config.group)
            if config.cluster > 1:
                row = row * config.cluster + jax.lax.axis_index("cluster")
            body(loop.local_index, sample, row * config.tile_m, column * config.tile_n)

    return decorator


def _load(gmem: dict, smem: dict, plan: _Plan) -> None:
    """The warpgroup that copies operands to shared memory, as far ahead as there is room."""
    config, stages = plan.config, plan.stages

    @_each_tile(plan)
    def _(local, sample, row, column):
        if plan.parts:
            slot = jax.lax.rem(local, 2)
            barrier = smem["vectors_loaded"].at[slot]
            plgpu.copy_gmem_to_smem(
                gmem["rows"].at[sample, pl.ds(row, config.tile_m)], smem["rows_smem"].at[slot], barrier
            )
            plgpu.copy_gmem_to_smem(
                gmem["columns"].at[sample, :, pl.ds(column, config.tile_n)], smem["columns_smem"].at[slot], barrier
            )

        @pl.loop(0, plan.steps)
        def _(i):
            step = local * plan.steps + i
            slot = jax.lax.rem(step, stages)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(smem["multiplied"].at[slot])

            barrier = smem["loaded"].at[slot]
            ks = pl.ds(i * plan.step, plan.step)
            for share in range(WARPGROUPS):
                rows = pl.ds(row + share * plan.share_m, plan.share_m)
                plgpu.copy_gmem_to_smem(gmem["a"].at[sample, rows, ks], smem["a_smem"].at[slot, share], barrier)
            plgpu.copy_gmem_to_smem(
                gmem["b"].at[pl.ds(column, config.tile_n), ks],
                smem["b_smem"].at[slot],
                barrier,
                collective_axes="cluster" if config.cluster > 1 else None,
            )

    # Each slot is in use once more. Nobody signals a block that has left.
    for slot in range(stages):
        plgpu.barrier_wait(smem["multiplied"].at[slot])


def _multiply(gmem: dict, smem: dict, plan: _Plan, share: Int32[Array, ""]) -> None:
    """A warpgroup that multiplies: one share of the rows of each tile."""
    config, stages = plan.config, plan.stages

    @_each_tile(plan)
    def _(local, sample, row, column):
        row = row + share * plan.share_m
        first = local * plan.steps

        def product(accumulators):
            def multiply(step):
                slot = jax.lax.rem(step, stages)
                plgpu.barrier_wait(smem["loaded"].at[slot])
                plgpu.wgmma(accumulators, smem["a_smem"].at[slot, share], smem["b_smem"].at[slot].transpose((1, 0)))

            def release(step):
                plgpu.barrier_arrive(smem["multiplied"].at[jax.lax.rem(step, stages)])

            multiply(first)
            if plan.epilogue.residual:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for piece in range(plan.slots):
                    _load_residual(gmem, smem, plan, share, sample, row, column, piece)

            @pl.loop(1, plan.steps)
            def _(i):
                multiply(first + i)
                plgpu.wgmma_wait(1)
                release(first + i - 1)

            result = accumulators[...]
            release(first + plan.steps - 1)
            return result

        accumulators = pl.run_scoped(product, plgpu.ACC((plan.share_m, config.tile_n), plan.accumulator))
        _finish(accumulators, gmem, smem, plan, share, local, sample, row, column)

    plgpu.wait_smem_to_gmem(0)


def _load_residual(gmem, smem, plan, share, sample, row, column, piece) -> None:
    """Starts copying a piece of the residual to where the result of that piece will be, if there is such a piece."""
    if plan.epilogue.residual and piece < plan.pieces:
        store_n, slot = plan.config.store_n, piece % plan.slots
        plgpu.copy_gmem_to_smem(
            gmem["residual"].at[sample, pl.ds(row, plan.share_m), pl.ds(column + piece * store_n, store_n)],
            smem["out_smem"].at[share, slot],
            smem["residual_loaded"].at[share * plan.slots + slot],
        )


def _finish(accumulators, gmem, smem, plan, share, local, sample, row, column) -> None:
    """Epilogue of a share of a tile, piece by piece, each stored while the next is computed."""
    config, epilogue = plan.config, plan.epilogue
    y = accumulators
    if plan.parts:
        vectors = jax.lax.rem(local, 2)
        plgpu.barrier_wait(smem["vectors_loaded"].at[vectors])
        scale = plgpu.load(
            smem["rows_smem"].at[vectors, pl.ds(share * plan.share_m, plan.share_m)],
            layout=plgpu.Layout.WGMMA.reduce(1),
        )
        y = y.astype(jnp.float32) * jax.lax.broadcast_in_dim(scale, y.shape, (0,))
    for piece in range(plan.pieces):
        start, slot = piece * config.store_n, piece % plan.slots
        shape = (plan.share_m, config.store_n)
        staged = smem["out_smem"].at[share, slot]
        part = y[:, start : start + config.store_n]

        def column_vector(index, start=start, shape=shape):
            ref = smem["columns_smem"].at[vectors, index, pl.ds(start, config.store_n)]
            return jax.lax.broadcast_in_dim(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0)), shape, (1,))

        if plan.parts:
            part = part * column_vector(0)
            parts = {"bias": column_vector(1)} if epilogue.bias else {}
            if epilogue.gate:
                rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + row
                gates = (column_vector(plan.parts - 2), column_vector(plan.parts - 1))
                plgpu.barrier_wait(smem["residual_loaded"].at[share * plan.slots + slot])
                parts["gate"] = select_gate(rows < epilogue.text_length, *gates)
                parts["residual"] = plgpu.load(staged, layout=plgpu.Layout.WGMMA)
            tanh = jnp.tanh if plan.out_dtype.itemsize == 2 else tanh_by_exp2
            part = finish(part, activation=epilogue.activation, tanh=tanh, **parts)
        if not epilogue.residual:
            plgpu.wait_smem_to_gmem(plan.slots - 1, wait_read_only=True)
        staged[...] = part.astype(plan.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            staged, gmem["out"].at[sample, pl.ds(row, plan.share_m), pl.ds(column + start, config.store_n)]
        )
        if epilogue.residual and 0 < piece < plan.pieces - plan.slots + 1:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            _load_residual(gmem, smem, plan, share, sample, row, column, piece - 1 + plan.slots)
