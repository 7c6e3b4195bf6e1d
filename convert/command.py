"""The conversion: a diffusers folder in, one checkpoint of ours out."""

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import sixbit_jax
from convert.components import abstract_module, checked_names
from convert.engine import Target, checked_dtype
from convert.errors import CheckpointError
from convert.published import Published, locate, open_published, plan_all
from convert.quantize import QuantizedTarget, build_arrays, quantize_targets
from convert.store import check_destination, check_space, is_ours, staged, write_manifest, write_model
from sixbit_jax.errors import ArgumentError
from sixbit_jax.moments import Moments, gather
from sixbit_jax.pipeline import Pipeline, prompt_list

DISK_MARGIN = 16 << 20
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    components: tuple[str, ...] | list[str] | None = None,
    dtype: Any = None,
    quantize: Mapping[str, str] | None = None,
    hadamard: int | None = None,
    four_over_six: bool = False,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int = 50,
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Converts a diffusers folder to a checkpoint of ours, one parameter at a time.

    Everything is checked before anything is written, and `dst` appears only when it is complete: whatever happens
    before that, nothing is left behind. The exception is a process that is killed outright: its folder, hidden beside
    `dst`, is taken up by the next conversion of the same source with the same settings.

    Args:
        src: a local folder, or a hub id `org/name`.
        dst: the new folder; the one it is to be in must exist.
        components: of "transformer", "vae", "text_encoder", "tokenizer", "scheduler"; None takes all there are.
        dtype: to store the parameters in; None keeps the published one.
        quantize: {"transformer": "nvfp4", "text_encoder": "nvfp4"}, or one of them: store the kernels of its blocks'
            linear layers in NVFP4, 4.5 bits a value.
        hadamard: block of the rotation before that: 128, 64 or 32, 0 for none, None for the largest that fits a layer.
        four_over_six: choose the better of two scales for each of its blocks (arXiv 2512.02010).
        prompts: sample these with the original model first, in bfloat16, and round the transformer's weights for what
            its linears saw (`sixbit_jax.moments`): the result is nearer to the original. That takes the memory and the
            time of the runs; without prompts, a conversion takes neither.
        num_inference_steps: of those runs.
        progress: show a bar.
        overwrite: replace `dst` if it is a checkpoint.

    Returns:
        `dst`.

    Raises:
        CheckpointError: if `src` is no diffusers folder that we know, or `dst` cannot be written.
        ConversionError: a `CheckpointError` that lists every tensor that is missing, not used, or of a wrong shape,
            and every file that cannot be used.
        ArgumentError: if `prompts` is empty or no list of texts.
    """
    destination, dtype, names = Path(dst), checked_dtype(dtype), checked_names(components)
    check_destination(destination, overwrite=overwrite)
    prompts = None if prompts is None else prompt_list("prompts", prompts)
    path = locate(src, names if prompts is None else None)  # a whole pipeline samples them
    check_destination(destination, overwrite=overwrite, source=path)
    if is_ours(path):
        raise CheckpointError(f"{path}: is already a converted checkpoint; a diffusers folder is needed")
    published = open_published(path, components)
    targets: dict[str, Any] = plan_all(published, dtype)
    entries = {}
    for name, format in (quantize or {}).items():
        if format != "nvfp4" or name not in targets:
            held = ", ".join(targets) or "no model"
            raise CheckpointError(f"quantize: {name}={format!r}; the format is 'nvfp4', and what is converted: {held}")
        part = published.parts[name]
        module = abstract_module(part.component, part.config, dtype or np.float32)
        targets[name], entries[name] = quantize_targets(
            name, module, targets[name], hadamard=hadamard, four_over_six=four_over_six
        )
    if prompts is not None and ("transformer" not in entries or four_over_six):
        raise CheckpointError("prompts: are to round the transformer's weights to NVFP4, and not with four_over_six")
    total = sum(target.nbytes for model in targets.values() for target in model)
    count = sum(len(model) for model in targets.values())
    if prompts is not None:
        entries["transformer"] |= {"prompts": prompts, "num_inference_steps": num_inference_steps}
    work = _work(published, components, dtype, entries)
    check_space(destination, total + total // 50 + DISK_MARGIN, work)

    @functools.cache
    def moments() -> Moments:
        """When a weight needs them: what a killed process has left may be past that."""
        return {} if prompts is None else _moments(path, prompts, num_inference_steps, progress)

    def made(name: str, target: Target | QuantizedTarget) -> dict[str, np.ndarray]:
        wanted = name == "transformer" and isinstance(target, QuantizedTarget)
        tensors = published.parts[name].tensors
        return build_arrays(target, tensors=tensors, progress=bar.update, moments=moments() if wanted else {})

    with (
        staged(destination, work) as folder,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar,
    ):
        models, written = {}, 0

        def done(target: Target | QuantizedTarget, found: bool) -> None:
            nonlocal written
            written += 1
            bar.set_postfix_str(f"{written}/{count} parameters", refresh=False)
            if found:
                bar.update(target.nbytes)

        for name, part in published.parts.items():
            bar.set_description(name)
            entry = write_model(folder / name, targets[name], functools.partial(made, name), done)
            models[name] = {"class": part.component.class_name, "config": part.raw_config, **entry}
            if name in entries:
                models[name]["quantized"] = entries[name]
        files = copy_files(published.tokenizer, folder / "tokenizer") if published.tokenizer else None
        write_manifest(
            folder,
            source=str(src),
            components=models,
            scheduler=published.scheduler,
            tokenizer=files,
        )
    return destination


def _moments(path: Path, prompts: Sequence[str], num_inference_steps: int, progress: bool) -> Moments:
    try:
        pipe = Pipeline.from_pretrained(path)
        with tqdm(total=len(prompts), unit="prompt", desc="sampling", disable=not progress) as bar:
            return gather(pipe, prompts, num_inference_steps=num_inference_steps, progress=bar.update)
    except ArgumentError as error:
        raise CheckpointError(f"prompts: {error}") from error


def _work(published: Published, components: Any, dtype: Any, quantized: Mapping[str, Any]) -> str:
    """What a conversion is of: its settings, and name, size and time of each file that it reads."""
    files = sorted({tensor.file for part in published.parts.values() for tensor in part.tensors.values()})
    found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([found, components, str(dtype), quantized, sixbit_jax.__version__])


def copy_files(source: Path, destination: Path) -> list[str]:
    """Copies the data files of a tokenizer, no code and no pickles, and returns their names."""
    destination.mkdir(exist_ok=True)
    names = sorted(p.name for p in source.iterdir() if p.is_file() and p.suffix in TOKENIZER_SUFFIXES)
    for name in names:
        shutil.copyfile(source / name, destination / name)
    return names
