"""Ctrl-C in the real commands: one line, exit code 130, soon, and nothing half-written."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from terminal import on_a_terminal

from sixbit_jax.pipeline import MINI_MODEL

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
SOON = 5
"""Seconds. Measured under 1 on a quiet machine; a sampling loop that is waited for takes a minute."""


@pytest.fixture
def old(tmp_path):
    """What an earlier run left."""
    for name in ("a.mp4", "a.json"):
        (tmp_path / name).write_text("old")
    return tmp_path


def test_generate_while_it_samples(old):
    arguments = ["generate", "--model", "mini", "--prompt", "a red 3 moves left fast", "--steps", 1000]
    arguments += ["--num-frames", 9, "--dtype", "float32", "--out", old / "a.mp4", "--no-compilation-cache"]
    code, shown, seconds = on_a_terminal(arguments, ENVIRONMENT, interrupt_at=r"\| [1-9]\d*/1000")
    assert code == 130
    assert shown.rpartition("\r\n")[0].rpartition("\r\n")[2] == "interrupted"
    assert "Traceback" not in shown
    assert seconds < SOON
    assert sorted(path.name for path in old.iterdir()) == ["a.json", "a.mp4"]
    assert all(path.read_text() == "old" for path in old.iterdir())


@pytest.mark.parametrize("moment", ["import", "sample", "write"])
def test_convert(tmp_path, moment):
    """While JAX is imported (its C extension makes an ImportError of it), a prompt sampled, and files are written."""
    source = shutil.copytree(MINI_MODEL, tmp_path / "model")
    options = ["-X", "importtime"] if moment == "import" else []
    command = [sys.executable, *options, "-m", "sixbit_jax.cli", "convert", "--quiet", "--quantize", "nvfp4"]
    environment = os.environ | ENVIRONMENT
    if moment == "sample":
        (source / "prompts.txt").write_text("a red 3 moves left fast")
        command += ["--prompts", source / "prompts.txt", "--steps", "1000"]
        environment |= {"JAX_LOG_COMPILES": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is there already is not compiled
    with open(tmp_path / "shown", "w") as shown:
        process = subprocess.Popen([*command, source, tmp_path / "out"], stdout=shown, stderr=shown, env=environment)
    reached = {
        "sample": lambda: "Finished XLA compilation of jit(sample)" in (tmp_path / "shown").read_text(),
        "import": lambda: "jaxlib.version" in (tmp_path / "shown").read_text(),
        "write": lambda: list(tmp_path.glob(".out.*.partial/transformer")),
    }
    while not reached[moment]():
        assert process.poll() is None
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert time.monotonic() - sent < SOON
    lines = (tmp_path / "shown").read_text().splitlines()
    if moment == "sample":
        assert lines[-1] == "interrupted"
        assert not any("Traceback" in line for line in lines)
    else:
        assert [line for line in lines if not line.startswith("import time:")] == ["interrupted"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "shown"]


DROPPED = """if True:
    import gc, os, signal, time, typer
    from sixbit_jax.command import run

    app = typer.Typer()

    @app.command()
    def wait():
        sent = []

        def callback(*_):
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.{})
                time.sleep(0)

        gc.callbacks.append(callback)
        gc.collect()
        assert sent
        try:
            time.sleep(30)
        finally:
            print("cleaned")

    run(app)
"""


@pytest.mark.parametrize(("name", "code", "said"), [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, "")])
def test_a_signal_during_garbage_collection(name, code, said):
    """JAX has a callback in the collector, of which Python drops every exception."""
    done = subprocess.run([sys.executable, "-c", DROPPED.format(name)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "cleaned\n")
