"""Checkpoints: a diffusers folder, or one that `sixbit convert` wrote, to modules; modules to a diffusers folder.

Parameters go from disk to the device one at a time and in the dtype asked for; nothing is initialised at random.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert.components import MODELS, Component, abstract_module, checked_names, parse_config
from convert.engine import build, checked_dtype, dotted, nest, to_diffusers
from convert.errors import CheckpointError
from convert.published import hub_dtype_counts, is_published, locate, open_published, parse_scheduler, plan_all
from convert.quantize import with_quantized_linears
from convert.readers import dtype_counts
from convert.rules_transformer import published_shapes
from convert.store import check_destination, is_ours, read_manifest, read_model, staged
from sixbit_jax.config import SchedulerConfig, TransformerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.notices import without_torch_notice
from sixbit_jax.qtensor import QuantLinear

DIFFUSERS_VERSION = "0.42.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder held; None for what it did not, or was not asked for.

    Attributes:
        transformer: the denoiser.
        vae: the video autoencoder.
        text_encoder: the T5 encoder.
        tokenizer: of `transformers`.
        scheduler: the published scheduler configuration.
    """

    transformer: CogVideoXTransformer3DModel | None = None
    vae: AutoencoderKLCogVideoX | None = None
    text_encoder: T5EncoderModel | None = None
    tokenizer: Any = None
    scheduler: SchedulerConfig | None = None


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    components: tuple[str, ...] | list[str] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Checkpoint:
    """Loads a checkpoint of either kind to the default device.

    Args:
        path: a diffusers folder, a folder that `convert` wrote, or a hub id `org/name`.
        dtype: of parameters and of computation: float32, bfloat16 or float16.
        components: of "transformer", "vae", "text_encoder", "tokenizer", "scheduler"; None takes all there are.
        progress: called with the bytes of parameters that are loaded, and those of all.

    Raises:
        CheckpointError: if the folder is of neither kind, lacks a component that was asked for, or holds one that
            is not supported.
        ConversionError: a `CheckpointError` that lists every tensor of a diffusers folder that is missing, not used,
            or of a wrong shape, and every file that cannot be used.
    """
    dtype = checked_dtype(dtype)
    if dtype is None:
        raise CheckpointError("dtype: None; a dtype to compute in is needed")
    folder = locate(path, components)
    return Checkpoint(**(_load_ours if is_ours(folder) else _load_published)(folder, dtype, components, progress))


def _summed(progress: Callable[[int, int], object], total: int) -> Callable[[int], None]:
    """Takes bytes as they come, and calls `progress` with their sum so far and `total`."""
    done = 0

    def more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return more


def _load_published(
    folder: Path,
    dtype: np.dtype,
    components: tuple[str, ...] | list[str] | None,
    progress: Callable[[int, int], object],
) -> dict[str, Any]:
    published = open_published(_checked_kind(folder), components)
    parts: dict[str, Any] = {}
    plans = plan_all(published, dtype)
    loaded = _summed(progress, sum(target.nbytes for targets in plans.values() for target in targets))
    for name, targets in plans.items():
        part, arrays = published.parts[name], {}
        for target in targets:
            arrays[target.path] = jax.device_put(build(target, part.tensors))
            loaded(target.nbytes)
        parts[name] = _materialise(part.component, part.config, dtype, lambda shapes, arrays=arrays: arrays, None)
    if published.scheduler is not None:
        parts["scheduler"] = parse_scheduler(published.scheduler, folder / "scheduler" / "scheduler_config.json")
    if published.tokenizer is not None:
        parts["tokenizer"] = _load_tokenizer(published.tokenizer)
    return parts


