"""A tiny model whose activations keep their size through its blocks, so that quantising it means something."""

import dataclasses
import math
from pathlib import Path

import jax
import published_folder
from flax import nnx

from sixbit_jax.checkpoint import write_diffusers
from sixbit_jax.training.tokenizer import build_tokenizer

TRANSFORMER = dataclasses.replace(published_folder.TRANSFORMER, time_embed_dim=32)
PROMPTS = ("a red 3 moves left slowly", "a blue 7 moves up fast")


def write(folder: Path) -> Path:
    """As `published_folder.write`, with weights divided by the root of their inputs and biases by 10."""
    modules = published_folder.modules(**published_folder.CONFIGS | {"transformer": TRANSFORMER})
    for name, module in modules.items():
        graph, state = nnx.split(module)
        modules[name] = nnx.merge(graph, jax.tree_util.tree_map_with_path(_sized, state))
    return write_diffusers(folder, **modules, tokenizer=build_tokenizer(), scheduler=published_folder.SCHEDULER)


def _sized(path: tuple, leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path)
    if "scale" in name or ("norm" in name and "bias" not in name and "kernel" not in name):
        return 1 + leaf / 10
    if leaf.ndim < 2 or "bias" in name:
        return leaf / 10
    inputs = leaf.shape[-2] if leaf.ndim == 3 else math.prod(leaf.shape[:-1])  # [layers, in, out], or a convolution's
    return leaf / math.sqrt(inputs)
