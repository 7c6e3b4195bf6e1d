"""From the start of a process to its first denoising step, without and with what an earlier process compiled.

`python -m benchmarks.start --models 5b --out benchmarks/results/start_<device>.json`

Two processes, one after the other, share an empty directory for JAX's persistent compilation cache. Each makes the
model (random weights of the published configuration, on the device, quantised there; the bundled one is loaded and
quantised), compiles the sampling loop of `--quantization int8-reuse` for one video of the published size, and runs it.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import record
from benchmarks.end_to_end import MODELS
from benchmarks.stages import sampling_arguments
from sixbit_jax.models.split import Split
from sixbit_jax.precision.targets import QuantizationConfig, solve
from sixbit_jax.qtensor import quantize_model
from sixbit_jax.sampling import sampler

STEPS = 10
"""Of the schedule: a program does not grow with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One process; seconds.

    Attributes:
        cached: whether an earlier one had filled the cache.
        imports_s: from its start until Python modules were there.
        weights_s: making the model and quantising it.
        lowering_s: tracing the loop and lowering it to StableHLO.
        compile_s: compiling that, or loading it from the cache.
        first_step_s: from the start of the process until the first step's callback ran.
    """

    model: str
    cached: bool
    imports_s: float
    weights_s: float
    lowering_s: float
    compile_s: float
    first_step_s: float


def measure(model: str, *, cached: bool, begun: float) -> Row:
    """One start: of this process, which began `begun` seconds after the epoch."""
    times, finished = [time.time()], []

    def lap() -> float:
        times.append(time.time())
        return round(times[-1] - times[-2], 2)

    transformer = Split.of(quantize_model(MODELS[model]().merge()))
    arguments = jax.block_until_ready(sampling_arguments(transformer, STEPS))
    weights_s = lap()
    policy = solve(QuantizationConfig.named("int8-reuse"), None, STEPS)
    lowered = sampler.sample.lower(*arguments, policy=policy, on_step=lambda index: finished.append(time.time()))
    lowering_s = lap()
    compiled = lowered.compile()
    compile_s = lap()
    jax.block_until_ready(compiled(*arguments, policy=policy))
    jax.effects_barrier()
    return Row(
        model=model,
        cached=cached,
        imports_s=round(times[0] - begun, 2),
        weights_s=weights_s,
        lowering_s=lowering_s,
        compile_s=compile_s,
        first_step_s=round(finished[0] - begun, 2),
    )


def start(model: str, *, cached: bool, cache: str) -> Row:
    """`measure` in a process of its own."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, "-m", "benchmarks.start", "--models", model, "--begun", str(time.time())]
    command += ["--cached"] if cached else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = [
        "| model | compilation cache | imports | weights | tracing and lowering | compilation | to the first step |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        lines
        + [
            f"| {r.model} | {'filled' if r.cached else 'empty'} | {r.imports_s:.1f} s | {r.weights_s:.1f} s"
            f" | {r.lowering_s:.1f} s | {r.compile_s:.1f} s | {r.first_step_s:.1f} s |"
            for r in rows
        ]
    )


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mini"])
    parser.add_argument("--begun", type=float, help="measure this process, which began then, and print JSON")
    parser.add_argument("--cached", action="store_true", help="with --begun: what to call it")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    if arguments.begun is not None:
        row = measure(arguments.models[0], cached=arguments.cached, begun=arguments.begun)
        print(json.dumps(dataclasses.asdict(row)))
        return [row]
    rows = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as cache:
            rows += [start(model, cached=cached, cache=cache) for cached in (False, True)]
    text = table(rows)
    print(text)
    record.save(arguments.out, record.describe(program="benchmarks.start", argv=argv, rows=rows), text)
    return rows


if __name__ == "__main__":
    main()