def _load_ours(
    folder: Path,
    dtype: np.dtype,
    components: tuple[str, ...] | list[str] | None,
    progress: Callable[[int, int], object],
) -> dict[str, Any]:
    manifest, names = read_manifest(folder), checked_names(components)
    held = [*manifest["components"], *(name for name in ("tokenizer", "scheduler") if manifest[name] is not None)]
    if components is not None and (absent := [name for name in names if name not in held]):
        raise CheckpointError(f"{folder}: has no {', '.join(absent)}; it has {', '.join(held)}")
    parts: dict[str, Any] = {}
    names = [name for name in names if name in held]
    loaded = _summed(progress, sum(manifest["components"][name]["bytes"] for name in names if name in MODELS))
    for name in names:
        if name == "scheduler":
            parts[name] = parse_scheduler(manifest["scheduler"], folder / "sixbit.json")
        elif name == "tokenizer":
            parts[name] = _load_tokenizer(folder / "tokenizer")
        else:
            component, entry = MODELS[name], manifest["components"][name]
            config = parse_config(component, entry["config"], folder / "sixbit.json")

            def restore(shapes: Mapping[str, Any], name: str = name, entry: dict = entry) -> dict[str, jax.Array]:
                return read_model(folder / name, entry["arrays"], shapes, loaded)

            parts[name] = _materialise(component, config, dtype, restore, entry.get("quantized"))
    return parts


def _materialise(
    component: Component,
    config: Any,
    dtype: np.dtype,
    arrays: Callable[[dict[str, Any]], Mapping[str, jax.Array]],
    quantized: Mapping[str, Any] | None,
) -> nnx.Module:
    """The module of `config`, its linears as the manifest's entry says, holding `arrays(shapes by dotted path)`."""
    try:
        module = with_quantized_linears(abstract_module(component, config, dtype), quantized)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{component.name}: its entry 'quantized' in sixbit.json does not fit: {error}"
        ) from error
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, nest(arrays(dotted(state)), state))
    return nnx.merge(graph, state)


def _load_tokenizer(folder: Path) -> Any:
    with without_torch_notice():  # takes seconds to import, which loading without a tokenizer need not pay
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers make of a damaged file
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def _checked_kind(folder: Path) -> Path:
    if is_published(folder):
        return folder
    models = ", ".join(f"{name}/config.json" for name in MODELS)
    raise CheckpointError(
        f"{folder}: not a checkpoint: there is neither sixbit.json (written by `sixbit convert`), nor what a diffusers "
        f"folder has: model_index.json, or one of {models}"
    )


