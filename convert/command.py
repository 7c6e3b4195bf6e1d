"""The conversion: a diffusers folder in, one checkpoint of ours out."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert.components import checked_names
from convert.engine import FLOATS, Target, build
from convert.errors import CheckpointError
from convert.published import locate, open_published, plan_all
from convert.store import check_destination, check_space, is_ours, staged, write_manifest, write_model

DISK_MARGIN = 16 << 20


def checked_dtype(dtype: Any) -> np.dtype | None:
    """`dtype` as a NumPy dtype; None stays None.

    Raises:
        CheckpointError: if it is not float32, bfloat16 or float16.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in FLOATS:
        raise CheckpointError(f"dtype {dtype!r}: one of {', '.join(d.name for d in FLOATS)} is needed")
    return found


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    components: tuple[str, ...] | list[str] | None = None,
    dtype: Any = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Converts a diffusers folder to a checkpoint of ours, one parameter at a time.

    Everything is checked before anything is written, and `dst` appears only when it is complete: whatever happens
    before that, nothing is left behind.

    Args:
        src: a local folder, or a hub id `org/name`.
        dst: the new folder; the one it is to be in must exist.
        components: of "transformer", "vae", "text_encoder", "tokenizer", "scheduler"; None takes all there are.
        dtype: to store the parameters in; None keeps the published one.
        progress: show a bar.
        overwrite: replace `dst` if it is a checkpoint.

    Returns:
        `dst`.

    Raises:
        CheckpointError: if `src` is no diffusers folder that we know, or `dst` cannot be written.
        ConversionError: a `CheckpointError` that lists every tensor that is missing, not used, or of a wrong shape,
            and every file that cannot be used.
    """
    destination, dtype, names = Path(dst), checked_dtype(dtype), checked_names(components)
    check_destination(destination, overwrite=overwrite)
    path = locate(src, names)
    check_destination(destination, overwrite=overwrite, source=path)
    if is_ours(path):
        raise CheckpointError(f"{path}: is already a converted checkpoint; a diffusers folder is needed")
    published = open_published(path, components)
    targets = plan_all(published, dtype)
    total = sum(target.nbytes for model in targets.values() for target in model)
    count = sum(len(model) for model in targets.values())
    check_space(destination, total + total // 50 + DISK_MARGIN)
    with (
        staged(destination) as folder,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar,
    ):
        models, written = {}, 0

        def done(target: Target) -> None:
            nonlocal written
            written += 1
            bar.set_postfix_str(f"{written}/{count} parameters", refresh=False)
            bar.update(target.nbytes)

        for name, part in published.parts.items():
            bar.set_description(name)
            tensors = part.tensors
            entry = write_model(folder / name, targets[name], lambda t, tensors=tensors: build(t, tensors), done)
            models[name] = {"class": part.component.class_name, "config": part.raw_config, **entry}
        files = copy_files(published.tokenizer, folder / "tokenizer") if published.tokenizer else None
        write_manifest(
            folder,
            source=str(src),
            components=models,
            scheduler=published.scheduler,
            tokenizer=files,
        )
    return destination


def copy_files(source: Path, destination: Path) -> list[str]:
    """Copies the files of a folder, without subfolders, and returns their names."""
    destination.mkdir()
    names = sorted(p.name for p in source.iterdir() if p.is_file())
    for name in names:
        shutil.copyfile(source / name, destination / name)
    return names
