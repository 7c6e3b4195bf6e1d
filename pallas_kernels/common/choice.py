"""Which implementation of an operation runs."""

import functools
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger("pallas_kernels")


def choose[F: Callable](operation: str, implementations: Mapping[str, F], name: str | None) -> F:
    """The implementation of that name; for None the first of the table, which is in order of preference.

    What None took is logged, once a process for each operation. A named implementation is taken or is an error.

    Raises:
        ValueError: on a name that the table does not hold.
    """
    if name is None:
        name = next(iter(implementations))
        _log_once(operation, name)
    elif name not in implementations:
        raise ValueError(
            f"{operation}: unknown implementation {name!r}; this version offers {', '.join(implementations)}"
        )
    return implementations[name]


@functools.cache
def _log_once(operation: str, name: str) -> None:
    logger.info("%s: implementation=None took %r", operation, name)
