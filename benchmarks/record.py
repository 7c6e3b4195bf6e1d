"""How a benchmark's result is kept: a JSON file with device, versions and command, and its table beside it."""

import dataclasses
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def describe(
    *,
    program: str,
    argv: Sequence[str] | None,
    rows: Sequence[Any],
    device: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A result, with what it takes to get it again.

    Args:
        program: of `python -m`.
        argv: the arguments it was given; None for those of this process.
        rows: dataclasses, or dictionaries.
        device: kind and platform; None for JAX's first device.
        versions: by package; None for those of JAX and what is built on it.
        **more: further entries.
    """
    if device is None:
        import jax

        device = {"kind": jax.devices()[0].device_kind, "platform": jax.devices()[0].platform}
    if versions is None:
        versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "orbax-checkpoint")}
    return {
        "device": device,
        "versions": versions,
        "command": f"python -m {program} {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip(),
        **more,
        "rows": [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows],
    }


def save(out: Path | None, result: Mapping[str, Any], table: str) -> None:
    """Writes `out` and, with the suffix .md, the table; nothing if `out` is None."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(table.rstrip("\n") + "\n")
