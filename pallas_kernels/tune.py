"""Finds the fastest configurations of the kernels that quantise and multiply, for every real shape on this device.

`python -m pallas_kernels.tune` writes pallas_kernels/tuned/<device kind>.json, which the kernels then read. A
configuration counts only if its result is that of the XLA implementation (see `Workload.tolerance`). Cases that a file
holds already, and that are not tuned in this run, stay in it.
"""

import argparse
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import importlib.metadata
import json
import shlex
import sys
import time
from pathlib import Path

import jax

from pallas_kernels.common import device, timer, tuning
from pallas_kernels.workloads import FUNCTIONS, Workload, everything, implementations, operand_sets, relative_error

FOLDER = Path(__file__).parent / "tuned"


def tune(
    workload: Workload, implementation: str, *, pool: concurrent.futures.Executor, run_ms: float, most: int
) -> dict:
    """Config and time of the fastest candidate, and what became of the others.

    Raises:
        RuntimeError: if no candidate is right.
    """
    module, case = workload.module(implementation), workload.case(implementation)
    sets = operand_sets(workload.make, workload.bytes)
    wanted = jax.jit(workload.function("xla"))(*sets[0])
    configs = list(dict.fromkeys([module.heuristic(**case), *module.candidates(**case)]))[:most]

    def compile_one(config):
        function = workload.function(implementation, config=config)
        return timer.compile(function, sets, estimate_ms=workload.estimate_ms, run_ms=run_ms)

    compiled = [pool.submit(contextvars.copy_context().run, compile_one, config) for config in configs]
    # What is timed has the machine to itself.
    concurrent.futures.wait(compiled)
    found, wrong, failed = {}, [], []
    for config, future in zip(configs, compiled, strict=True):
        if (error := future.exception()) is not None:
            # A candidate may ask for more than the device has; that is what trying is for. It is reported.
            failed.append(f"{config}: {str(error).splitlines()[0][:200]}")
            continue
        program = future.result()
        if not float(relative_error(program.run(sets)[0], wanted)) <= workload.tolerance:
            wrong.append(str(config))
            continue
        found[config] = timer.measure(program, sets, runs=3).median_ms
    if not found:
        raise RuntimeError(f"{workload.operation}/{implementation} {case}: wrong {wrong}, failed {failed}")
    best = min(found, key=found.__getitem__)
    return {
        "config": dataclasses.asdict(best),
        "ms": round(found[best], 5),
        "heuristic_ms": round(found[configs[0]], 5) if configs[0] in found else None,
        "tried": len(found),
        "wrong": wrong,
        "failed": failed,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=list(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument("--only", default="", help="tune only shapes whose name holds this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--targets", nargs="+", help="tune only these types of results; default: all")
    parser.add_argument("--run-ms", type=float, default=4.0, help="how long each of three timed runs takes")
    parser.add_argument("--most", type=int, default=1000, help="try only so many configurations of a case")
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes, interpreted kernels: a try on a CPU")
    parser.add_argument("--out", type=Path, help="file to write, instead of the one that the kernels read")
    options = parser.parse_args(arguments)
    out = options.out or FOLDER / f"{tuning.slug(device.kind())}.json"
    configurations = json.loads(out.read_text())["configurations"] if out.is_file() else {}
    begun, seen = time.monotonic(), set()
    interpreted = device.interpret() if options.tiny else contextlib.nullcontext()
    with interpreted, concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        for workload in everything(tiny=options.tiny):
            if workload.operation not in options.operations or options.only not in workload.name:
                continue
            if options.targets is not None and workload.target not in options.targets:
                continue
            for implementation in implementations(workload.operation):
                if workload.refusal(implementation) is not None or not hasattr(
                    workload.module(implementation), "candidates"
                ):
                    continue
                operation = f"{workload.operation}/{implementation}"
                key = tuning.case_key(**workload.case(implementation))
                if (operation, key) in seen:
                    continue
                seen.add((operation, key))
                if time.monotonic() - begun > options.seconds:
                    print(f"not tuned, out of time: {operation} {key}", flush=True)
                    continue
                result = tune(workload, implementation, pool=pool, run_ms=options.run_ms, most=options.most)
                configurations.setdefault(operation, {})[key] = result
                print(f"{operation} {key}: {result['ms']:.4f} ms {result['config']}", flush=True)
                for kind in ("wrong", "failed"):
                    for line in result[kind]:
                        print(f"  {kind}: {line}", flush=True)
    argv = sys.argv[1:] if arguments is None else arguments
    record = {
        "device": {"kind": device.kind(), "platform": jax.default_backend()},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "command": f"python -m pallas_kernels.tune {shlex.join(argv)}".rstrip(),
        "configurations": configurations,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
