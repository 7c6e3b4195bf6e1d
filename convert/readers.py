"""Published weights as lazily read tensors: safetensors files, single or sharded with an index."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from convert.errors import CheckpointError, Problem
from convert.rules import Shape

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

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
        CheckpointError: if there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, where an object is needed")
    return value


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
            problems.append(Problem(mark="x", where=where, key=key, found=repr(name), wanted=wanted))
    return good, problems


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
