"""What the commands (`sixbit`, `python -m convert`) share: how they end."""

import functools
import signal
import sys
from collections.abc import Callable

import typer

from sixbit_jax.errors import SixbitError


def shows_user_errors[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Makes a user's mistake one line on stderr and exit code 2, as typer does for a wrong option.

    Our own errors (`SixbitError`) and the system's (`OSError`: a full disk, a forbidden folder) count as such. A plain
    ValueError does not: every one that we foresee is a `SixbitError`, so any other is a bug, shown with its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (SixbitError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error

    return wrapped


def run(app: typer.Typer) -> None:
    """Runs an app as this process. SIGTERM cleans up like Ctrl-C; exit codes are 128 + the signal (143, 130)."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()
