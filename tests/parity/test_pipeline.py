"""Whole calls of the pipeline against diffusers: ten guided DDIM steps from the same latents, then the VAE."""

import dataclasses

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import rules_transformer, rules_vae
from convert.engine import assemble
from sixbit_jax.config import SchedulerConfig, TransformerConfig, VAEConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.pipeline import Pipeline

CASES = sorted(path.stem for path in common.REFERENCES.glob("pipeline_*.json"))


def component(module, config, prefix, weights, rules):
    abstract = nnx.eval_shape(lambda: module(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    mine = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    params = jax.tree.map(jnp.asarray, assemble(mine, rules, state, dtype=jnp.float32))
    return Split.of(nnx.merge(graph, params))


def test_there_are_cases():
    assert len(CASES) == 3


@pytest.mark.parametrize("case", CASES)
def test_ten_guided_steps(case):
    config, shapes, wanted = common.load(case)
    weights = common.weights(shapes)
    pipe = Pipeline(
        transformer=component(
            CogVideoXTransformer3DModel,
            TransformerConfig.from_dict(config["transformer"]),
            "transformer/",
            weights,
            rules_transformer.RULES,
        ),
        vae=component(AutoencoderKLCogVideoX, VAEConfig.from_dict(config["vae"]), "vae/", weights, rules_vae.RULES),
        scheduler=SchedulerConfig.from_dict(config["scheduler"]),
    )
    inputs = {
        "prompt_embeds": common.values("prompt", (2, 7, 24)),
        "negative_prompt_embeds": common.values("negative", (2, 7, 24)),
        "latents": common.values("latents", wanted["latents"].shape),
    }
    result = pipe(**inputs, **config["call"])
    # Ten steps at guidance 6 amplify the 1e-6 of one forward; a wrong scale or timestep is off by over 1e-2.
    assert common.relative_l2(result.latents, wanted["latents"]) <= 1e-4
    # The reference video is rounded to float16, ours to 8 bits: half a level each, and one where they meet.
    assert np.abs(result.frames / 255.0 - wanted["video"].astype(np.float64)).max() <= 1 / 255
    latent_only = dataclasses.replace(pipe, vae=None)
    assert latent_only.scheduler == pipe.scheduler
