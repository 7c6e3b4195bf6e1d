"""How a benchmark's result is kept: a JSON file with device, versions and command, and its table beside it."""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(
    out: Path | None,
    *,
    program: str,
    argv: Sequence[str] | None,
    rows: Sequence[Any],
    table: str,
    device: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    **more: Any,
) -> None:
    """Writes `out` and, with the suffix .md, the table; nothing if `out` is None.

    Args:
        out: the JSON file; its folder is made.
        program: of `python -m`.
        argv: the arguments it was given; None for those of this process.
        rows: dataclasses.
        table: Markdown.
        device: kind and platform; None for JAX's first device.
        versions: by package; None for those of JAX and what is built on it.
        **more: further entries.
    """
    if out is None:
        return
    if device is None:
        import jax

        device = {"kind": jax.devices()[0].device_kind, "platform": jax.devices()[0].platform}
    if versions is None:
        versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "orbax-checkpoint")}
    record = {
        "device": device,
        "versions": versions,
        "command": f"python -m {program} " + " ".join(sys.argv[1:] if argv is None else argv),
        **more,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    out.with_suffix(".md").write_text(table + "\n")
