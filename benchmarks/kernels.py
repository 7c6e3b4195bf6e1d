"""Time and error of the kernels that quantise and multiply, and of whole linear layers, against XLA with the same work.

`python -m benchmarks.kernels --out benchmarks/results/kernels_<device>.json` on a GPU, in about four minutes. With
`--tiny`, small shapes and interpreted kernels (whole layers by XLA), on a CPU: those times mean nothing. Attention has
a benchmark of its own, `benchmarks.attention`; norms with rotary tables and the delta cache are in `benchmarks.blocks`.

Data is random. The time of a call is that of many calls in one computation, on operands that are not in a cache (see
`pallas_kernels.common.timer`). The ceilings are measured in the same run: a copy for what moves bytes, XLA's best plain
matmul of that type for what multiplies. XLA takes what it finds fastest for a plain matmul in bfloat16 and INT8, and
cuBLAS for one in FP8 and for the twins of ours (`CUBLAS`). Configurations are the tuned ones of this device, or the
heuristic's. Errors of an operation are relative L2 errors against its XLA implementation; those of a whole linear layer
against the bfloat16 layer with the stored weight, so they are what quantising the activation costs.
"""

import argparse
import concurrent.futures
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from pallas_kernels import workloads
from pallas_kernels.common import device, timer
from pallas_kernels.common.epilogue import Epilogue, apply
from pallas_kernels.nvfp4_cast import cast
from pallas_kernels.rotate_quantize import rotate_quantize
from pallas_kernels.scaled_matmul import scaled_matmul
from pallas_kernels.scaled_matmul import shapes as matmul_shapes
from pallas_kernels.workloads import Workload, everything, normal, packed

