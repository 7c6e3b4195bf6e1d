"""Whole calls of the pipeline against diffusers: ten guided steps from the same latents, then the VAE.

DPM draws noise, and each library has its own generator: both sides take named values instead.
"""

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
from sixbit_jax.sampling import schedulers

CASES = sorted(path.stem for path in common.REFERENCES.glob("pipeline_*.json"))


def component(module, config, prefix, weights, rules):
    abstract = nnx.eval_shape(lambda: module(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    mine = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    params = jax.tree.map(jnp.asarray, assemble(mine, rules, state, dtype=jnp.float32))
    return Split.of(nnx.merge(graph, params))


@pytest.fixture
def named_noise(monkeypatch, request):
    """-> give(schedule, latents shape): from now on, each step's noise is the one that the reference drew."""
    step = schedulers.step

    def give(schedule, shape):
        noises = np.stack([common.values(f"noise.{i}", shape) for i in range(len(schedule.timesteps))])

        def with_named_noise(row, output, state, latents, *, noise):
            assert noise.shape == shape
            index = jnp.argmax(schedule.timesteps == row.timesteps)
            return step(row, output, state, latents, noise=jnp.asarray(noises)[index])

        jax.clear_caches()  # The step is compiled into the sampler, before and after.
        request.addfinalizer(jax.clear_caches)
        monkeypatch.setattr(schedulers, "step", with_named_noise)

    return give


def test_there_are_cases():
    assert len(CASES) == 5


@pytest.mark.parametrize("case", CASES)
def test_ten_guided_steps(parity, named_noise, case):
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
    schedule = schedulers.make_schedule(pipe.scheduler, config["call"]["num_inference_steps"])
    if schedule.stochastic:
        named_noise(schedule, wanted["latents"].shape)
    result = pipe(**inputs, **config["call"])
    # Ten steps at guidance 6 amplify the 1e-6 of one forward; a wrong scale or timestep is off by over 1e-2.
    parity.exact(case, result.latents, wanted["latents"], 1e-4)
    # The reference video is rounded to float16, ours to 8 bits: half a level each, and one where they meet.
    if "video" in wanted:
        assert np.abs(result.frames / 255.0 - wanted["video"].astype(np.float64)).max() <= 1 / 255
