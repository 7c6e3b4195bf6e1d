"""Time and error of every implementation of attention on the shapes of CogVideoX, on a GPU.

`python -m benchmarks.attention --out benchmarks/results/attention_<device>.json`; `--candidates` tries other tile sizes
of the Mosaic kernel too. Random bfloat16 data; a time is the least of three means over `--calls` calls, synchronised
once; the error is the relative L2 distance of one head to the same head in float32.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import record
from pallas_kernels.attention import attention, pallas_mosaic_gpu, shapes, xla
from pallas_kernels.attention.api import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation on one shape; `slowest_ms` is the largest of the three means."""

    shape: str
    implementation: str
    ms: float
    slowest_ms: float
    tflops: float
    error: float


def measure(shape: shapes.Shape, name: str, run: Callable[..., jax.Array], calls: int) -> Row:
    """Checks and times one implementation."""
    size = (shape.batch, shape.tokens, shape.heads, shape.head)
    operands = [jax.random.normal(k, size, jnp.bfloat16) for k in jax.random.split(jax.random.key(0), 3)]
    run = jax.jit(run)
    last = [x[-1:, :, -1:].astype(jnp.float32) for x in (*operands, run(*operands))]
    with jax.default_matmul_precision("highest"):
        wanted = xla.attention(*last[:3])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls - 1):
            run(*operands)
        run(*operands).block_until_ready()
        times.append((time.perf_counter() - start) / calls * 1000)
    operations = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.head
    return Row(
        shape=shape.name,
        implementation=name,
        ms=round(min(times), 3),
        slowest_ms=round(max(times), 3),
        tflops=round(operations / min(times) / 1e9, 1),
        error=float(f"{jnp.linalg.norm(last[3] - wanted) / jnp.linalg.norm(wanted):.3g}"),
    )


def bounded(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """With a promise that no logit is large, which holds for normal rows; the norms of a model give such bounds."""
    largest = jnp.float32(pallas_mosaic_gpu.LARGEST_LOGIT)
    return attention(query, key, value, logit_bound=largest, implementation="pallas_mosaic_gpu")


def rows(which: tuple[shapes.Shape, ...], names: list[str], calls: int, candidates: bool) -> Iterator[Row]:
    """All rows."""
    for shape in which:
        runs: dict[str, Callable] = {
            name: lambda q, k, v, name=name: attention(q, k, v, implementation=name) for name in names
        }
        if "pallas_mosaic_gpu" in names:
            runs["pallas_mosaic_gpu, bounded logits"] = bounded
        if candidates:
            for config in pallas_mosaic_gpu.candidates(tokens=shape.tokens, head=shape.head):
                runs[str(config)] = lambda q, k, v, c=config: pallas_mosaic_gpu.attention(q, k, v, config=c)
        for name, run in runs.items():
            yield measure(shape, name, run, calls)


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = ["| shape | implementation | ms | TFLOP/s | relative error |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.shape} | {r.implementation} | {r.ms:.2f} to {r.slowest_ms:.2f} | {r.tflops:.0f} | {r.error:.1e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--implementations", nargs="+", choices=list(IMPLEMENTATIONS), default=["pallas_mosaic_gpu", "cudnn"]
    )
    parser.add_argument("--candidates", action="store_true", help="time all tile sizes of the Mosaic kernel")
    parser.add_argument("--calls", type=int, default=8, help="in each of three runs")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    which = shapes.SMALL if arguments.tiny else shapes.FULL
    found = []
    for row in rows(which, arguments.implementations, arguments.calls, arguments.candidates):
        found.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    record.save(arguments.out, record.describe(program="benchmarks.attention", argv=argv, rows=found), table(found))
    return found


if __name__ == "__main__":
    main()
