"""Measured configurations of kernels, one file per kind of device, made by `python -m pallas_kernels.tune`.

A file `pallas_kernels/tuned/<slug of the device kind>.json` holds the device, the versions and the command it was made
with, and under "configurations", by operation (as "scaled_matmul/pallas_triton") and then by key of the case, the
fields of the kernel's `Config` and the milliseconds it took.
"""

import functools
import importlib.resources
import json
import re
from collections.abc import Callable

from pallas_kernels.common import device


def slug(kind: str) -> str:
    """The name of a device kind in a file name: "NVIDIA H100 80GB HBM3" is nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def case_key(**case) -> str:
    """The key of a case, from what the kernel's `heuristic` takes, in any order."""
    return " ".join(f"{name}={case[name]}" for name in sorted(case))


def configuration(operation: str, key: str) -> dict | None:
    """The fields of the tuned `Config` of a case on the default device; None if it was not tuned.

    Args:
        operation: with the implementation, as "scaled_matmul/pallas_triton".
        key: from `case_key`.
    """
    return _configurations(slug(device.kind())).get(operation, {}).get(key, {}).get("config")


def configured[C](operation: str, heuristic: Callable[..., C], **case) -> C:
    """The configuration of a case that was tuned on this kind of device, else the heuristic's.

    Args:
        operation: with the implementation, as "scaled_matmul/pallas_triton".
        heuristic: of the kernel's module.
        **case: what the heuristic takes.
    """
    default = heuristic(**case)
    tuned = configuration(operation, case_key(**case))
    return default if tuned is None else type(default)(**tuned)


@functools.cache
def _configurations(name: str) -> dict:
    file = importlib.resources.files("pallas_kernels").joinpath("tuned", f"{name}.json")
    return json.loads(file.read_text())["configurations"] if file.is_file() else {}
