"""What the commands (`sixbit`, `python -m convert`) share: how they end."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from sixbit_jax.errors import SixbitError

LESS_MEMORY = "Less is needed with --quantization, --vae-tiling, fewer prompts at once, fewer frames or a smaller size."


def shows_user_errors[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Makes a user's mistake one line on stderr and exit code 2, as typer does for a wrong option.

    Our own errors (`SixbitError`) and the system's (`OSError`: a full disk, a forbidden folder) count as such, and a
    device whose memory is too small. A plain ValueError does not: every one that we foresee is a `SixbitError`, so any
    other is a bug, shown with its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (SixbitError, OSError) as error:
            typer.echo(f"error: {_printable(str(error))}", err=True)
            raise typer.Exit(2) from error
        except RuntimeError as error:
            if not str(error).startswith("RESOURCE_EXHAUSTED"):  # how XLA says it
                raise
            first = str(error).partition("\n")[0]
            typer.echo(f"error: the device has too little memory: {first}\n{LESS_MEMORY}", err=True)
            raise typer.Exit(2) from error

    return wrapped


def _printable(text: str) -> str:
    """Without what a file's content, quoted in a message, could do to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def run(app: typer.Typer) -> None:
    """Runs an app as this process. Ctrl-C and SIGTERM clean up and exit with 128 + the signal (130, 143).

    Ctrl-C is told in one line, and what XLA still runs is not waited for. Two things can happen to the exception that a
    signal raises: a C extension that is being imported makes an ImportError of it; and Python drops it where nothing
    can be raised, as in JAX's callback of the garbage collector: then it is raised again, soon after.
    """
    signals: list[int] = []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        raise_stop()

    def raise_stop(*_: object) -> None:
        if signals[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signals[0])

    def dropped(unraisable: Any) -> None:
        if signals and issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            sys.__unraisablehook__(unraisable)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGALRM, raise_stop)
    sys.unraisablehook = dropped
    try:
        app()
    finally:
        if signals:
            if signals[0] == signal.SIGINT:  # on a line of its own: on a terminal there may be a progress bar
                typer.echo(("\n" if sys.stderr.isatty() else "") + "interrupted", err=True)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signals[0])
