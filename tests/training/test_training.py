import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from typer.testing import CliRunner

from sixbit_jax import checkpoint
from sixbit_jax.models.split import Split
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.sampling.schedulers import alphas_cumprod, get_velocity
from sixbit_jax.training import data, diffusion, loop, recipe, vae
from sixbit_jax.training.__main__ import app
from sixbit_jax.training.tokenizer import EOS_ID, PAD_ID, UNK_ID, build_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

RUNS = Path(__file__).parents[2] / "benchmarks" / "mini_model" / "run"
OPTIMIZER = recipe.OptimizerRecipe(learning_rate=0.1, warmup_steps=4, batch=2, steps_per_call=2, ema_decay=0.9)
TINY_VAE = dataclasses.replace(
    recipe.MINI_VAE,
    block_out_channels=(4,),
    norm_num_groups=2,
    temporal_compression_ratio=1,
    down_block_types=("CogVideoXDownBlock3D",),
    up_block_types=("CogVideoXUpBlock3D",),
)
"""One level: latents have the size of the video."""
TINY_DIFFUSION = recipe.DiffusionRecipe(
    transformer=dataclasses.replace(
        recipe.MINI_TRANSFORMER,
        num_attention_heads=1,
        attention_head_dim=32,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=5,
        patch_size=8,
        temporal_compression_ratio=1,
    ),
    text_encoder=dataclasses.replace(recipe.MINI_T5, d_model=16, d_kv=8, d_ff=16, num_heads=2),
    optimizer=dataclasses.replace(OPTIMIZER, learning_rate=2e-3, steps_per_call=1),
    pool_clips=8,
    refresh_clips=4,
    encode_batch=2,
)


@pytest.fixture
def small_clips(monkeypatch):
    """Both trainings see clips of 5 frames of 16 x 16."""

    def sample(*arguments):
        clip = data.sample_batch(*arguments)
        return dataclasses.replace(clip, video=clip.video[:, :5, ::4, ::4])

    monkeypatch.setattr(vae, "sample_batch", sample)
    monkeypatch.setattr(diffusion, "sample_batch", sample)
    return sample


def quadratic(params, data, key):
    noise = jax.random.normal(key, params["kernel"].shape)
    loss = jnp.sum((params["kernel"] - data) ** 2) + jnp.sum(params["kernel"] * noise) + jnp.sum(params["bias"] ** 2)
    return loss, {"first": params["kernel"][0]}


def quadratic_params():
    return {"kernel": jnp.arange(3.0), "bias": jnp.ones(2)}


def run_quadratic(folder, steps, settings=OPTIMIZER):
    outputs = loop.Outputs(folder=folder, name="toy", checkpoints=folder / "checkpoints")
    state, fraction = loop.restore_checkpoint(outputs.checkpoints, loop.init_state(quadratic_params(), settings))
    return loop.train(
        quadratic,
        state,
        jnp.full(3, 2.0),
        key=jax.random.key(1),
        recipe=settings,
        budget=loop.Budget(steps=steps),
        outputs=outputs,
        fraction=fraction,
    )


