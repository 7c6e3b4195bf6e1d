"""The compiled loop against its Python twin, against separate runs, and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.sampling import sampler

CONFIG = tiny.TRANSFORMER
STEPS = 4
KINDS = ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]


@pytest.fixture(scope="module")
def transformer():
    return Split.of(CogVideoXTransformer3DModel(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))


def arguments(kind: str, batch: int = 2, seed: int = 0, guided: bool = True):
    return tiny.sampler_inputs(kind, STEPS, batch=batch, seed=seed, guided=guided)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_equals_python_loop(transformer, kind):
    found, found_trace = sampler.sample(transformer, *arguments(kind))
    wanted, wanted_trace = sampler.sample_python_loop(transformer, *arguments(kind))
    # XLA may fuse the step differently inside the loop: a few float32 roundings over four steps.
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found_trace.timestep, wanted_trace.timestep)
    np.testing.assert_allclose(found_trace.latents_rms, wanted_trace.latents_rms, rtol=1e-5)
    assert found_trace.finite.all()
    assert found_trace.latents_rms.shape == (STEPS, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bits_and_other_seed_other_video(transformer, kind):
    first, again = (sampler.sample(transformer, *arguments(kind))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    schedule, scale, latents, conditioning = arguments(kind)
    other = conditioning.replace(keys=jax.random.split(jax.random.key(9), 2))
    changed = sampler.sample(transformer, schedule, scale, latents, other)[0]
    assert bool((changed == first).all()) == (kind == "CogVideoXDDIMScheduler")


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_seeds_equals_separate_runs(transformer, kind):
    schedule, scale, _, conditioning = arguments(kind)
    latents = jnp.stack([arguments(kind, seed=s)[2] for s in range(3)])
    keys = jnp.stack([jax.random.split(jax.random.key(s), 2) for s in range(3)])

    def run(latents, keys):
        return sampler.sample(transformer, schedule, scale, latents, conditioning.replace(keys=keys))[0]

    separate = jnp.stack([run(*pair) for pair in zip(latents, keys, strict=True)])
    # The batched products sum in another order.
    np.testing.assert_allclose(jax.vmap(run)(latents, keys), separate, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("over", ["guidance", "prompts"])
def test_vmap_over_guidance_and_prompts_equals_separate_runs(transformer, over):
    schedule, scale, latents, conditioning = arguments(KINDS[1])

    def run(factor, text):
        changed = conditioning.replace(prompt_embeds=text)
        return sampler.sample(transformer, schedule, scale * factor, latents, changed)

    factors, texts = jnp.asarray([0.5, 1.0]), jnp.stack([conditioning.prompt_embeds, -conditioning.prompt_embeds])
    axes, given = ((0, None), (factors, texts[0])) if over == "guidance" else ((None, 0), (factors[1], texts))
    found, trace = jax.vmap(run, in_axes=axes)(*given)
    for i in range(2):
        wanted, wanted_trace = run(*(x if axis is None else x[i] for x, axis in zip(given, axes, strict=True)))
        # The batched products sum in another order.
        np.testing.assert_allclose(found[i], wanted, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(trace.guidance_scale[i], wanted_trace.guidance_scale, rtol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_does_not_depend_on_its_neighbours(transformer, kind):
    schedule, scale, latents, conditioning = arguments(kind)
    both = sampler.sample(transformer, schedule, scale, latents, conditioning)[0]
    alone = sampler.sample(transformer, schedule, scale, latents[1:], jax.tree.map(lambda x: x[1:], conditioning))[0]
    np.testing.assert_allclose(both[1:], alone, rtol=2e-5, atol=2e-5)


def test_guidance_of_one_is_no_guidance(transformer):
    schedule, scale, latents, conditioning = arguments(KINDS[0])
    ones = sampler.sample(transformer, schedule, jnp.ones_like(scale), latents, conditioning)[0]
    off = sampler.sample(transformer, schedule, scale, latents, conditioning.replace(negative_prompt_embeds=None))[0]
    np.testing.assert_allclose(ones, off, rtol=2e-5, atol=2e-5)
    assert np.abs(sampler.sample(transformer, schedule, scale, latents, conditioning)[0] - off).max() > 1e-2


def test_one_compilation_per_shape(transformer):
    jax.clear_caches()
    for seed in range(3):
        sampler.sample(transformer, *arguments(KINDS[0], seed=seed))
    assert sampler.sample._cache_size() == 1
    sampler.sample(transformer, *arguments(KINDS[0], batch=1))
    assert sampler.sample._cache_size() == 2


def test_on_step_is_called_in_order_from_inside_the_loop(transformer):
    seen = []

    def on_step(index):
        seen.append(int(index))

    jax.block_until_ready(sampler.sample(transformer, *arguments(KINDS[0]), on_step=on_step))
    jax.effects_barrier()
    assert seen == list(range(STEPS))


def test_a_broken_step_is_in_the_trace(transformer):
    schedule, scale, latents, conditioning = arguments(KINDS[0])
    _, trace = sampler.sample(transformer, schedule, jnp.asarray(scale).at[2].set(jnp.inf), latents, conditioning)
    np.testing.assert_array_equal(trace.finite, [[True] * 2, [True] * 2, [False] * 2, [False] * 2])
