"""Which implementation of an operation runs."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger("pallas_kernels")


def _never(*args, **kwargs) -> None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an operation, which not every device and call can take.

    Attributes:
        run: does the operation.
        refusal: takes what `run` takes; why `run` can't do that call on the default device, or None if it can.
        passed_over: likewise; why the call is run here only by name, although it could be: the next one is faster for
            it, say. None if it is not.
    """

    run: Callable
    refusal: Callable[..., str | None]
    passed_over: Callable[..., str | None] = _never


def choose(
    operation: str, implementations: Mapping[str, Callable | Implementation], name: str | None, *args, **kwargs
) -> Callable:
    """The function of that name; for None the first of the table that does the call, and well.

    The table is in order of preference, and a plain function in it is one that runs anywhere. What None took is logged,
    once a process for each operation. A named implementation is taken or is an error.

    Args:
        operation: for messages.
        implementations: by name.
        name: of an implementation, or None.
        *args, **kwargs: what the function will be called with.

    Raises:
        ValueError: on a name that the table does not hold.
        NotImplementedError: if the implementation of that name, or each one of the table, refuses the call.
    """
    if name is not None and name not in implementations:
        raise ValueError(
            f"{operation}: unknown implementation {name!r}; this version offers {', '.join(implementations)}"
        )
    refusals = {}
    for candidate in implementations if name is None else [name]:
        found = implementations[candidate]
        if not isinstance(found, Implementation):
            found = Implementation(run=found, refusal=_never)
        reason = found.refusal(*args, **kwargs)
        if reason is None and name is None:
            reason = found.passed_over(*args, **kwargs)
        if reason is None:
            if name is None:
                _log_once(operation, candidate)
            return found.run
        refusals[candidate] = reason
    reasons = "; ".join(f"{candidate!r} can't do this call: {reason}" for candidate, reason in refusals.items())
    raise NotImplementedError(f"{operation}: {reasons}")


@functools.cache
def _log_once(operation: str, name: str) -> None:
    logger.info("%s: implementation=None took %r", operation, name)
