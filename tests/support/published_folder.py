"""Tiny published folders for tests: written, damaged, and compared."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert.components import MODELS, abstract_state
from convert.engine import dotted, slots_of
from convert.rules import published_shape
from sixbit_jax.checkpoint import write_diffusers
from sixbit_jax.config import SchedulerConfig, T5Config, TransformerConfig, VAEConfig
from sixbit_jax.training.tokenizer import build_tokenizer

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=16,
    num_layers=3,
    max_text_seq_length=8,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
)
VAE = VAEConfig(
    down_block_types=("CogVideoXDownBlock3D",) * 2,
    up_block_types=("CogVideoXUpBlock3D",) * 2,
    block_out_channels=(8, 16),
    temporal_compression_ratio=2,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=4,
)
T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
CONFIGS = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": T5}
SCHEDULER = SchedulerConfig(prediction_type="v_prediction", snr_shift_scale=1.0)


def modules(**configs) -> dict[str, nnx.Module]:
    """Modules with distinct random float32 parameters everywhere, by component name."""
    out = {}
    for name, config in (configs or CONFIGS).items():
        module = nnx.eval_shape(
            lambda name=name, config=config: MODELS[name].module(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        graph, state = nnx.split(module)
        rng = np.random.default_rng(len(name))
        state = jax.tree.map(lambda leaf, rng=rng: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), state)
        out[name] = nnx.merge(graph, state)
    return out


def write(folder: Path, **kwargs) -> Path:
    """A folder with all five components."""
    return write_diffusers(folder, **modules(), tokenizer=build_tokenizer(), scheduler=SCHEDULER, **kwargs)


def write_text_encoder(folder: Path, **kwargs) -> Path:
    """A folder with the smallest component alone."""
    return write_diffusers(folder, **modules(text_encoder=T5), **kwargs)


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites a safetensors file after `change` has worked on its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **changes) -> None:
    """Rewrites a JSON file with some values replaced."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sparse_transformer(folder: Path, config: TransformerConfig) -> int:
    """A bfloat16 transformer of zeros that takes no room on disk; returns the bytes of its tensors."""
    (folder / "transformer").mkdir(parents=True)
    header, end = {}, 0
    rules = MODELS["transformer"].rules
    for path, leaf in dotted(abstract_state(MODELS["transformer"], config)).items():
        for slot in slots_of(path, tuple(leaf.shape), rules).values():
            shape = published_shape(slot.layout, slot.shape)
            start, end = end, end + 2 * int(np.prod(shape))
            header[slot.key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "transformer" / "config.json").write_text(json.dumps(config.to_dict()))
    return end


def same_bits(a: nnx.Module, b: nnx.Module) -> bool:
    """Whether two modules hold the same parameters in the same dtypes, bit for bit."""
    a, b = dotted(nnx.state(a)), dotted(nnx.state(b))
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a
    )
