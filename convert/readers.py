"""Published weights as lazily read tensors: safetensors files, single or sharded with an index."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from convert.errors import CheckpointError, Problem
from convert.rules import Shape

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

JSON_BYTES = 64 << 20
"""More than any published JSON file has; the largest are indices of shards, of about 1 MB."""
JSON_LEVELS = 32
"""More than any of them nests."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """One tensor of a safetensors file, of which only the header has been read; `np.asarray` reads it.

    The file is opened for every read and closed again, so that no pages of it stay mapped.
    """

    file: Path
    key: str
    shape: Shape
    dtype: np.dtype

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.key}: reading a tensor from a file always makes a new array")
        with safetensors.safe_open(self.file, framework="numpy") as opened:
            array = opened.get_tensor(self.key)
        return array if dtype is None else array.astype(dtype)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: if there is no such file, or it holds something else, or far more than any that is published.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its other end
            raise OSError("no regular file")
        if (size := path.stat().st_size) > JSON_BYTES:
            raise OSError(f"{size} bytes, more than the {JSON_BYTES} that are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, where an object is needed")
    if _deeper(value, JSON_LEVELS):
        raise CheckpointError(f"{path}: nested deeper than {JSON_LEVELS} levels")
    return value


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def refuse_links_outside(folder: Path, names: Iterable[str]) -> None:
    """Makes sure that nothing under these names in `folder` is a symbolic link to a place outside of it.

    So a folder from elsewhere cannot have files of this machine read, and copied into what is written. The hub's cache
    may link to its own `blobs`, where it keeps what a model's files hold.

    Raises:
        CheckpointError: names the first such link.
    """
    root = Path(os.path.realpath(folder))
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in names:
        for path in (folder / name, *(folder / name).rglob("*")):
            real = Path(os.path.realpath(path))
            if path.is_symlink() and not any(real.is_relative_to(home) for home in homes):
                raise CheckpointError(
                    f"{path}: is a link to {real}, outside of the checkpoint; put a copy there instead"
                )


def _header(path: Path, where: str) -> tuple[dict[str, LazyTensor], list[Problem]]:
    """The tensors of one file. safetensors itself checks that the header is sound and the file has its full length."""
    tensors, problems = {}, []
    if not path.is_file():
        return {}, [Problem(mark="x", where=where, found="no such file", wanted="a safetensors file")]
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                info = opened.get_slice(key)
                shape, name = tuple(info.get_shape()), info.get_dtype()
                if name in DTYPES:
                    tensors[key] = LazyTensor(file=path, key=key, shape=shape, dtype=DTYPES[name])
                else:
                    wanted = f"one of {', '.join(DTYPES)}"
                    problems.append(Problem(mark="!", where=where, key=key, found=f"dtype {name}", wanted=wanted))
    except (safetensors.SafetensorError, OSError) as error:
        return {}, [Problem(mark="x", where=where, found=str(error), wanted="a complete safetensors file")]
    return tensors, problems


def _index(path: Path, where: str) -> tuple[dict[str, str], list[Problem]]:
    """The checked weight map (key -> file name) of an index file."""
    try:
        weight_map = read_json(path).get("weight_map")
    except CheckpointError as error:
        return {}, [Problem(mark="x", where=where, found=str(error))]
    if not isinstance(weight_map, dict) or not weight_map:
        wanted = '"weight_map": {tensor name: file name}'
        return {}, [Problem(mark="x", where=where, found=f'"weight_map": {weight_map!r:.80}', wanted=wanted)]
    good, problems = {}, []
    for key, name in weight_map.items():
        if isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name:
            good[key] = name
        else:
            wanted = "the name of a .safetensors file in the same folder"
            problems.append(Problem(mark="x", where=where, key=key, found=f"{name!r:.80}", wanted=wanted))
    return good, problems


def weight_files(folder: Path, stem: str) -> list[str]:
    """Names of the files that hold the weights of a component: as its index says, or the one file without an index."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    return sorted(set(_index(index, f"{folder.name}/{index.name}")[0].values()))


def open_weights(folder: Path, stem: str) -> tuple[dict[str, LazyTensor], list[Problem]]:
    """The tensors of one component folder: `<stem>.safetensors.index.json` and its shards, or `<stem>.safetensors`.

    Reads headers only. Files in other formats are never opened: torch's `.bin` is a pickle, which can run code.

    Returns:
        The tensors by published key, and what is wrong with the files (in which case some tensors may be absent).
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    label = folder.name
    if index.is_file():
        weight_map, problems = _index(index, f"{label}/{index.name}")
        tensors: dict[str, LazyTensor] = {}
        for name in sorted(set(weight_map.values())):
            where = f"{label}/{name}"
            held, more = _header(folder / name, where)
            problems += more
            if any(p.mark == "x" for p in more):
                continue
            unsupported = {p.key for p in more}
            listed = {key for key, file in weight_map.items() if file == name} - unsupported
            for key in sorted(listed - set(held)):
                problems.append(Problem(mark="-", where=where, key=key, wanted=f"as {index.name} says"))
            for key in sorted(set(held) - listed):
                wanted = f"nothing: {index.name} does not list it in this file"
                problems.append(Problem(mark="+", where=where, key=key, found=held[key].shape, wanted=wanted))
            tensors |= {key: held[key] for key in listed & set(held)}
        return tensors, problems
    if single.is_file():
        return _header(single, f"{label}/{single.name}")
    present = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    wanted = f"{single.name} or {index.name}"
    if any(not name.endswith(".safetensors") for name in present):
        wanted += (
            "; other formats are never read (a .bin is a pickle, which can run code): save the model again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    return {}, [Problem(mark="x", where=label, found=", ".join(present) or "no weights", wanted=wanted)]


def dtype_counts(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Number of parameters per dtype name."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + int(np.prod(tensor.shape, dtype=np.int64))
    return counts
