"""The pipeline on the bundled model, and on tiny random models for everything that does not need a trained one."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import published_folder
import pytest
from flax import nnx

from convert import convert
from convert.errors import CheckpointError
from sixbit_jax import NonFiniteLatentsError, Pipeline, PipelineOutput, pipeline
from sixbit_jax.config import ConfigError, SchedulerConfig
from sixbit_jax.errors import ArgumentError, TruncatedPromptWarning
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.pipeline import MINI_MODEL, decode_latents, encode_text
from sixbit_jax.sampling import sampler, schedulers
from sixbit_jax.sampling.noise import initial_latents, video_keys
from sixbit_jax.training.tokenizer import build_tokenizer

STEPS = 3
SCHEDULER = SchedulerConfig(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
)
TEXTS = ["a red 3 moves left slowly", "a blue 7 moves up fast"]
SMALL = {"num_frames": 5, "height": 8, "width": 12, "num_inference_steps": STEPS}
"""Of the tiny models: latents [3, 4, 4, 6]."""
FEW = {"num_frames": 9, "num_inference_steps": 4}
"""Of the bundled model: latents [3, 8, 16, 16]."""

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Programs of different batch sizes sum in other orders: float32 roundings, amplified by three guided steps."""


@pytest.fixture(scope="session")
def mini():
    return Pipeline.from_pretrained("mini", dtype=jnp.float32)


@pytest.fixture(scope="session")
def drawn(mini):
    """Two videos by the bundled model in four steps."""
    return mini(TEXTS, **FEW)


