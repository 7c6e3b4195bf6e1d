"""Prompts spread over devices, and one block's sequence and weights, give what one device gives."""

import os
import subprocess
import sys
from pathlib import Path

import sharded

SUPPORT = Path(sharded.__file__).parent


def test_eight_devices_give_what_one_gives():
    """In one process, since the number of CPU devices is fixed when JAX starts."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, sharded.__file__, *sharded.CASES], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == list(sharded.CASES)