def test_mini_model_fits_the_repository():
    networks = jax.eval_shape(lambda: diffusion.build(recipe.DiffusionRecipe(), jax.random.key(0)))
    autoencoder = jax.eval_shape(lambda: vae.build(recipe.MINI_VAE, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves((diffusion.trainable(networks), autoencoder.params)))
    assert 2 * count <= 21.5e6
    transformer = recipe.MINI_TRANSFORMER
    latents = (transformer.sample_frames - 1) // 4 + 1
    assert latents * (transformer.sample_height // 2) * (transformer.sample_width // 2) == 320
    assert recipe.MINI_T5.d_model == transformer.text_embed_dim
    assert recipe.MINI_VAE.latent_channels == transformer.in_channels == transformer.out_channels


@pytest.mark.parametrize(
    ("name", "settings"), [(vae.NAME, recipe.VAERecipe()), (diffusion.NAME, recipe.DiffusionRecipe())]
)
def test_the_bundled_model_was_trained_with_this_recipe(name, settings):
    run = json.loads((RUNS / f"{name}.json").read_text())
    assert json.loads(json.dumps(dataclasses.asdict(settings))) == run["recipe"]
    last = json.loads((RUNS / f"{name}.jsonl").read_text().splitlines()[-1])
    assert last["step"] == run["steps"]


def test_learning_rate_warms_up_by_steps_and_falls_by_budget():
    np.testing.assert_allclose(loop.learning_rates(OPTIMIZER, 0, 0.0), [0.025, 0.05], rtol=1e-6)
    np.testing.assert_allclose(loop.learning_rates(OPTIMIZER, 2, 0.0), [0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(loop.learning_rates(OPTIMIZER, 9, 0.5), [0.0505, 0.0505], rtol=1e-6)
    np.testing.assert_allclose(loop.learning_rates(OPTIMIZER, 9, 1.0), [0.001, 0.001], rtol=1e-6)


def test_update_is_adamw_with_an_average():
    """Against optax.adamw in a Python loop. Float32, two steps: rounding only, 1e-6."""
    settings = dataclasses.replace(OPTIMIZER, weight_decay=0.3, clip_norm=1e9)
    key, target, rates = jax.random.key(1), jnp.full(3, 2.0), jnp.asarray([0.1, 0.02])
    state, metrics = loop.make_update(quadratic, settings)(
        loop.init_state(quadratic_params(), settings), target, key, rates
    )
    params = average = quadratic_params()
    optimizer_state, losses = None, []
    for step in range(2):
        adamw = optax.adamw(float(rates[step]), b2=0.99, weight_decay=0.3, mask={"kernel": True, "bias": False})
        optimizer_state = optimizer_state or adamw.init(params)
        step_key = jax.random.fold_in(key, step)
        (loss, _), gradients = jax.value_and_grad(quadratic, has_aux=True)(params, target, step_key)
        losses.append(loss)
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = adamw.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        keep = (1 + step) / (10 + step)
        average = jax.tree.map(lambda a, p, keep=keep: keep * a + (1 - keep) * p, average, params)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(state.params[name], params[name], rtol=1e-6)
        np.testing.assert_allclose(state.average[name], average[name], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    assert int(state.step) == 2


def test_muon_updates_the_matrices_of_blocks_and_adam_all_else():
    """The first step. Muon: the gradient's singular vectors, each layer's own, and one size for all singular values."""
    settings = dataclasses.replace(OPTIMIZER, muon=True, weight_decay=0.0, clip_norm=1e9)
    shapes = {
        "transformer": {
            "blocks": {"attn_in": {"kernel": (2, 6, 18), "bias": (2, 18)}, "norm1": {"linear": {"kernel": (2, 5, 36)}}},
            "proj_out": {"kernel": (6, 4)},
        }
    }
    keys = iter(jax.random.split(jax.random.key(0), 8))
    gradients = jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    optimizer = loop.make_optimizer(settings)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    updates, gradients = loop.named_leaves(updates), loop.named_leaves(gradients)
    name = "transformer.blocks.attn_in.kernel"
    for update, gradient in zip(np.asarray(updates.pop(name)), np.asarray(gradients.pop(name)), strict=True):
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        # of root mean square 0.2, as Adam's updates: 0.2 * sqrt(larger side), if all singular values are equal
        turned = left.T @ update @ right.T / (0.2 * np.sqrt(18))
        # Five Newton-Schulz steps bring a singular value into 0.7 to 1.2, and keep vectors to rounding.
        sizes = np.diag(turned)
        assert ((sizes > 0.65) & (sizes < 1.25)).all()
        np.testing.assert_allclose(turned - np.diag(sizes), 0, atol=1e-4)
    assert len(updates) == 3
    for name, update in updates.items():
        # Adam's first step is the sign, which Nesterov's look-ahead lengthens by b1 (1 - b1) / (1 - b1 ** 2).
        wanted = (1 + 0.9 * 0.1 / (1 - 0.81)) * np.sign(gradients[name])
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=name)


def test_a_step_without_finite_gradients_changes_nothing_else():
    def broken(params, data, key):
        loss, parts = quadratic(params, data, key)
        return loss * data[0], parts

    start = loop.init_state(quadratic_params(), OPTIMIZER)
    before = jax.device_get((start.params, start.average, start.optimizer))
    state, metrics = loop.make_update(broken, OPTIMIZER)(
        start, jnp.full(3, jnp.nan), jax.random.key(0), jnp.ones(2, jnp.float32)
    )
    assert int(state.step) == 2
    assert float(metrics["skipped"]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.average, state.optimizer), before)


def test_training_stops_when_no_step_is_finite(tmp_path):
    outputs = loop.Outputs(folder=tmp_path, name="toy", checkpoints=tmp_path / "c")
    with pytest.raises(FloatingPointError, match="toy: no finite gradients in 2 steps to 2"):
        loop.train(
            quadratic,
            loop.init_state(quadratic_params(), OPTIMIZER),
            jnp.full(3, jnp.inf),
            key=jax.random.key(0),
            recipe=OPTIMIZER,
            budget=loop.Budget(steps=4),
            outputs=outputs,
        )


def test_a_resumed_run_takes_the_same_steps(tmp_path):
    """Bit for bit: the same compiled function sees the same numbers."""
    # A run of 8 steps that is cut after 4: its budget, and so its learning rates, are those of the whole.
    whole = run_quadratic(tmp_path / "whole", 8)
    cut = tmp_path / "cut"
    update = loop.make_update(quadratic, OPTIMIZER)
    state = loop.init_state(quadratic_params(), OPTIMIZER)
    for step in (0, 2):
        rates = jnp.asarray(loop.learning_rates(OPTIMIZER, step, step / 8))
        state, _ = update(state, jnp.full(3, 2.0), jax.random.key(1), rates)
    loop.save_checkpoint(cut / "checkpoints", state, 0.5)
    (cut / "toy.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 6, "loss": 1}\n')
    resumed = run_quadratic(cut, 8)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
    assert [json.loads(x)["step"] for x in (cut / "toy.jsonl").read_text().splitlines()] == [2, 4, 6, 8]
    assert int(run_quadratic(cut, 8).step) == 8


def test_time_budget_ends_and_moves_the_learning_rate(tmp_path, monkeypatch):
    """By a clock that moves on by 10 ms whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 100))
    outputs = loop.Outputs(folder=tmp_path, name="toy", checkpoints=tmp_path / "c", save_every=0.2)
    budget = loop.Budget(seconds=1.5, started=0.0)
    loop.train(
        quadratic,
        loop.init_state(quadratic_params(), OPTIMIZER),
        jnp.full(3, 2.0),
        key=jax.random.key(1),
        recipe=OPTIMIZER,
        budget=budget,
        outputs=outputs,
    )
    lines = [json.loads(x) for x in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert lines[0]["fraction"] < 0.1
    assert 0.9 < lines[-1]["fraction"] <= 1
    assert lines[-1]["rate"] < 0.04 * OPTIMIZER.learning_rate
    assert len(lines) > 20
    assert loop.load_metadata(tmp_path, "toy")["step"] == str(lines[-1]["step"])


def test_a_time_budget_that_compilation_uses_up_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 2.0))
    outputs = loop.Outputs(folder=tmp_path, name="toy", checkpoints=tmp_path / "c")
    with pytest.raises(ValueError, match=r"a budget of 1\.5 s ended before the first step: compilation alone"):
        loop.train(
            quadratic,
            loop.init_state(quadratic_params(), OPTIMIZER),
            jnp.full(3, 2.0),
            key=jax.random.key(1),
            recipe=OPTIMIZER,
            budget=loop.Budget(seconds=1.5, started=0.0),
            outputs=outputs,
        )


@pytest.mark.parametrize("wrong", [{}, {"seconds": 0.0}, {"steps": -1}])
def test_bad_budgets_are_refused(wrong):
    with pytest.raises(ValueError, match="budget"):
        loop.Budget(**wrong)


def test_weights_are_split_into_small_files_and_read_back(tmp_path):
    params = {"a": jnp.arange(8.0), "b": {"kernel": jnp.ones((2, 4)) / 3}, "c": jnp.zeros(4)}
    paths = loop.save_weights(tmp_path, "toy", params, dtype=jnp.bfloat16, metadata={"x": "1"}, limit=24)
    assert [p.name for p in paths] == [f"toy-0000{i}-of-00002.safetensors" for i in (1, 2)]
    found = loop.load_weights(tmp_path, "toy", params)
    jax.tree.map(
        lambda f, p: np.testing.assert_array_equal(f, p.astype(jnp.bfloat16).astype(jnp.float32)), found, params
    )
    assert loop.load_metadata(tmp_path, "toy") == {"x": "1"}
    with pytest.raises(ValueError, match=r"(?s)b.kernel: found \(2, 4\), wanted \(3,\).*missing d.*unexpected c"):
        loop.load_weights(tmp_path, "toy", {"a": params["a"], "b": {"kernel": jnp.ones(3)}, "d": params["c"]})
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="every shard toy-"):
        loop.load_weights(tmp_path, "toy", params)


def test_forgetting_words():
    ids = jnp.asarray(build_tokenizer()(["a red 3 moves left slowly"] * 2000, padding="max_length").input_ids)
    key, settings = jax.random.key(0), TINY_DIFFUSION

    def forget(**rates):
        return np.asarray(diffusion.forget_words(key, ids, dataclasses.replace(settings, **rates)))

    np.testing.assert_array_equal(forget(prompt_dropout=0.0, unknown_words=0.0), ids)
    np.testing.assert_array_equal(forget(prompt_dropout=1.0)[0], [EOS_ID] + [PAD_ID] * 31)
    dropped = (forget(prompt_dropout=0.15, unknown_words=0.0)[:, 0] == EOS_ID).mean()
    assert abs(dropped - 0.15) < 0.03  # four standard deviations of 2000 draws
    unknown = forget(prompt_dropout=0.0, unknown_words=1.0)
    np.testing.assert_array_equal(unknown, np.where(np.asarray(ids) > UNK_ID, UNK_ID, ids))


def test_untrained_loss_is_the_power_of_the_target():
    """The output starts at zero, so the loss is the mean square of the velocity itself; float32 sums, 1e-5."""
    networks = diffusion.build(TINY_DIFFUSION, jax.random.key(0), jnp.float32)
    latents = jax.random.normal(jax.random.key(1), (8, 3, 8, 16, 16))
    ids = jnp.ones((8, 5), jnp.int32)
    key = jax.random.key(2)
    loss, parts = jax.jit(functools.partial(diffusion.velocity_loss, recipe=TINY_DIFFUSION))(
        networks, latents, ids, key
    )
    time_key, noise_key = jax.random.split(key)
    timestep = ((jnp.arange(8.0) + jax.random.uniform(time_key, (8,))) * 125).astype(jnp.int32)
    noise = jax.random.normal(noise_key, latents.shape)
    target = get_velocity(alphas_cumprod(TINY_DIFFUSION.scheduler), latents, noise, timestep)
    np.testing.assert_allclose(loss, np.mean(np.square(target)), rtol=1e-5)
    np.testing.assert_allclose(parts["loss_noisier_half"], np.mean(np.square(target[4:])), rtol=1e-5)


def test_diffusion_learns_a_fixed_batch():
    settings = dataclasses.replace(OPTIMIZER, learning_rate=3e-3, warmup_steps=5, steps_per_call=60)
    small_patches = dataclasses.replace(TINY_DIFFUSION.transformer, patch_size=2, sample_width=4, sample_height=4)
    model = dataclasses.replace(TINY_DIFFUSION, transformer=small_patches)
    networks = diffusion.build(model, jax.random.key(0), jnp.float32)
    latents = jnp.asarray([-1.5, -0.5, 0.5, 1.5]).reshape(4, 1, 1, 1, 1) * jnp.ones((4, 1, 8, 4, 4))
    ids = jnp.asarray([[3, EOS_ID], [4, EOS_ID], [5, EOS_ID], [6, EOS_ID]])

    def loss(params, batch, key):
        return diffusion.velocity_loss(diffusion.with_params(networks, params), *batch, key, model)

    update = loop.make_update(loss, settings)
    state, before = loop.init_state(diffusion.trainable(networks), settings), None
    for call in range(4):
        rates = jnp.asarray(loop.learning_rates(settings, 60 * call, 0.0))
        state, metrics = update(state, (latents, ids), jax.random.key(3), rates)
        before = before or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.4 * before  # 0.26 when written
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, diffusion.trainable(networks))
    assert all(m > 0 for name, m in loop.named_leaves(moved).items() if "relative" not in name)


@pytest.fixture(scope="module")
def tiny_vae():
    with jax.default_matmul_precision("highest"):
        model = AutoencoderKLCogVideoX(TINY_VAE, dtype=jnp.float32, rngs=nnx.Rngs(0))
        model.config = dataclasses.replace(TINY_VAE, scaling_factor=2.0)
        return Split.of(model)


def test_pool_is_a_ring_of_encoded_clips(tiny_vae, small_clips):
    fill = diffusion.make_encoder(tiny_vae, TINY_DIFFUSION, 4, jax.random.key(0))
    pools = {}
    pool = diffusion.empty_pool(TINY_DIFFUSION, tiny_vae)
    for group in range(3):
        pool = fill(pool, jnp.asarray(group))
        pools[group] = jax.device_get(pool)
    assert np.any(pools[0].ids[:4])
    assert not np.any(pools[0].ids[4:])
    np.testing.assert_array_equal(pools[2].ids[4:], pools[1].ids[4:])
    assert not np.array_equal(pools[2].ids[:4], pools[1].ids[:4])
    # What a run resumed at call 1 fills first is what an uncut one holds then.
    resumed = fill(diffusion.empty_pool(TINY_DIFFUSION, tiny_vae), jnp.asarray(1))
    resumed = fill(resumed, jnp.asarray(2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), pools[2])

    draw_key, latent_key = jax.random.split(jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)[0])
    images, labels = (jnp.asarray(x) for x in data.load_digits("train"))
    clip = small_clips(draw_key, images, labels, 2)
    text = build_tokenizer()(data.captions(clip.scene), padding="max_length").input_ids
    np.testing.assert_array_equal(pools[0].ids[:2], text)
    moments = jax.jit(lambda model, video: model.merge().encode(video))(tiny_vae, clip.video)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    sampled = mean + jnp.exp(log_variance / 2) * jax.random.normal(latent_key, mean.shape)
    wanted = 2.0 * sampled.transpose(0, 1, 4, 2, 3)
    # bfloat16 keeps 8 bits.
    np.testing.assert_allclose(pools[0].latents[:2].astype(np.float32), wanted, rtol=2**-8, atol=1e-3)


def test_pools_that_do_not_divide_are_refused(tiny_vae):
    with pytest.raises(ValueError, match="refresh_clips=3 must divide by encode_batch=2"):
        diffusion.make_encoder(tiny_vae, TINY_DIFFUSION, 3, jax.random.key(0))


def test_reconstruction_loss_is_the_sum_of_its_terms(tiny_vae):
    settings = recipe.VAERecipe(config=TINY_VAE)
    video = jax.random.uniform(jax.random.key(1), (1, 2, 8, 8, 3), minval=-1)
    loss, terms = jax.jit(lambda model, *rest: vae.reconstruction_loss(model.merge(), *rest, settings))(
        tiny_vae, video, jax.random.key(2)
    )
    wanted = sum(getattr(settings, name) * float(term) for name, term in terms.items())
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert set(terms) == {"mse", "l1", "gradient", "kl"}
    assert all(float(term) > 0 for term in terms.values())


@pytest.mark.slow
def test_the_commands_train_and_export(tmp_path, monkeypatch, small_clips):
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=2e-3, steps_per_call=1)
    monkeypatch.setattr(
        recipe, "VAERecipe", functools.partial(recipe.VAERecipe, config=TINY_VAE, optimizer=optimizer, measured_clips=2)
    )
    monkeypatch.setattr(recipe, "DiffusionRecipe", lambda: TINY_DIFFUSION)
    out = tmp_path / "run"

    def command(*arguments):
        with jax.numpy_dtype_promotion("standard"):  # jax's own attention is not strict in its backward pass
            result = CliRunner().invoke(app, [*map(str, arguments)])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    assert "dB on held-out digits" in command("vae", "--out", out, "--steps", 2)
    config = json.loads(loop.load_metadata(out, "vae")["config"])
    assert config["scaling_factor"] != TINY_VAE.scaling_factor
    command("diffusion", "--out", out, "--steps", 2)
    assert [json.loads(x)["step"] for x in (out / "diffusion.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((out / "diffusion.json").read_text())["steps"] == 2
    fresh = diffusion.build(TINY_DIFFUSION, jax.random.key(1))
    start = loop.init_state(diffusion.trainable(fresh), TINY_DIFFUSION.optimizer)
    state, fraction = loop.restore_checkpoint(tmp_path / "run-checkpoints" / "diffusion", start)
    assert (int(state.step), fraction) == (2, 1.0)

    assert "MB" in command("export", "--out", out, "--to", tmp_path / "assets" / "mini")
    loaded = checkpoint.load(tmp_path / "assets" / "mini", dtype=jnp.float32)
    networks = diffusion.load(out, TINY_DIFFUSION)
    for name, value in loop.named_leaves(diffusion.trainable(networks)).items():
        np.testing.assert_array_equal(value, loop.named_leaves(state.average)[name].astype(jnp.bfloat16))
    wanted = loop.named_leaves(networks.transformer.params)
    found = loop.named_leaves(nnx.state(loaded.transformer))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    assert loaded.scheduler == recipe.MINI_SCHEDULER
    assert loaded.vae.config.scaling_factor == config["scaling_factor"]
    assert loaded.tokenizer("a red 3").input_ids == build_tokenizer()("a red 3").input_ids
    other = dataclasses.replace(TINY_DIFFUSION, scheduler=dataclasses.replace(recipe.MINI_SCHEDULER, beta_end=0.02))
    with pytest.raises(ValueError, match="the weights were trained with"):
        diffusion.load(out, other)
