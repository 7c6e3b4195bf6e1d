"""The sampling loop of full-size CogVideoX under each way to run it: bf16, INT8, and INT8 with blocks skipped.

`python -m benchmarks.end_to_end --models 5b --steps 10 --out benchmarks/results/end_to_end_<device>.json`

Random weights of the published configurations, made on the device; 49 frames of 480 x 720, guidance 6, one video. Time
is that of the compiled loop on its second call, synchronised, divided by its steps. Memory is what XLA's own analysis
says of that program: arguments (weights included), temporaries and results together.

Which blocks are skipped is prescribed here (all of them, at steps spread evenly), since random weights say nothing
about when it is safe. Skipped as whole steps, the program is that of `skip_every`. Skipped block by block, everything
that a live decision costs is in it: the branch around each block, volatility and delta change of computed blocks, and a
cache of every block's delta. With `--bits`, that many mean bits come from running some of the blocks in NVFP4, in E4M3
operands on tensor cores that have no NVFP4.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from matplotlib.figure import Figure

from benchmarks import record
from benchmarks.stages import random_model, sampling_arguments
from sixbit_jax import Pipeline
from sixbit_jax.config import TransformerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES
from sixbit_jax.models.split import Split
from sixbit_jax.precision import ConstantRouter, NeverSkip, PrecisionPolicy
from sixbit_jax.precision.accounting import site_weights, summary
from sixbit_jax.precision.routers import INT8, NVFP4, TableRouter
from sixbit_jax.precision.types import Observation, Progress
from sixbit_jax.qtensor import quantize_model
from sixbit_jax.sampling import sampler

MODELS: dict[str, Callable[[], Split]] = {
    "mini": lambda: Pipeline.from_pretrained("mini").transformer,
    "2b": lambda: random_model(CogVideoXTransformer3DModel, TransformerConfig.cogvideox_2b()),
    "5b": lambda: random_model(CogVideoXTransformer3DModel, TransformerConfig.cogvideox_5b()),
}


@struct.dataclass(kw_only=True)
class Prescribed:
    """Skips all blocks at a share of the steps, spread evenly: as `EveryNth` does, or block by block, measuring what
    `DeltaSkipper` would."""

    share: float = struct.field(pytree_node=False)
    whole_steps: bool = struct.field(pytree_node=False)
    never = False

    @property
    def observes(self) -> bool:
        return not self.whole_steps

    def init(self, blocks: int, groups: int) -> None:
        return None

    def decide(self, state: None, observation: Observation, progress: Progress) -> tuple[jax.Array, jax.Array, None]:
        skips = np.zeros(progress.steps + 1, bool)
        skips[np.linspace(2, progress.steps - 2, round(self.share * progress.steps)).round().astype(int)] = True
        shape = observation.computed.shape
        skip, soon = (jnp.broadcast_to(jnp.asarray(skips)[progress.step + i], shape) for i in range(2))
        return skip, soon & ~skip, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run one model.

    Attributes:
        skip_share: of all block-steps.
        mean_bits: activation bits over all multiply-adds of linears, skipped ones as 0.
        step_ms: one guided step.
        speed: of the model's bf16 row in the same run, over this.
        weights_gib: the transformer's parameters.
        peak_gib: the whole program.
        compile_s: tracing, lowering and compiling.
    """

    model: str
    name: str
    steps: int
    skip_share: float
    mean_bits: float
    step_ms: float
    speed: float
    weights_gib: float
    peak_gib: float
    compile_s: float


def policies(
    blocks: int, *, shares: list[float], block_shares: list[float], caches: list[str], bits: list[float]
) -> dict[str, PrecisionPolicy]:
    """Rows after bf16, by name."""
    router = ConstantRouter(route="int8")
    rows = {"INT8": PrecisionPolicy(router=router, skipper=NeverSkip())}
    for wanted in bits:
        routes = np.full((1, blocks, len(SITES)), INT8)
        routes[:, np.linspace(0, blocks - 1, round(blocks * (8 - wanted) / 4)).round().astype(int)] = NVFP4
        name = f"INT8 and NVFP4, {wanted:g} bits, fp8 carrier"
        rows[name] = PrecisionPolicy(router=TableRouter.of(routes), skipper=NeverSkip(), carrier="fp8")
    for share in shares:
        skipper = Prescribed(share=share, whole_steps=True)
        rows[f"INT8, {share:.0%} of the steps skipped"] = PrecisionPolicy(router=router, skipper=skipper)
    for share, cache in itertools.product(block_shares, caches):
        skipper = Prescribed(share=share, whole_steps=False)
        name = f"INT8, {share:.0%} of the blocks skipped, cache {cache}"
        rows[name] = PrecisionPolicy(router=router, skipper=skipper, cache_format=cache)
    return rows