def random_module(module, config, seed: int) -> nnx.Module:
    """Random parameters that keep activations at their size, without the cost of the module's own initialisers."""
    graph, state = nnx.split(nnx.eval_shape(lambda: module(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if "scale" in jax.tree_util.keystr(path):
            return jnp.asarray(1 + values / 10)
        return jnp.asarray(values / np.float32(np.sqrt(np.prod(leaf.shape[:-1]))))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def random_transformer(**changes) -> Split[CogVideoXTransformer3DModel]:
    config = dataclasses.replace(
        published_folder.TRANSFORMER, num_layers=2, use_rotary_positional_embeddings=True, **changes
    )
    return Split.of(random_module(CogVideoXTransformer3DModel, config, 0))


def random_pipeline(d_ff: int = 24, **transformer) -> Pipeline:
    t5 = dataclasses.replace(published_folder.T5, d_ff=d_ff)
    return Pipeline(
        transformer=random_transformer(**transformer),
        vae=Split.of(random_module(AutoencoderKLCogVideoX, published_folder.VAE, 1)),
        text_encoder=Split.of(random_module(T5EncoderModel, t5, 2)),
        tokenizer=build_tokenizer(),
        scheduler=SCHEDULER,
    )


@pytest.fixture(scope="module")
def tiny():
    return random_pipeline()


@pytest.fixture(scope="module")
def embeds(tiny):
    """Features of TEXTS and of the empty text, as NumPy arrays."""
    encode = lambda texts: np.asarray(encode_text(tiny.text_encoder, jnp.asarray(tiny.tokenize(texts))))  # noqa: E731
    return {"prompt_embeds": encode(TEXTS), "negative_prompt_embeds": encode([""] * 2)}


@pytest.fixture
def compiled():
    """Names of the programs that XLA has compiled since the test began."""
    names = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def same(a: PipelineOutput, b: PipelineOutput) -> bool:
    return np.array_equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)


# The bundled model


def test_the_bundled_model_draws_what_it_is_told(drawn):
    result = drawn
    assert result.frames.shape == (2, 9, 64, 64, 3)
    assert result.frames.dtype == np.uint8
    assert result.latents.shape == (2, 3, 8, 16, 16)
    assert result.latents.dtype == np.float32
    assert result.trace.timestep.tolist() == [999, 749, 499, 249]
    assert result.trace.guidance_scale.tolist() == [6.0] * 4
    assert result.trace.latents_rms.shape == result.trace.finite.shape == (4, 2)
    np.testing.assert_allclose(result.trace.latents_rms[-1], np.sqrt((result.latents**2).mean((1, 2, 3, 4))), rtol=1e-5)
    assert set(result.timings) == {"text_encoder", "sampling", "vae", "compilation"}
    assert 0 < result.timings["compilation"] < sum(result.timings[k] for k in ("text_encoder", "sampling", "vae"))
    # Red on black and blue on black: measured 25 of 255 against 2, and 21 against 1.5.
    red, blue = result.frames.mean((1, 2, 3))
    assert red[0] > 4 * max(red[1], red[2])
    assert blue[2] > 4 * max(blue[0], blue[1])


def test_default_size_is_the_models_own(mini, tiny):
    assert mini.default_size == (17, 64, 64)
    any_size = dataclasses.replace(mini.transformer.merge().config, sample_height=300, sample_width=300)
    large = nnx.eval_shape(lambda: CogVideoXTransformer3DModel(any_size, rngs=nnx.Rngs(0)))
    assert dataclasses.replace(mini, transformer=Split.of(large)).default_size == (17, 768, 1360)
    result = tiny(TEXTS[0], num_inference_steps=1, output_type="latent")
    assert result.latents.shape == (1, 5, 4, 8, 8)
    assert result.frames is None
    assert "vae" not in result.timings


# What goes in and what comes out


def test_latents_go_in_and_come_out_in_the_same_layout(tiny):
    latents = np.asarray(initial_latents(video_keys(0, 2), (3, 4, 4, 6)))
    from_seed = tiny(TEXTS, seed=0, **SMALL)
    assert same(tiny(TEXTS, latents=latents, **SMALL), from_seed)
    assert not same(tiny(TEXTS, latents=latents[::-1], **SMALL), from_seed)
    only = tiny(TEXTS, latents=latents, output_type="latent", **SMALL)
    np.testing.assert_array_equal(only.latents, from_seed.latents)
    for i in range(2):
        frames = decode_latents(tiny.vae, jnp.asarray(only.latents[i : i + 1]))
        np.testing.assert_array_equal(frames[0], from_seed.frames[i])
    assert from_seed.frames.shape == (2, 5, 8, 12, 3)
    assert from_seed.frames.std() > 1


def test_one_seed_gives_each_video_its_own_noise(tiny):
    twice = tiny([TEXTS[0]] * 2, seed=5, **SMALL)
    assert same(twice, tiny([TEXTS[0]] * 2, seed=5, **SMALL))
    assert np.abs(twice.latents[0] - twice.latents[1]).max() > 0.1
    assert not same(twice, tiny([TEXTS[0]] * 2, seed=6, **SMALL))


def test_a_video_of_a_batch_can_be_made_again_alone(tiny):
    both = tiny(TEXTS, seed=[3, 4], **SMALL)
    for i, seed in enumerate([3, 4]):
        alone = tiny(TEXTS[i], seed=seed, **SMALL)
        np.testing.assert_allclose(alone.latents[0], both.latents[i], **CLOSE)
        # A latent next to a rounding boundary may fall on its other side.
        assert np.abs(alone.frames[0].astype(int) - both.frames[i]).max() <= 1
        np.testing.assert_array_equal(tiny(TEXTS[i], seed=[seed], **SMALL).latents, alone.latents)


def test_seeds_cover_32_bits():
    keys = [video_keys(seed, 1) for seed in (0, 1, 2**31, 2**32 - 1)]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 4
    drawn = jax.random.key_data(video_keys(np.random.default_rng(0).integers(9), 2))
    np.testing.assert_array_equal(drawn, jax.random.key_data(video_keys(7, 2)))


def test_features_instead_of_texts_give_the_same_bits(tiny, embeds):
    wanted = tiny(TEXTS, **SMALL)
    assert same(tiny(**embeds, **SMALL), wanted)
    assert same(tiny(prompt_embeds=embeds["prompt_embeds"], **SMALL), wanted)
    for one_or_each in (slice(1), slice(2)):
        negative = embeds["negative_prompt_embeds"][one_or_each]
        assert same(tiny(TEXTS, negative_prompt_embeds=negative, **SMALL), wanted)
    assert same(tiny(TEXTS, "", **SMALL), wanted)
    assert same(tiny(TEXTS, ["", ""], **SMALL), wanted)
    assert not same(tiny(TEXTS, "a green 1 moves up fast", **SMALL), wanted)
    assert not same(tiny(TEXTS[::-1], **SMALL), wanted)


def test_stochastic_sampler(tiny):
    stochastic = dataclasses.replace(tiny, scheduler=dataclasses.replace(SCHEDULER, class_name="CogVideoXDPMScheduler"))
    latents = np.zeros((1, 3, 4, 4, 6), np.float32)
    first, again, other = (stochastic(TEXTS[0], latents=latents, seed=seed, **SMALL) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert not same(first, tiny(TEXTS[0], latents=latents, **SMALL))


def test_dynamic_guidance(tiny):
    result = tiny(TEXTS[0], use_dynamic_cfg=True, guidance_scale=4.0, **SMALL)
    wanted = 1 + 4 * (1 - np.cos(np.pi * ((STEPS - result.trace.timestep) / STEPS) ** 5)) / 2
    # float32 against float64.
    np.testing.assert_allclose(result.trace.guidance_scale, wanted, rtol=1e-6)
    assert not same(result, tiny(TEXTS[0], guidance_scale=4.0, **SMALL))


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 1), (0.0, 1), (1.5, 2)])
def test_guidance_off_halves_the_batch(tiny, monkeypatch, scale, batch):
    class Traced(Exception):
        pass

    def spy(self, hidden_states, *arguments):
        raise Traced(hidden_states.shape[0])

    monkeypatch.setattr(CogVideoXTransformer3DModel, "__call__", spy)
    size = SMALL | {"num_inference_steps": 11}  # of no other test: it has to be traced here
    with pytest.raises(Traced) as caught:
        tiny(TEXTS[0], guidance_scale=scale, output_type="latent", **size)
    assert caught.value.args == (batch,)


