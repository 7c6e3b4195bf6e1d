"""Our checkpoint on disk: `sixbit.json`, and per model a few orbax items of one or more parameters each.

```
sixbit.json             format, versions, source, configurations, and of each parameter the shape, dtype and item
transformer/000/        orbax items; a parameter is never split, small ones share an item of up to 64 MiB,
transformer/001/        so that writing and reading hold one item at a time
vae/000/ ...
tokenizer/              the published files
```
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import sixbit_jax
from convert.components import NAMES
from convert.engine import Target
from convert.errors import CheckpointError
from convert.quantize import QuantizedTarget
from convert.readers import read_json, refuse_links_outside

MANIFEST = "sixbit.json"
FORMAT = "sixbit checkpoint"
VERSION = 1
ITEM_BYTES = 64 << 20
MANIFEST_TYPES = {
    "components": dict,
    "scheduler": dict | None,
    "tokenizer": list | None,
    "source": str,
    "written_by": dict,
}
MODEL_TYPES = {"class": str, "config": dict, "parameters": int, "bytes": int, "arrays": dict}
ARRAY_TYPES = {"shape": list, "dtype": str, "item": str}
LIBRARIES = ("jax", "flax", "orbax-checkpoint", "safetensors", "numpy")


def is_ours(path: Path) -> bool:
    """Whether `path` looks like a checkpoint of ours."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """`sixbit.json` of a checkpoint folder.

    Raises:
        CheckpointError: if it is absent, unreadable, or of a version that this program does not know, or the folder
            holds a link to a place outside of it.
    """
    refuse_links_outside(path, (MANIFEST, *NAMES))
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"format {manifest.get('format')!r}, version {manifest.get('version')!r}"
        raise CheckpointError(f"{path / MANIFEST}: {found}; this program reads {FORMAT!r}, version {VERSION}")
    _check_types(manifest, MANIFEST_TYPES, f"{path / MANIFEST}")
    for name, model in manifest["components"].items():
        where = f"{path / MANIFEST}: {name}"
        _check_types(model, MODEL_TYPES, where)
        for key, array in model["arrays"].items():
            _check_types(array, ARRAY_TYPES, f"{where}: {key}")
            if not all(type(size) is int and 0 <= size < 2**31 for size in array["shape"]):
                raise CheckpointError(f"{where}: {key}: {array['shape']!r:.80} is no shape")
            if not re.fullmatch("[0-9]+", array["item"]):
                raise CheckpointError(f"{where}: {key}: {array['item']!r:.80} is no item of this checkpoint")
    return manifest


def _check_types(values: Any, types: Mapping[str, Any], where: str) -> None:
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: {values!r:.80}, where an object is needed")
    for key, kind in types.items():
        if key not in values or not isinstance(values[key], kind):
            raise CheckpointError(f"{where}: {key!r} is missing, or has a wrong type: {values.get(key)!r:.80}")


def write_manifest(path: Path, **content: Any) -> None:
    """Writes `sixbit.json` with the format, the versions of the libraries at work, and `content`."""
    versions = {"sixbit_jax": sixbit_jax.__version__}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    manifest = {"format": FORMAT, "version": VERSION, "written_by": versions, **content}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True))


def _on_host(array: np.ndarray) -> jax.Array | np.ndarray:
    """The same memory as a JAX array where JAX has a CPU: orbax copies NumPy arrays before it writes them."""
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        return array
    return jax.device_put(array, cpu)


def items_of(targets: Iterable[Target | QuantizedTarget]) -> list[list[Target | QuantizedTarget]]:
    """Parameters in runs of at most `ITEM_BYTES`; a larger parameter is alone."""
    items: list[list[Target | QuantizedTarget]] = []
    room = 0
    for target in targets:
        if not items or target.nbytes > room:
            items.append([])
            room = ITEM_BYTES
        items[-1].append(target)
        room -= target.nbytes
    return items


def write_model(
    folder: Path,
    targets: Sequence[Target | QuantizedTarget],
    build: Callable[[Target | QuantizedTarget], Mapping[str, np.ndarray]],
    done: Callable[[Target | QuantizedTarget, bool], None] = lambda target, found: None,
) -> dict[str, Any]:
    """Writes the parameters of one model, holding one item at a time.

    Items that are there already, from an interrupted run with the same targets, are kept: orbax renames an item to its
    name when it is complete.

    Args:
        folder: to be made, or to be completed.
        targets: the parameters.
        build: makes the arrays of one of them.
        done: is called after each, with whether it was found.

    Returns:
        The model's entry for the manifest: arrays, number of parameters, bytes.
    """
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob("*orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished)
    arrays = {}
    # In a thread of its own, which the end of the block waits for: an interrupt must not leave orbax writing.
    with _checkpointer() as checkpointer, concurrent.futures.ThreadPoolExecutor(1) as writer:
        for number, item in enumerate(items_of(targets)):
            name = f"{number:03d}"
            if not (found := (folder / name).exists()):
                tree = {path: _on_host(array) for target in item for path, array in build(target).items()}
                writer.submit(checkpointer.save, (folder / name).absolute(), args=ocp.args.PyTreeSave(tree)).result()
                del tree
            for target in item:
                for path, array in target.arrays.items():
                    arrays[path] = {"shape": list(array.shape), "dtype": array.dtype.name, "item": name}
                done(target, found)
    return {
        "parameters": sum(target.size for target in targets),
        "bytes": sum(target.nbytes for target in targets),
        "arrays": arrays,
    }


def read_model(
    folder: Path,
    arrays: Mapping[str, Any],
    shapes: Mapping[str, Any],
    done: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, jax.Array]:
    """The parameters of one model, each restored straight to the default device.

    Args:
        folder: the model's folder.
        arrays: its entry in the manifest.
        shapes: dotted path -> anything with `shape` and `dtype`: what our module needs.
        done: is called after each item with its bytes on disk.

    Raises:
        CheckpointError: lists every parameter that is missing, not used, or of another shape; or says which item
            cannot be read.
    """
    found = {path: tuple(entry["shape"]) for path, entry in arrays.items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in shapes.items()}
    lines = [f"- missing {path}: wanted {list(wanted[path])}" for path in sorted(wanted.keys() - found.keys())]
    lines += [f"+ unexpected {path}: found {list(found[path])}" for path in sorted(found.keys() - wanted.keys())]
    lines += [
        f"! wrong {path}: found {list(found[path])}, wanted {list(wanted[path])}"
        for path in sorted(wanted.keys() & found.keys())
        if wanted[path] != found[path]
    ]
    if lines:
        raise CheckpointError("\n  ".join([f"{folder}: does not fit its configuration", *lines]))
    items: dict[str, list[str]] = {}
    for path in wanted:
        items.setdefault(arrays[path]["item"], []).append(path)
    sharding = jnp.zeros(()).sharding
    out = {}
    with _checkpointer() as checkpointer:
        for name, paths in sorted(items.items()):
            spec = {p: jax.ShapeDtypeStruct(wanted[p], shapes[p].dtype, sharding=sharding) for p in paths}
            how = {
                p: ocp.ArrayRestoreArgs(
                    restore_type=jax.Array, dtype=shapes[p].dtype, sharding=sharding, global_shape=wanted[p]
                )
                for p in paths
            }
            out |= _restored(checkpointer, folder / name, ocp.args.PyTreeRestore(item=spec, restore_args=how))
            done(sum(math.prod(wanted[p]) * jnp.dtype(arrays[p]["dtype"]).itemsize for p in paths))
    return out


def _restored(checkpointer: ocp.Checkpointer, item: Path, args: ocp.args.PyTreeRestore) -> dict[str, jax.Array]:
    try:
        return checkpointer.restore(item.absolute(), args=args)
    except Exception as error:  # orbax raises whatever it meets, and plain exceptions too
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        advice = "cannot be read; convert the checkpoint again"
        raise CheckpointError(f"{item}: {advice}: {f'{root}'.partition('\n')[0]}") from error


def check_destination(destination: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Finds out, before any work, whether `destination` can be written.

    Raises:
        CheckpointError: if it exists and may not be replaced, holds the source, or its parent folder is not there or
            not writable.
    """
    parent = destination.absolute().parent
    if source is not None and source.resolve().is_relative_to(destination.resolve()):
        raise CheckpointError(f"{destination}: would replace the folder that is being converted, {source}")
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise CheckpointError(f"{destination}: exists and is not a folder")
    if destination.exists() and any(destination.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{destination}: exists; choose another place, or overwrite it (overwrite=True)")
        if not is_ours(destination) and not (destination / "model_index.json").is_file():
            raise CheckpointError(f"{destination}: exists and is not a checkpoint, so it is not overwritten")
    if not parent.is_dir():
        raise CheckpointError(f"{destination}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{destination}: no permission to write in {parent}")


def check_space(destination: Path, needed: int, work: str) -> None:
    """Finds out, before any work, whether `needed` bytes fit, beside what a killed process left of the same work.

    Raises:
        CheckpointError: if they do not.
    """
    beside = _beside(destination, work)
    held = sum(file.stat().st_size for file in beside.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(beside.parent).free) < (more := needed - held):
        there = f" more, beside {held / 1e9:.2f} GB in {beside}" if held else ""
        raise CheckpointError(f"{destination}: needs {more / 1e9:.2f} GB of disk{there}, {free / 1e9:.2f} GB are free")


def _beside(destination: Path, work: str | None) -> Path:
    """The folder of `staged`."""
    tag = secrets.token_hex(4) if work is None else hashlib.sha256(work.encode()).hexdigest()[:8]
    return destination.absolute().parent / f".{destination.name}.{tag}.partial"


@contextlib.contextmanager
def staged(destination: Path, work: str | None = None) -> Iterator[Path]:
    """A folder beside `destination` that takes its place when the block ends, and is removed if it fails.

    Args:
        destination: the folder to be.
        work: names what is being made. If a process was killed while it made the same, the folder is what it left; and
            only one process at a time can make it.

    Raises:
        CheckpointError: if the folder cannot be made, or another process is making the same.
    """
    beside = _beside(destination, work)
    try:
        beside.mkdir(exist_ok=work is not None)
        handle = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{destination}: is being written by another process") from error
        if not beside.exists():
            raise CheckpointError(f"{destination}: was being written by another process; look, and try again")
        try:
            yield beside
            _replace(beside, destination, beside.with_suffix(".old"))
        finally:
            if beside.exists():
                shutil.rmtree(beside)
    finally:
        os.close(handle)


def _replace(new: Path, destination: Path, aside: Path) -> None:
    if not destination.exists():
        new.rename(destination)
        return
    try:
        destination.rename(aside)
        new.rename(destination)
    finally:
        if not destination.exists():
            aside.rename(destination)
    shutil.rmtree(aside)