def measure(model: str, name: str, transformer: Split, policy: PrecisionPolicy | None, steps: int) -> Row:
    """Compiles and times one row; `speed` is still to be filled in."""
    start = time.perf_counter()
    arguments = sampling_arguments(transformer, steps)
    compiled = sampler.sample.lower(*arguments, policy=policy).compile()
    compile_s = time.perf_counter() - start
    for _ in range(2):
        start = time.perf_counter()
        _, trace = jax.block_until_ready(compiled(*arguments, policy=policy))
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    skip_share, mean_bits = 0.0, 16.0
    if policy is not None:
        counted = summary(trace.precision.bits, site_weights(transformer.merge().config))
        skip_share, mean_bits = counted.skip_share, counted.mean_bits
    return Row(
        model=model,
        name=name,
        steps=steps,
        skip_share=round(float(skip_share), 4),
        mean_bits=round(float(mean_bits), 3),
        step_ms=round(seconds / steps * 1000, 2),
        speed=1.0,
        weights_gib=round(sum(leaf.nbytes for leaf in jax.tree.leaves(transformer)) / 2**30, 3),
        peak_gib=round(peak / 2**30, 3),
        compile_s=round(compile_s, 1),
    )


def rows(model: str, steps: int, **wanted: Any) -> Iterator[Row]:
    """All rows of a model, bf16 first; `wanted` as in `policies`."""
    transformer = MODELS[model]()
    baseline = measure(model, "bf16", transformer, None, steps)
    yield baseline
    transformer = Split.of(quantize_model(transformer.merge()))
    blocks = transformer.merge().config.num_layers
    for name, policy in policies(blocks, **wanted).items():
        row = measure(model, name, transformer, policy, steps)
        yield dataclasses.replace(row, speed=round(baseline.step_ms / row.step_ms, 3))


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = [
        "| model | configuration | skipped | mean bits | step | speed | weights | peak memory | compilation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.name} | {r.skip_share:.0%} | {r.mean_bits:.1f} | {r.step_ms:.1f} ms | {r.speed:.2f}x"
        f" | {r.weights_gib:.2f} GiB | {r.peak_gib:.2f} GiB | {r.compile_s:.0f} s |"
        for r in rows
    ]
    return "\n".join(lines)


def draw(found: list[Row], path: Path) -> None:
    """A picture of step time by share of skipped blocks, a line for each model, with its bf16 and what is ideal."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(dict.fromkeys(row.model for row in found)):
        own = [row for row in found if row.model == model]
        start = next((r.skip_share, r.step_ms) for r in own if r.name == "INT8")
        for style, label, kind in (("o-", "whole steps", "steps skipped"), ("s--", "block by block", "blocks skipped")):
            if curve := sorted((r.skip_share, r.step_ms) for r in own if kind in r.name):
                points = zip(start, *curve, strict=True)
                axes.plot(*points, style, color=f"C{i}", label=f"{model}, INT8, skipped {label}")
        ideal = [(share, start[1] * (1 - share)) for share in (0, max(r.skip_share for r in own))]
        axes.plot(*zip(*ideal, strict=True), ":", color=f"C{i}", label="if a skip cost nothing")
        axes.axhline(own[0].step_ms, color=f"C{i}", linestyle="--", label=f"{model}, bf16")
    to_bits, to_share = lambda x: 8 * (1 - np.asarray(x)), lambda x: 1 - np.asarray(x) / 8
    bits = axes.secondary_xaxis("top", functions=(to_bits, to_share))
    bits.set_xlabel("mean activation bits")
    axes.set(xlabel="share of the blocks that is skipped", ylabel="a guided step, ms", ylim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mini"])
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of each run")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.4, 0.5], help="of skipped steps")
    parser.add_argument(
        "--block-shares", type=float, nargs="*", default=[0.3], help="of blocks, skipped one by one, with a delta each"
    )
    parser.add_argument(
        "--bits", type=float, nargs="*", default=[], help="mean bits of a mix of INT8 and NVFP4, 4 to 8"
    )
    parser.add_argument("--caches", nargs="+", default=["nvfp4"], help="formats of the blocks' delta cache")
    parser.add_argument("--out", type=Path, help="JSON to write; the table and a picture go beside it")
    arguments = parser.parse_args(argv)
    wanted = {name: getattr(arguments, name) for name in ("caches", "bits")}
    for name in ("shares", "block_shares"):  # rows are named by what comes of it: whole steps
        wanted[name] = [round(share * arguments.steps) / arguments.steps for share in getattr(arguments, name)]
    found: list[Row] = []
    for model in arguments.models:
        for row in rows(model, arguments.steps, **wanted):
            found.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            result = record.describe(program="benchmarks.end_to_end", argv=argv, rows=found)
            record.save(arguments.out, result, table(found))
    if arguments.out is not None:
        draw(found, arguments.out.with_suffix(".png"))
    return found


if __name__ == "__main__":
    main()
