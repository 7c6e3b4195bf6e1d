"""How long a function takes on the device.

A program calls the function over and over, in a loop inside one computation, so that what it costs to start a
computation is spread over many calls; and on several sets of arguments in turn, so that no argument is still in a cache
when its turn comes again. The device does nothing else meanwhile, so the wall clock around the computation is its time.
The gaps between the kernels of a call are part of it.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds a call, over several runs of the program.

    Attributes:
        median_ms, low_ms, high_ms: of the runs.
        calls: of the function, in one run.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    calls: int

    @property
    def spread(self) -> float:
        """Between the slowest and the fastest run, over the median."""
        return (self.high_ms - self.low_ms) / self.median_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled loop.

    Attributes:
        run: takes the sets of arguments, and returns the last result of each.
        calls: of the function, in one run.
    """

    run: Callable
    calls: int


def compile(
    function: Callable,
    sets: Sequence[tuple],
    *,
    estimate_ms: float,
    run_ms: float = 10.0,
    options: Mapping[str, Any] | None = None,
) -> Program:
    """Compiles the program that times `function(*arguments)`.

    Args:
        function: of arrays, to a tree of arrays.
        sets: of arguments, taken in turn, or their shapes.
        estimate_ms: about how long a call takes; too small a figure makes a run longer, not wrong.
        run_ms: about how long a run is to take; at least three rounds, since XLA writes out a loop that runs once, and
            then sees that nothing reads what came before it.
        options: of XLA's compiler.
    """
    rounds = max(3, math.ceil(run_ms / max(estimate_ms, 1e-3) / len(sets)))
    run = (
        jax.jit(functools.partial(_repeat, function, rounds=rounds))
        .lower(list(sets))
        .compile(dict(options) if options else None)
    )
    return Program(run=run, calls=rounds * len(sets))


def measure(program: Program, sets: Sequence[tuple], *, runs: int = 5) -> Timing:
    """Times a program, after a run that does not count.

    Args:
        program: from `compile`.
        sets: of arguments, as many as there; no two may be the same arrays.
        runs: that count.
    """
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(program.run(list(sets)))
        times.append((time.perf_counter() - start) / program.calls * 1e3)
    del times[0]
    return Timing(median_ms=statistics.median(times), low_ms=min(times), high_ms=max(times), calls=program.calls)


def _repeat(function: Callable, sets: list[tuple], *, rounds: int) -> list:
    """The counter goes through a barrier with the arguments: so nothing of a round can be moved out of the loop, and
    something of the next round depends on the barrier."""

    def one_round(_, carried):
        count, _ = carried
        arguments, count = jax.lax.optimization_barrier((sets, count))
        return count + 1, [function(*each) for each in arguments]

    first = [function(*each) for each in sets]
    return jax.lax.fori_loop(1, rounds, one_round, (jnp.int32(0), first))[1]
