"""The real command, with a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time


def on_a_terminal(arguments, environment, interrupt_at=None) -> tuple[int, str, float]:
    """Runs the real command with a terminal for stderr; -> exit code, what the terminal shows, seconds to the end after
    the interrupt."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "sixbit_jax.cli", *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=theirs, env=inherited | environment, start_new_session=True
    )
    os.close(theirs)
    shown, sent = "", None
    while True:
        try:
            shown += os.read(ours, 4096).decode(errors="replace") if select.select([ours], [], [], 60)[0] else ""
        except OSError:  # the other side is closed
            break
        if sent is None and interrupt_at is not None and re.search(interrupt_at, shown):
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
    os.close(ours)
    return process.wait(60), shown, time.monotonic() - (sent or 0)