COPY_BYTES = 2**29
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
"""XLA times hundreds of Triton programs for a product otherwise, for minutes if it is in FP8."""
RATE_OF_TARGET = {"int8": "int8", "fp8": "fp8", "exact": "bfloat16", "bfloat16": "bfloat16"}
LINEARS: dict[str, dict[str, Any] | None] = {
    "bfloat16 (XLA)": None,
    "int8": {"format": "int8"},
    "nvfp4, fp8 carrier": {"format": "nvfp4", "scale_dims": 2, "carrier": "fp8"},
    "nvfp4, exact carrier": {"format": "nvfp4", "scale_dims": 2, "carrier": "exact"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One function to time on the operands of a group.

    Attributes:
        operation, shape, target, implementation: what the row is called.
        function: of the operands.
        bytes, operations: what a call moves and multiplies; operations 0 for what memory limits.
        limit: "copy" or a type of `RATE_OF_TARGET`'s values.
        reference: whether the errors of the group are taken against this one.
        alone: whether XLA compiles it by timing alternatives, so that nothing else may use the device.
        options: of XLA's compiler.
    """

    operation: str
    shape: str
    target: str
    implementation: str
    function: Callable
    bytes: float
    operations: float
    limit: str
    reference: bool = False
    alone: bool = False
    options: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Jobs with the same operands, and how to make those from a key."""

    make: Callable
    jobs: list[Job]


def copy_group(size: int) -> Group:
    """A plain read and write of `size` bytes."""

    def make(key):
        return (normal(key, size // 2),)

    job = Job(
        operation="copy",
        shape=f"{size // 2} values",
        target="bfloat16",
        implementation="XLA",
        function=lambda x: -x,
        bytes=2 * size,
        operations=0,
        limit="copy",
    )
    return Group(make=make, jobs=[job])


def workload_group(workload: Workload) -> Group:
    """An operation's implementations."""
    matmul = bool(workload.operations)
    jobs = [
        Job(
            operation=workload.operation,
            shape=workload.name,
            target=workload.target,
            implementation=name,
            function=workload.function(name),
            bytes=workload.bytes,
            operations=workload.operations,
            limit=RATE_OF_TARGET[workload.target] if matmul else "copy",
            reference=name == "xla",
            alone=name == "xla" and "matmul" in workload.operation,
            options=CUBLAS if name == "xla" and "matmul" in workload.operation else None,
        )
        for name in workloads.implementations(workload.operation)
        if workload.refusal(name) is None
    ]
    return Group(make=workload.make, jobs=jobs)


def plain_group(shape: str, m: int, n: int, k: int, target: str) -> Group:
    """XLA's own product [m, k] x [n, k] of one type, without an epilogue."""
    out = jnp.int32 if target == "int8" else jnp.bfloat16
    size = workloads.BYTES[target]
    out_size = jnp.dtype(out).itemsize

    def make(key):
        a, b = jax.random.split(key)
        return tuple(_plain_codes(each, rows, k, target) for each, rows in ((a, m), (b, n)))

    job = Job(
        operation="plain matmul",
        shape=shape,
        target=target,
        implementation="XLA",
        function=lambda a, b: jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.DEFAULT, preferred_element_type=out
        ),
        bytes=(m + n) * k * size + m * n * out_size,
        operations=2 * m * n * k if m > 16 else 0,
        limit=target if m > 16 else "copy",
        alone=True,
        options=CUBLAS if target == "fp8" else None,
    )
    return Group(make=make, jobs=[job])


def _plain_codes(key, rows: int, k: int, target: str):
    return normal(key, rows, k) if target == "bfloat16" else workloads.codes(key, (rows, k), target).codes


def linear_group(shape: matmul_shapes.Shape, implementation: str | None) -> Group:
    """A whole linear layer from bfloat16 to bfloat16: bias and activation, not the gate."""

    def make(key):
        x, w, b = jax.random.split(key, 3)
        weight = packed(w, shape.n, shape.k)
        wide = cast(weight, to="bfloat16", implementation="xla")
        return normal(x, shape.batch, shape.tokens, shape.k), weight, wide, normal(b, shape.n)

    def bfloat16(x, weight, wide, bias):
        y = jax.lax.dot_general(
            x, wide, (((2,), (1,)), ((), ())), precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
        )
        return apply(Epilogue(bias=bias, activation=shape.activation), y).astype(jnp.bfloat16)

    def quantized(options):
        def run(x, weight, wide, bias):
            a, _ = rotate_quantize(x, **options, implementation=implementation)
            b = cast(weight, to=options.get("carrier", "int8"), implementation=implementation)
            return scaled_matmul(a, b, bias=bias, activation=shape.activation, implementation=implementation)

        return run

    rows = shape.batch * shape.tokens
    jobs = [
        Job(
            operation="whole linear",
            shape=f"{shape.name} {rows}x{shape.n}x{shape.k}",
            target=name,
            implementation="XLA" if options is None else implementation or "best",
            function=bfloat16 if options is None else quantized(options),
            bytes=2 * rows * (shape.n + shape.k),
            operations=2 * rows * shape.n * shape.k,
            limit="bfloat16",
            reference=options is None,
            alone=options is None,
        )
        for name, options in LINEARS.items()
    ]
    return Group(make=make, jobs=jobs)


def groups(*, tiny: bool) -> Iterator[Group]:
    """Everything that is timed."""
    yield copy_group(2**12 if tiny else COPY_BYTES)
    everything_once = {(w.operation, w.target, tuple(sorted(w.sizes.items()))): w for w in everything(tiny=tiny)}
    for workload in everything_once.values():
        if workload.operation == "scaled_matmul" and workload.target == "int8":
            m, n, k = (workload.sizes[name] for name in ("rows", "n", "k"))
            for target in ("bfloat16", "int8", "fp8"):
                yield plain_group(workload.name, m, n, k, target)
        if workload.operation == "weight_only_matmul":
            m, n, k = (workload.sizes[name] for name in ("rows", "n", "k"))
            yield plain_group(workload.name, m, n, k, "bfloat16")
        yield workload_group(workload)
    for shape in matmul_shapes.SMALL[:1] if tiny else matmul_shapes.FULL:
        yield linear_group(shape, "xla" if tiny else None)


def run(todo: list[Group], *, run_ms: float, threads: int) -> list[dict]:
    """Compiles everything, then times it: nothing compiles while something is timed."""
    pairs = [(job, jax.eval_shape(group.make, jax.random.key(0))) for group in todo for job in group.jobs]

    def compile_one(job, spec):
        estimate = workloads.estimate_ms(job.bytes, job.operations)
        loop = timer.compile(
            job.function,
            [spec] * workloads.count_sets(job.bytes),
            estimate_ms=estimate,
            run_ms=run_ms,
            options=job.options,
        )
        # The memory of one call, where it is asked for.
        single = jax.jit(job.function).lower(*spec).compile() if job.operation == "whole linear" else None
        return loop, single

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = [
            None if job.alone else pool.submit(contextvars.copy_context().run, compile_one, job, spec)
            for job, spec in pairs
        ]
        started = [future or compile_one(*pair) for pair, future in zip(pairs, futures, strict=True)]
        compiled = [each.result() if isinstance(each, concurrent.futures.Future) else each for each in started]
    print(f"compiled {len(compiled)} programs", flush=True)
    programs, rows = iter(compiled), []
    for group in todo:
        sets = workloads.operand_sets(group.make, group.jobs[0].bytes)
        runs = [(job, *next(programs)) for job in group.jobs]
        wanted = next((loop.run(sets)[0] for job, loop, _ in runs if job.reference), None)
        for job, loop, single in runs:
            compare = wanted is not None and not job.reference
            error = float(workloads.relative_error(loop.run(sets)[0], wanted)) if compare else None
            rows.append(_row(job, timer.measure(loop, sets), single, error))
            print(_line(rows[-1]), flush=True)
    return rows


def _row(job: Job, timing: timer.Timing, single: jax.stages.Compiled | None, error: float | None) -> dict:
    memory = None if single is None else single.memory_analysis()
    return {
        **{name: getattr(job, name) for name in ("operation", "shape", "target", "implementation", "limit")},
        "ms": timing.median_ms,
        "spread": timing.spread,
        "tb_per_s": job.bytes / timing.median_ms / 1e9,
        "top_per_s": job.operations / timing.median_ms / 1e9,
        "error": error,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def _line(row: dict) -> str:
    names = " ".join(row[name] for name in ("operation", "shape", "target", "implementation"))
    return f"{names}: {row['ms']:.4f} ms"


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds to each row the percent of its ceiling, and how many times faster it is than XLA's bfloat16 there."""
    ceilings = {"copy": max(row["tb_per_s"] for row in rows if row["operation"] == "copy")}
    for row in rows:
        if row["operation"] == "plain matmul" and row["limit"] != "copy":
            ceilings[row["limit"]] = max(ceilings.get(row["limit"], 0), row["top_per_s"])
    rivals = {
        row["shape"]: row["ms"] for row in rows if (row["operation"], row["target"]) == ("plain matmul", "bfloat16")
    }
    layers = {row["shape"]: row["ms"] for row in rows if row["target"] == "bfloat16 (XLA)"}
    rates = {"copy": "tb_per_s"}
    found = []
    for row in rows:
        rival = (layers if row["operation"] == "whole linear" else rivals).get(row["shape"])
        rate = row[rates.get(row["limit"], "top_per_s")]
        found.append(
            row
            | {
                "percent_of_ceiling": 100 * rate / ceilings[row["limit"]],
                "times_xla_bfloat16": None if rival is None else rival / row["ms"],
            }
        )
    return found


def markdown(result: dict) -> str:
    """The result as a page, a table for each operation."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Time of the kernels",
        "",
        f"`{result['command']}`, on {result['device']['kind']}, {versions}.",
        "",
        "Medians of device time, and the spread of the runs. Ceilings, measured in the same run: a copy for TB/s,"
        " and XLA's best plain matmul of that type for TOP/s (for whole linears: of bfloat16). Faster: than XLA's"
        " plain bfloat16 matmul of that shape, or for whole linears than XLA's bfloat16 layer. Temporary: device"
        " memory beside arguments and results.",
    ]
    for operation in dict.fromkeys(row["operation"] for row in result["rows"]):
        lines += [
            "",
            f"## {operation}",
            "",
            "| shape | type | by | ms | spread | TB/s | TOP/s | of ceiling | faster | error | temporary, MB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            if row["operation"] == operation:
                lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict) -> Iterator[str]:
    yield from (row["shape"], row["target"], row["implementation"])
    yield from (f"{row['ms']:.4f}", f"{100 * row['spread']:.0f} %", f"{row['tb_per_s']:.2f}")
    yield f"{row['top_per_s']:.0f}" if row["top_per_s"] else ""
    yield f"{row['percent_of_ceiling']:.0f} %"
    yield "" if row["times_xla_bfloat16"] is None else f"{row['times_xla_bfloat16']:.2f}x"
    yield "" if row["error"] is None else f"{row['error']:.1e}"
    yield "" if row["temporary_bytes"] is None else f"{row['temporary_bytes'] / 1e6:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes and interpreted kernels, for a CPU")
    parser.add_argument("--operations", nargs="+", help="only these, beside the copy; as the tables are headed")
    parser.add_argument("--only", nargs="+", default=[], help="only shapes and types with all of this in their names")
    parser.add_argument("--run-ms", type=float, default=6.0, help="how long each of five timed runs takes, about")
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--out", type=Path, help="JSON to write; the tables go beside it as .md")
    options = parser.parse_args(arguments)
    with device.interpret() if options.tiny else contextlib.nullcontext():
        todo = [
            group
            for group in groups(tiny=options.tiny)
            if group.jobs[0].operation == "copy"
            or (
                (options.operations is None or group.jobs[0].operation in options.operations)
                and all(part in f"{group.jobs[0].shape}, {group.jobs[0].target}" for part in options.only)
            )
        ]
        # Ceilings first, so that results can be kept after each operation.
        operations = dict.fromkeys(group.jobs[0].operation for group in todo)
        rows: list[dict] = []
        for operation in sorted(operations, key=lambda name: (name != "copy", name != "plain matmul")):
            chosen = [group for group in todo if group.jobs[0].operation == operation]
            rows += run(chosen, run_ms=options.run_ms, threads=options.threads)
            result = record.describe(program="benchmarks.kernels", argv=arguments, rows=with_ratios(rows))
            record.save(options.out, result, text := markdown(result))
    print(text, end="")


if __name__ == "__main__":
    main()
