"""Seconds of the stages of a call, and those that went into compilation."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax


class CompilationClock:
    """Counts the seconds that this process spends tracing, lowering and compiling, each second once."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            while self._spans and self._spans[-1][0] >= start_time:  # a function traced while tracing this one
                self._spans.pop()
            self._spans.append((start_time, end_time))

    def seconds_since(self, moment: float) -> float:
        """Seconds spent in compilations that began after `moment`, a time of `time.time`."""
        return sum(end - start for start, end in self._spans if start >= moment)


compilation_clock = CompilationClock()


@contextlib.contextmanager
def stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Puts the wall-clock seconds of its body into `timings`."""
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start