def describe(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of either kind holds, without reading any tensor; of one on the hub none is downloaded.

    Args:
        path: a folder, or a hub id `org/name`.

    Returns:
        `kind` ("sixbit" or "diffusers"), `path`, `components` (name -> `class`, `config`, `parameters`, `bytes`,
        `dtypes`: number of parameters per dtype), `scheduler` (published JSON object or None), `tokenizer` (file names
        or None); for our own also `source` and `written_by`.

    Raises:
        CheckpointError: if the folder is of neither kind, or not readable.
    """
    folder = locate(path, weights=False)
    if is_ours(folder):
        manifest = read_manifest(folder)
        models = {}
        for name, entry in manifest["components"].items():
            dtypes: dict[str, int] = {}
            for array in entry["arrays"].values():
                dtypes[array["dtype"]] = dtypes.get(array["dtype"], 0) + int(np.prod(array["shape"], dtype=np.int64))
            models[name] = {key: value for key, value in entry.items() if key != "arrays"} | {"dtypes": dtypes}
        kept = {key: manifest[key] for key in ("source", "written_by", "scheduler", "tokenizer")}
        return {"kind": "sixbit", "path": str(folder), "components": models, **kept}
    published = open_published(_checked_kind(folder))
    models = {}
    for name, part in published.parts.items():
        here = Path(path).is_dir() or not part.problems  # or in the hub's cache, all files of it
        counts = dtype_counts(part.tensors) if here else hub_dtype_counts(str(path), folder, part.component)
        models[name] = {
            "class": part.component.class_name,
            "config": part.raw_config,
            "parameters": sum(counts.values()),
            "bytes": sum(count * jnp.dtype(dtype).itemsize for dtype, count in counts.items()),
            "dtypes": counts,
        }
    tokenizer = sorted(p.name for p in published.tokenizer.iterdir()) if published.tokenizer else None
    return {
        "kind": "diffusers",
        "path": str(folder),
        "components": models,
        "scheduler": published.scheduler,
        "tokenizer": tokenizer,
    }


def write_diffusers(
    folder: str | Path,
    *,
    transformer: CogVideoXTransformer3DModel | None = None,
    vae: AutoencoderKLCogVideoX | None = None,
    text_encoder: T5EncoderModel | None = None,
    tokenizer: Any = None,
    scheduler: SchedulerConfig | None = None,
    dtype: Any = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes modules as an ordinary diffusers folder, which diffusers' own `CogVideoXPipeline` can load.

    Args:
        folder: to be made, in a folder that exists.
        transformer, vae, text_encoder, tokenizer, scheduler: what it is to hold.
        dtype: to store; None keeps that of each parameter.
        max_shard_size: bytes of tensors in one file, beyond which a model is split into shards with an index; None
            never splits. A larger tensor has a file of its own.
        overwrite: replace `folder` if it is a checkpoint.

    Returns:
        `folder`.

    Raises:
        CheckpointError: if the folder exists or cannot be made, the dtype is not a float of 16 or 32 bits, or linears
            are quantised.
    """
    destination, dtype = Path(folder), checked_dtype(dtype)
    check_destination(destination, overwrite=overwrite)
    models = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    models = {name: module for name, module in models.items() if module is not None}
    for name, module in models.items():
        if any(isinstance(layer, QuantLinear) for _, layer in nnx.iter_modules(module)):
            raise CheckpointError(
                f"{name}: its linears are quantised, which diffusers cannot read; write the original model, or the"
                " weights alone with convert.interchange"
            )
    index: dict[str, Any] = {"_class_name": "CogVideoXPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    with staged(destination) as beside:
        if scheduler is not None:
            index["scheduler"] = ["diffusers", scheduler.class_name]
            (beside / "scheduler").mkdir()
            _write_json(beside / "scheduler" / "scheduler_config.json", scheduler.to_dict())
        if tokenizer is not None:
            index["tokenizer"] = ["transformers", "T5Tokenizer"]
            tokenizer.save_pretrained(beside / "tokenizer")
        for name, module in models.items():
            component = MODELS[name]
            index[name] = [component.library, component.class_name]
            shapes = published_shapes(module.config) if isinstance(module.config, TransformerConfig) else {}
            (beside / name).mkdir()
            state = nnx.state(module)
            _write_json(beside / name / "config.json", _published_config(component, module.config))
            tensors = (
                (key, x if dtype is None else x.astype(dtype))
                for key, x in to_diffusers(state, component.rules, shapes)
            )
            _write_tensors(beside / name, component.stem, tensors, max_shard_size)
        _write_json(beside / "model_index.json", dict(sorted(index.items())))
    return destination


def _published_config(component: Component, config: Any) -> dict[str, Any]:
    if component.library == "diffusers":
        return {"_class_name": component.class_name, "_diffusers_version": DIFFUSERS_VERSION, **config.to_dict()}
    bookkeeping = {"architectures": [component.class_name], "model_type": "t5", "is_encoder_decoder": False}
    # "dtype" is what transformers loads in when nobody asks; without it, that is the dtype of the file. diffusers loads
    # its own models in float32 then, and a pipeline needs one dtype.
    return {**bookkeeping, "tie_word_embeddings": False, "dtype": "float32", **config.to_dict()}


def _write_tensors(
    folder: Path, stem: str, tensors: Iterator[tuple[str, np.ndarray]], max_shard_size: int | None
) -> None:
    """Writes safetensors, holding one shard at a time, with an index if there is more than one."""
    shards: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = folder / f"shard-{len(shards)}"
        save_file(held, file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", file)  # safetensors makes files that only their owner can read
        shards.append({key: array.nbytes for key, array in held.items()})
        held.clear()

    for key, array in tensors:
        filled = sum(other.nbytes for other in held.values())
        if held and max_shard_size is not None and filled + array.nbytes > max_shard_size:
            flush()
        held[key] = array
    flush()
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(sum(keys.values()) for keys in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