def test_padding_of_temporal_patches_is_cut_from_the_frames():
    pipe = random_pipeline(patch_size_t=2)
    result = pipe(TEXTS[0], **SMALL)
    assert result.latents.shape == (1, 4, 4, 4, 6)
    assert result.frames.shape == (1, 5, 8, 12, 3)
    np.testing.assert_array_equal(decode_latents(pipe.vae, jnp.asarray(result.latents[:, 1:])), result.frames)


def test_an_even_number_of_latent_frames_gives_more_frames_as_in_diffusers(tiny):
    for num_frames, latent, frames in ((1, 1, 1), (3, 2, 4), (5, 3, 5), (7, 4, 8)):
        shape = tiny._latents_shape(num_frames, 8, 12)
        assert shape == (latent, 4, 4, 6)
        video = jax.eval_shape(decode_latents, tiny.vae, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        assert video.shape == (1, frames, 8, 12, 3)


def test_tiling_reaches_the_decoder(tiny, monkeypatch):
    seen = []

    def spy(vae, latents, *, tiled):
        seen.append(tiled)
        return decode_latents(vae, latents, tiled=tiled)

    monkeypatch.setattr(pipeline, "decode_latents", spy)
    for tiled in (False, True):
        dataclasses.replace(tiny, vae_tiling=tiled)(TEXTS, **SMALL)
    assert seen == [False, False, True, True]


def test_steps_are_reported_in_order(tiny):
    seen = []
    tiny(TEXTS[0], on_step=lambda index: seen.append(int(index)), **SMALL)
    assert seen == list(range(STEPS))


# Compilation


def test_one_compilation_per_shape(tiny, embeds, compiled):
    tiny(TEXTS, **SMALL)
    functions = (sampler.sample, encode_text, decode_latents)
    before = [f._cache_size() for f in functions]
    compiled.clear()
    latents = np.zeros((2, 3, 4, 4, 6), np.float32)
    for i, change in enumerate([{"seed": 7}, {"guidance_scale": 2.0}, {"use_dynamic_cfg": True}, {"latents": latents}]):
        tiny(TEXTS[i % 2 :] + TEXTS[: i % 2], **SMALL, **change)
    tiny(prompt_embeds=embeds["prompt_embeds"], **SMALL)
    assert compiled == []
    assert [f._cache_size() for f in functions] == before
    tiny(TEXTS, **SMALL | {"height": 16})
    assert {"sample", "decode_latents"} <= {name.removeprefix("jit(").removesuffix(")") for name in compiled}


def test_pure_functions_under_the_users_own_jit_and_vmap(tiny):
    """Text to frames for three seeds at once, in one compiled function of the user's."""
    schedule = schedulers.make_schedule(SCHEDULER, STEPS)
    scale = schedulers.guidance_schedule(6.0, schedule.timesteps, STEPS, use_dynamic_cfg=False)
    seeds = [0, 1, 2]
    keys = jnp.stack([video_keys([seed], 1) for seed in seeds])

    @jax.jit
    def generate(transformer, vae, text_encoder, ids, keys):
        positive, negative = encode_text(text_encoder, ids[:1]), encode_text(text_encoder, ids[1:])

        def one(key):
            conditioning = sampler.Conditioning(prompt_embeds=positive, negative_prompt_embeds=negative, keys=key)
            latents, _ = sampler.sample(transformer, schedule, scale, initial_latents(key, (3, 4, 4, 6)), conditioning)
            return latents, decode_latents(vae, latents)

        return jax.vmap(one)(keys)

    ids = jnp.asarray(tiny.tokenize([TEXTS[0], ""]))
    latents, frames = generate(tiny.transformer, tiny.vae, tiny.text_encoder, ids, keys)
    for i, seed in enumerate(seeds):
        alone = tiny(TEXTS[0], seed=seed, **SMALL)
        np.testing.assert_allclose(latents[i], alone.latents, **CLOSE)
        assert np.abs(np.asarray(frames[i], int) - alone.frames).max() <= 1


# Folders


@pytest.fixture(scope="module", params=["diffusers", "converted"])
def folder(request, tmp_path_factory):
    """The bundled model, as a folder of either kind that may be taken apart."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    return (
        convert(MINI_MODEL, out, progress=False) if request.param == "converted" else shutil.copytree(MINI_MODEL, out)
    )


def without(folder, tmp_path, *names):
    """A copy that lacks some components."""
    if (folder / "sixbit.json").exists():
        held = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]
        return convert(MINI_MODEL, tmp_path / "part", components=[n for n in held if n not in names], progress=False)
    copy = shutil.copytree(folder, tmp_path / "part")
    for name in names:
        shutil.rmtree(copy / name)
    return copy


def test_both_kinds_of_folder_load_in_the_default_dtype(folder):
    pipe = Pipeline.from_pretrained(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves((pipe.transformer, pipe.vae, pipe.text_encoder))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert pipe.tokenize(TEXTS).shape == (2, 32)


def test_a_folder_without_text_encoder_takes_features(folder, mini, drawn, tmp_path):
    pipe = Pipeline.from_pretrained(without(folder, tmp_path, "text_encoder", "tokenizer"), dtype=jnp.float32)
    assert pipe.text_encoder is None
    assert pipe.tokenizer is None
    encode = lambda texts: encode_text(mini.text_encoder, jnp.asarray(mini.tokenize(texts)))  # noqa: E731
    features = {"prompt_embeds": encode(TEXTS), "negative_prompt_embeds": encode([""] * 2)}
    assert same(pipe(**features, **FEW), drawn)
    with pytest.raises(ArgumentError, match=r"no text encoder or no tokenizer, so prompt cannot.* pass prompt_embeds"):
        pipe(TEXTS, **FEW)


def test_features_need_no_text_encoder_and_without_guidance_no_negative(tiny, embeds):
    pipe = dataclasses.replace(tiny, text_encoder=None, tokenizer=None)
    assert same(pipe(**embeds, **SMALL), tiny(TEXTS, **SMALL))
    positive = {"prompt_embeds": embeds["prompt_embeds"], "output_type": "latent"}
    with pytest.raises(ArgumentError, match="pass negative_prompt_embeds, or guidance_scale=1"):
        pipe(**positive, **SMALL)
    found = pipe(**positive, guidance_scale=1, **SMALL)
    np.testing.assert_array_equal(found.latents, tiny(TEXTS, guidance_scale=1, output_type="latent", **SMALL).latents)


def test_a_folder_without_vae_returns_latents(folder, drawn, tmp_path):
    pipe = Pipeline.from_pretrained(without(folder, tmp_path, "vae"), dtype=jnp.float32)
    assert pipe.vae is None
    # There is no VAE to say how many pixels a latent position has: CogVideoX's own 8 and 4.
    found = pipe(TEXTS, height=128, width=128, output_type="latent", **FEW)
    np.testing.assert_array_equal(found.latents, drawn.latents)
    with pytest.raises(ArgumentError, match='has no VAE: pass output_type="latent"'):
        pipe(TEXTS)


def test_a_folder_without_transformer_is_no_pipeline(folder, tmp_path):
    with pytest.raises(
        CheckpointError, match="needs a transformer and a scheduler; the folder holds vae, text_encoder"
    ):
        Pipeline.from_pretrained(without(folder, tmp_path, "transformer"))


# Bad input


@pytest.fixture(scope="module")
def untouched():
    """A pipeline of which nothing has been compiled: no other test has models of these widths."""
    return random_pipeline(d_ff=20, num_attention_heads=3)


BAD_CALLS = {
    "frames": ({"num_frames": 4}, r"num_frames=4 must be of the form 2k \+ 1; the nearest is \d$"),
    "no frames": ({"num_frames": 0}, "num_frames=0 must be of the form .* the nearest is 1"),
    "height": ({"height": 18}, r"height=18 must be a positive multiple of 4 \(VAE 2 x patch size\)"),
    "width": ({"width": 0}, "width=0 must be a positive multiple of 4"),
    "no prompt": ({"prompt": None}, "exactly one of prompt and prompt_embeds"),
    "empty list": ({"prompt": []}, "prompt is an empty list: give at least one"),
    "empty negative list": ({"negative_prompt": []}, "negative_prompt is an empty list"),
    "both prompts": ({"prompt_embeds": np.zeros((1, 8, 16))}, "exactly one of prompt and prompt_embeds"),
    "both negatives": (
        {"negative_prompt": "", "negative_prompt_embeds": np.zeros((1, 8, 16))},
        "at most one of negative_prompt and negative_prompt_embeds",
    ),
    "features rank": (
        {"prompt": None, "prompt_embeds": np.zeros((8, 16))},
        r"prompt_embeds must be \[batch, text, 16\], not \[8, 16\]",
    ),
    "features width": (
        {"prompt": None, "prompt_embeds": np.zeros((1, 8, 17))},
        r"prompt_embeds must be \[batch, text, 16\], not \[1, 8, 17\]",
    ),
    "no features": ({"prompt": None, "prompt_embeds": np.zeros((0, 8, 16))}, r"not \[0, 8, 16\]"),
    "negative batch": ({"negative_prompt": ["a"] * 3}, "negative_prompt: got 3 for 2 prompts; give one, or one for"),
    "negative features batch": (
        {"negative_prompt_embeds": np.zeros((3, 8, 16))},
        "negative_prompt: got 3 for 2 prompts",
    ),
    "negative length": (
        {"negative_prompt_embeds": np.zeros((2, 9, 16))},
        r"same text length, not 8 and 9 \(texts have 8\)",
    ),
    "latents": (
        {"latents": np.zeros((2, 4, 3, 4, 6))},
        r"latents must be \[2, 3, 4, 4, 6\] for this call, not \[2, 4, 3, 4, 6\]",
    ),
    "latents batch": ({"latents": np.zeros((1, 3, 4, 4, 6))}, r"latents must be \[2, 3, 4, 4, 6\]"),
    "seeds": ({"seed": [1, 2, 3]}, "got 3 seeds for 2 videos; give one seed, or one for each"),
    "negative seed": ({"seed": -1}, r"seed=-1 must be an integer between 0 and 2\^32 - 1"),
    "large seed": ({"seed": [0, 2**32]}, "seed=4294967296 must be an integer between"),
    "half a seed": ({"seed": [1, 1.5]}, r"seed=1\.5 must be an integer between"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0 must be between 1 and num_train_timesteps=1000"),
    "steps": ({"num_inference_steps": 1001}, "num_inference_steps=1001 must be between 1 and"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    "output type": ({"output_type": "pil"}, 'output_type=\'pil\' is not one of "np", "latent"'),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named_before_anything_is_compiled(untouched, compiled, case):
    change, message = BAD_CALLS[case]
    # Which annotations forbid, too.
    jaxtyping.config.update("jaxtyping_disable", case in ("output type", "half a seed"))
    try:
        with pytest.raises(ArgumentError, match=message):
            untouched(**{"prompt": TEXTS, **SMALL, **change})
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert compiled == []


def test_bad_scheduler_is_found_before_anything_is_compiled(untouched, compiled):
    """A model that predicts noise cannot start where there is no signal."""
    scheduler = dataclasses.replace(SCHEDULER, prediction_type="epsilon")
    with pytest.raises(ConfigError, match=r"no finite step exists at timestep\(s\) \[999\]"):
        dataclasses.replace(untouched, scheduler=scheduler)(TEXTS, **SMALL)
    assert compiled == []


def test_missing_components_are_found_before_anything_is_compiled(untouched, compiled):
    with pytest.raises(ArgumentError, match="has no VAE"):
        dataclasses.replace(untouched, vae=None)(TEXTS, **SMALL)
    for missing in ("text_encoder", "tokenizer"):
        with pytest.raises(ArgumentError, match="no text encoder or no tokenizer, so prompt cannot be encoded"):
            dataclasses.replace(untouched, **{missing: None})(TEXTS, **SMALL)
    assert compiled == []


def test_the_compile_counter_counts(compiled):
    """Without this, the tests above could not fail."""
    random_pipeline(d_ff=28, num_attention_heads=4)(TEXTS, **SMALL)
    assert {"encode_text", "sample"} <= {name.removeprefix("jit(").removesuffix(")") for name in compiled}


def test_errors_name_the_nearest_possible_number_of_frames(mini):
    for asked, nearest in ((6, 5), (16, 17), (2, 1), (-3, 1)):
        with pytest.raises(ArgumentError, match=rf"num_frames={asked} must be of the form 4k \+ 1; .* {nearest}$"):
            mini(TEXTS[0], num_frames=asked)


def test_models_that_do_not_fit_each_other(tiny):
    for change, message in (
        ({"transformer": random_transformer(text_embed_dim=24)}, "text_embed_dim is 24 .* d_model is 16"),
        (
            {"transformer": random_transformer(in_channels=8, out_channels=8)},
            "8 and the VAE's latent_channels is 4",
        ),
        (
            {"transformer": random_transformer(in_channels=8)},
            "in_channels is 8 and the transformer's out_channels is 4",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(tiny, **change)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "'PNDMScheduler' is not supported"),
        ("transformer/config.json", {"_class_name": "WanTransformer3DModel"}, "class WanTransformer3DModel is not"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "pipeline class 'FluxPipeline' is not supported"),
        ("transformer/config.json", {"num_layers": 7}, r"unexpected transformer_blocks\.7\."),
    ],
)
def test_checkpoints_of_the_wrong_kind(tmp_path, compiled, file, change, message):
    copy = shutil.copytree(MINI_MODEL, tmp_path / "copy")
    published_folder.edit_json(copy / file, **change)
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_pretrained(copy)
    assert compiled == []


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r'absent: no such folder.*called "mini"'):
        Pipeline.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r'is a file, where a checkpoint folder is needed.*"mini"'):
        Pipeline.from_pretrained(MINI_MODEL / "model_index.json")
    with pytest.raises(CheckpointError, match="not a checkpoint: there is neither"):
        Pipeline.from_pretrained(tmp_path)


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what(tiny):
    long = "a red 3 moves left slowly and a green 1 moves up fast"
    with pytest.warns(TruncatedPromptWarning, match="has 14 tokens, the model takes 8; cut: 'a green 1 moves up fast'"):
        found = tiny(long, **SMALL)
    assert same(found, tiny("a red 3 moves left slowly and", **SMALL))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_latents_name_the_video_and_the_step(tiny, value):
    latents = np.zeros((2, 3, 4, 4, 6), np.float32)
    latents[1, 2, 0, 1, 3] = value
    with pytest.raises(
        NonFiniteLatentsError, match=r"latents of video 1 became NaN or Inf at step 0 of 3 \(timestep 999\)"
    ):
        tiny(TEXTS, latents=latents, **SMALL)


def test_a_step_that_breaks_is_named(tiny, monkeypatch):
    monkeypatch.setattr(
        schedulers, "guidance_schedule", lambda *arguments: jnp.asarray([6.0, np.inf, 6.0], jnp.float32)
    )
    with pytest.raises(NonFiniteLatentsError, match=r"of video 0 became NaN or Inf at step 1 of 3 \(timestep 666\)"):
        tiny(TEXTS, **SMALL)
