"""A published (diffusers) folder: which components it has, their configurations, and their tensors, lazily."""

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)

from convert.components import MODELS, Component, abstract_state, checked_names, parse_config
from convert.engine import Target, plan
from convert.errors import CheckpointError, ConversionError, Problem
from convert.readers import DTYPES, LazyTensor, open_weights, read_json, refuse_links_outside, weight_files
from convert.store import MANIFEST
from sixbit_jax.config import SchedulerConfig
from sixbit_jax.precision.calibration import FILE_NAME

PIPELINES = ("CogVideoXPipeline",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a published folder.

    Attributes:
        component: what it is.
        raw_config: the published JSON object.
        config: the same, as our dataclass.
        tensors: by published key, unread.
        problems: with its files.
    """

    component: Component
    raw_config: dict[str, Any]
    config: Any
    tensors: dict[str, LazyTensor]
    problems: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A published folder, of which only JSON files and tensor headers have been read.

    Attributes:
        path: the folder.
        parts: its models, by component name.
        scheduler: the published JSON object, or None.
        tokenizer: its folder, or None.
    """

    path: Path
    parts: dict[str, Part]
    scheduler: dict[str, Any] | None
    tokenizer: Path | None


def locate(source: str | Path, components: tuple[str, ...] | list[str] | None = None, *, weights: bool = True) -> Path:
    """The local folder of `source`; a hub id `org/name` that is no local path is downloaded, without unused files.

    Args:
        source: a folder or a hub id.
        components: names; None takes all.
        weights: False leaves out what holds tensors, but for the tokenizer's.

    Raises:
        CheckpointError: if there is nothing of that name.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file, where a checkpoint folder is needed")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"{path}: no such folder, and not a hub id of the form org/name")
    patterns = ["model_index.json", MANIFEST, FILE_NAME]
    for name in checked_names(components):
        if name in MODELS:
            stem = f"{name}/{MODELS[name].stem}"
            patterns += [f"{name}/config.json", f"{stem}.safetensors.index.json"]
            if weights:
                patterns += [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"{name}/[0-9]*/*"]
        else:
            patterns += [f"{name}/*"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{source}: no such local folder, and the hub did not give it: {error}") from error


def hub_dtype_counts(repo: str, folder: Path, component: Component) -> dict[str, int]:
    """Number of parameters per dtype name of a model on the hub, from the headers of its files.

    Args:
        repo: its hub id.
        folder: where its JSON files are.
        component: the model.

    Raises:
        CheckpointError: if a header cannot be had or read.
    """
    counts: collections.Counter[str] = collections.Counter()
    for file in weight_files(folder / component.name, component.stem):
        try:
            header = huggingface_hub.parse_safetensors_file_metadata(repo, f"{component.name}/{file}")
        except (
            *HfHubHTTPError.__bases__,
            SafetensorsParsingError,
        ) as error:  # whatever HTTP library the hub's is built on
            raise CheckpointError(f"{repo}: the hub did not give the header of {file}: {error}") from error
        counts.update({DTYPES[d].name if d in DTYPES else d: n for d, n in header.parameter_count.items()})
    return dict(counts)


def is_published(path: Path) -> bool:
    """Whether `path` looks like a diffusers folder."""
    return (path / "model_index.json").is_file() or any((path / name / "config.json").is_file() for name in MODELS)


def open_published(path: Path, components: tuple[str, ...] | list[str] | None = None) -> Published:
    """Reads the JSON files and tensor headers of a diffusers folder.

    Args:
        path: the folder.
        components: names; None takes all that are there.

    Raises:
        CheckpointError: if it is no such folder, lacks a component that was asked for, or has a class or
            configuration that is not supported, or a file that is a link to a place outside of it.
    """
    if not is_published(path):
        raise CheckpointError(
            f"{path}: not a diffusers folder: there is neither model_index.json nor "
            f"{', '.join(f'{name}/config.json' for name in MODELS)}"
        )
    names = checked_names(components)
    refuse_links_outside(path, ("model_index.json", *names))
    listed = _check_index(path / "model_index.json", names)
    present = [n for n in names if (path / n).is_dir() and listed.get(n, True)]
    if components is not None and (absent := [n for n in names if n not in present]):
        held = ", ".join(present) or "nothing"
        raise CheckpointError(f"{path}: has no {', '.join(absent)}; of what was asked for it has {held}")
    parts = {}
    for name in present:
        if name not in MODELS:
            continue
        component, file = MODELS[name], path / name / "config.json"
        raw = read_json(file)
        tensors, problems = open_weights(path / name, component.stem)
        config = parse_config(component, raw, file)
        parts[name] = Part(
            component=component, raw_config=raw, config=config, tensors=tensors, problems=tuple(problems)
        )
    scheduler = None
    if "scheduler" in present:
        file = path / "scheduler" / "scheduler_config.json"
        scheduler = read_json(file)
        parse_scheduler(scheduler, file)
    tokenizer = path / "tokenizer" if "tokenizer" in present else None
    return Published(path=path, parts=parts, scheduler=scheduler, tokenizer=tokenizer)


def parse_scheduler(values: dict[str, Any], where: Path) -> SchedulerConfig:
    """The published `scheduler_config.json` as our configuration.

    Raises:
        CheckpointError: if it is for another class, or describes something that is not supported.
    """
    try:
        return SchedulerConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_index(file: Path, names: tuple[str, ...]) -> dict[str, bool]:
    """Component name -> whether `model_index.json`, if there is one, says that the pipeline has it."""
    if not file.is_file():
        return {}
    index = read_json(file)
    if (found := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{file}: pipeline class {found!r} is not supported; supported: {', '.join(PIPELINES)}")
    listed = {}
    for name in names:
        entry = index.get(name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        listed[name] = class_name is not None
        if name in MODELS and class_name not in (None, MODELS[name].class_name):
            wanted = MODELS[name].class_name
            raise CheckpointError(f"{file}: {name} of class {class_name!r} is not supported; {wanted} is")
    return listed


def plan_all(published: Published, dtype: Any = None) -> dict[str, list[Target]]:
    """Checks every model of the folder against our modules.

    Args:
        published: the folder.
        dtype: to be stored; None keeps the published one.

    Returns:
        Our parameters, by component name.

    Raises:
        ConversionError: lists everything that is wrong in all of them.
    """
    targets, problems = {}, []
    for name, part in published.parts.items():
        problems += part.problems

        def where(key: str, name: str = name, part: Part = part) -> str:
            return f"{name}/{part.tensors[key].file.name}" if key in part.tensors else name

        abstract = abstract_state(part.component, part.config)
        targets[name], found = plan(part.tensors, part.component.rules, abstract, dtype=dtype, where=where)
        named = {problem.key for problem in part.problems}
        problems += [problem for problem in found if problem.key is None or problem.key not in named]
    if problems:
        raise ConversionError(str(published.path), problems)
    return targets
