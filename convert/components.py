"""The models that a checkpoint is made of: published class, configuration, our module and its rule table."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from convert import rules_t5, rules_transformer, rules_vae
from convert.errors import CheckpointError
from convert.rules import Rule
from sixbit_jax.config import T5Config, TransformerConfig, VAEConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One model of a checkpoint.

    Attributes:
        name: the subfolder, and the entry in `model_index.json`.
        library: that publishes it.
        class_name: the published class.
        stem: of the published weight files.
        config: our configuration class, with `from_dict` and `to_dict`.
        module: our module class; its name is `class_name` too.
        rules: the table between both.
    """

    name: str
    library: str
    class_name: str
    stem: str
    config: type
    module: type
    rules: tuple[Rule, ...]


MODELS = {
    component.name: component
    for component in (
        Component(
            name="transformer",
            library="diffusers",
            class_name="CogVideoXTransformer3DModel",
            stem="diffusion_pytorch_model",
            config=TransformerConfig,
            module=CogVideoXTransformer3DModel,
            rules=rules_transformer.RULES,
        ),
        Component(
            name="vae",
            library="diffusers",
            class_name="AutoencoderKLCogVideoX",
            stem="diffusion_pytorch_model",
            config=VAEConfig,
            module=AutoencoderKLCogVideoX,
            rules=rules_vae.RULES,
        ),
        Component(
            name="text_encoder",
            library="transformers",
            class_name="T5EncoderModel",
            stem="model",
            config=T5Config,
            module=T5EncoderModel,
            rules=rules_t5.RULES,
        ),
    )
}

NAMES = (*MODELS, "tokenizer", "scheduler")
"""Everything that `components=` can name."""


def checked_names(components: tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """`components` in our order; None is all of them.

    Raises:
        CheckpointError: if one is unknown, or none is given.
    """
    wanted = NAMES if components is None else tuple(components)
    if unknown := sorted(set(wanted) - set(NAMES)):
        raise CheckpointError(f"components: {', '.join(unknown)} unknown; there are {', '.join(NAMES)}")
    if not wanted:
        raise CheckpointError(f"components: none given; there are {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in wanted)


def parse_config(component: Component, values: Mapping[str, Any], where: Path) -> Any:
    """The published `config.json` as our configuration.

    Raises:
        CheckpointError: if it is for another class, or describes something that cannot be computed exactly.
    """
    named = [values["_class_name"]] if "_class_name" in values else values.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    if named and component.class_name not in named:
        found = ", ".join(map(str, named))
        raise CheckpointError(f"{where}: class {found} is not supported; {component.class_name} is")
    if (kind := values.get("model_type", "t5")) != "t5":
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported; 't5' is")
    try:
        return component.config.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def abstract_module(component: Component, config: Any, dtype: Any) -> nnx.Module:
    """Our module with shapes instead of arrays: nothing is allocated and nothing is drawn at random.

    Raises:
        CheckpointError: if the configuration does not make a module.
    """
    try:
        return nnx.eval_shape(lambda: component.module(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{component.name}: {component.class_name} cannot be built: {error}") from error


def abstract_state(component: Component, config: Any) -> nnx.State:
    """The shapes of our parameters."""
    return nnx.state(abstract_module(component, config, jnp.float32))
