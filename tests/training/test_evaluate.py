"""The judge is right about true clips, wrong about shuffled captions, and undecided about nonsense."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sixbit_jax.training import classifier, data, evaluate

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def judge_model():
    return classifier.load()


@pytest.fixture(scope="module")
def held_out():
    return tuple(jnp.asarray(a) for a in data.load_digits("held_out"))


@jax.jit
def rendered(phrases, count, key, images, labels):
    return evaluate.to_uint8(data.render(data.place_scenes(key, labels, phrases, count), images))


def draw(held_out, captions, seed):
    """True clips of held-out images, as uint8; a caption is a phrase or two."""
    phrases = jnp.array([[caption[0].index, caption[-1].index] for caption in captions], jnp.int32)
    count = jnp.array([len(caption) for caption in captions], jnp.int32)
    return np.asarray(rendered(phrases, count, jax.random.key(seed), *held_out))


@pytest.fixture(scope="module")
def truth(held_out):
    """Each of the 480 phrases once."""
    phrases = [data.Phrase.from_index(i) for i in range(data.NUM_PHRASES)]
    with jax.numpy_dtype_promotion("strict"):
        return phrases, np.concatenate(
            [draw(held_out, [(p,) for p in phrases[i : i + 48]], i) for i in range(0, 480, 48)]
        )


@pytest.fixture(scope="module")
def judgement(truth, judge_model):
    phrases, frames = truth
    with jax.numpy_dtype_promotion("strict"):
        return evaluate.judge(frames, phrases, judge_model, batch=48)


def test_judge_is_right_about_true_clips(judgement):
    result = evaluate.summary(judgement)
    assert result["n"] == 480
    assert result["digit"]["accuracy"] >= 0.97
    for attribute in ("colour", "direction", "speed"):
        assert result[attribute]["accuracy"] >= 0.99


def test_judge_fails_shuffled_captions(judgement):
    """Chance is 1 in 10, 6, 4 and 2; 480 clips put five standard deviations below 0.07, 0.09, 0.10 and 0.12."""
    order = np.random.default_rng(1).permutation(480)
    shuffled = evaluate.Judgement(
        expected={a: v[order] for a, v in judgement.expected.items()},
        seen=judgement.seen,
        velocity=judgement.velocity,
    )
    result = evaluate.summary(shuffled)
    for attribute, chance, spread in (
        ("digit", 1 / 10, 0.07),
        ("colour", 1 / 6, 0.09),
        ("direction", 1 / 4, 0.10),
        ("speed", 1 / 2, 0.12),
    ):
        assert abs(result[attribute]["accuracy"] - chance) < spread
    assert result["all"]["accuracy"] < 0.05


def test_velocity_is_measured(judgement, truth):
    phrases, _ = truth
    units, speeds = list(data.DIRECTIONS.values()), list(data.SPEEDS.values())
    wanted = np.array([np.array(units[p.direction]) * speeds[p.speed] for p in phrases])
    # whole pixels per frame leave only 8-bit rounding and the ink threshold, hundredths of a pixel
    np.testing.assert_allclose(judgement.velocity, wanted, atol=0.02)


@pytest.mark.parametrize(
    ("change", "attribute"),
    [
        (lambda f: np.concatenate([f[:, 8::-1], f[:, :8]], axis=1), "direction"),
        (lambda f: f[:, :, :, ::-1], "direction"),
        (lambda f: np.repeat(f[:, :9], 2, axis=1)[:, :17], "speed"),
        (lambda f: np.roll(f, 1, axis=-1), "colour"),
        (lambda f: f.swapaxes(2, 3), "direction"),
    ],
    ids=["reversed", "mirrored", "half speed", "colours rotated", "transposed"],
)
def test_judge_sees_a_changed_clip(change, attribute, held_out, judge_model):
    """Each change shows in the named attribute of fast clips to the left; all keep to the first nine frames."""
    phrases = [data.Phrase.parse(f"a {c} {d} moves left fast") for c in ("red", "blue") for d in (2, 3, 4, 5)]
    clips = draw(held_out, [(p,) for p in phrases], 2)
    assert evaluate.judge(clips, phrases, judge_model, batch=8).correct(attribute).all()
    changed = np.ascontiguousarray(change(clips))
    assert not evaluate.judge(changed, phrases, judge_model, batch=8).correct(attribute).any()


def test_two_digits_are_judged_one_by_one(held_out, judge_model):
    captions = data.held_out_captions()[40:]
    frames = draw(held_out, captions, 3)
    clips, phrases = evaluate.by_digit(frames, captions)
    assert len(clips) == len(phrases) == 8 + 2 * 48
    judged = evaluate.judge(clips, phrases, judge_model, batch=52)
    assert judged.correct("digit").mean() >= 0.96
    for attribute in ("colour", "direction", "speed"):
        assert judged.correct(attribute).mean() >= 0.99
    wrong, phrases = evaluate.by_digit(frames, [caption[::-1] for caption in captions])
    np.testing.assert_array_equal(
        wrong[8:].reshape(48, 2, *wrong.shape[1:])[:, ::-1].reshape(wrong[8:].shape), clips[8:]
    )
    others = [
        data.Phrase(digit=p.digit, colour=p.colour, direction=(p.direction + 1) % 4, speed=p.speed) for p in phrases
    ]
    assert not evaluate.judge(wrong, others, judge_model, batch=52).correct("direction").any()


def test_digits_that_share_a_channel_are_refused():
    caption = [data.Phrase.parse(f"a {colour} 3 moves left fast") for colour in ("red", "yellow")]
    with pytest.raises(ValueError, match=r"a red 3.*a yellow 3.*share a channel"):
        evaluate.by_digit(np.zeros((1, 17, 64, 64, 3), np.uint8), [caption])


@pytest.mark.parametrize("level", [0, 128, 255], ids=["black", "grey", "white"])
def test_nothing_to_see_is_undecided(level, judge_model):
    frames = np.full((2, 17, 64, 64, 3), level, np.uint8)
    seen = evaluate.judge(frames, data.held_out_scenes()[:2], judge_model, batch=2).seen
    for attribute in ("colour", "direction", "speed"):
        assert (seen[attribute] == evaluate.UNDECIDED).all()
    if level == 0:
        assert (seen["digit"] == evaluate.UNDECIDED).all()


@pytest.mark.parametrize(("dtype", "frames"), [("float32", 17), ("uint8", 16)])
def test_wrong_frames_are_refused(dtype, frames, judge_model):
    with pytest.raises(ValueError, match=rf"found {dtype} \(1, {frames}, 64, 64, 3\), wanted uint8"):
        evaluate.judge(np.zeros((1, frames, 64, 64, 3), dtype), data.held_out_scenes()[:1], judge_model)


def test_one_scene_per_clip_is_wanted(judge_model):
    with pytest.raises(ValueError, match="1 clips and 2 scenes"):
        evaluate.judge(np.zeros((1, 17, 64, 64, 3), np.uint8), data.held_out_scenes()[:2], judge_model)


def test_wilson_interval_of_a_published_case():
    """9 of 10: Newcombe (1998) and R's prop.test without correction give 0.5958 to 0.9821."""
    np.testing.assert_allclose(evaluate.wilson_interval(9, 10), (0.5958, 0.9821), atol=5e-5)
    assert evaluate.wilson_interval(0, 5)[0] == 0.0
    assert evaluate.wilson_interval(5, 5)[1] == 1.0


def test_evaluate_generates_each_held_out_prompt_in_equal_batches(held_out, judge_model):
    calls = []

    def generate(prompts, seed):
        calls.append((len(prompts), seed))
        return draw(held_out, [data.parse_caption(p) for p in prompts], seed)

    result = evaluate.evaluate(generate, judge_model, n=50, seed=3, batch=16)
    assert result.frames.shape == (50, 17, 64, 64, 3)
    assert result.prompts[:48] == tuple(p.text for p in data.held_out_scenes())
    assert result.prompts[48:] == result.prompts[:2]
    assert [count for count, _ in calls] == [16] * 4
    assert len({seed for _, seed in calls}) == 4
    assert result.summary["n"] == 50
    assert result.summary["direction"]["accuracy"] == 1.0


def test_evaluate_refuses_missing_clips(judge_model):
    with pytest.raises(ValueError, match="1 clips for 4 prompts"):
        evaluate.evaluate(lambda prompts, seed: np.zeros((1, 17, 64, 64, 3), np.uint8), judge_model, n=4, batch=4)
    with pytest.raises(ValueError, match="n=0"):
        evaluate.evaluate(lambda prompts, seed: np.zeros(0), judge_model, n=0)


def test_psnr_of_known_errors():
    a = jnp.zeros((2, 3, 4))
    b = jnp.stack([jnp.full((3, 4), 0.1), jnp.full((3, 4), 0.01)])
    # mean squared errors of 1e-2 and 1e-4; float32 logarithms are exact to 1e-5 dB
    np.testing.assert_allclose(evaluate.psnr(a, b), [20.0, 40.0], atol=1e-4)


class Offset(nnx.Module):
    """A stand-in autoencoder whose reconstruction is off by a constant of the mean, and by no other of the moments."""

    def __init__(self, offset):
        self.offset = nnx.Param(jnp.float32(offset))

    def encode(self, video):
        return jnp.concatenate([video, jnp.full_like(video, 7.0)], axis=-1)

    def decode(self, latents):
        return latents + self.offset[...]


def test_vae_psnr_is_over_the_unit_range_and_uses_the_mode():
    clips = np.zeros((5, 2, 4, 4, 3), np.float32)
    # 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB
    assert evaluate.vae_psnr(Offset(0.2), clips, batch=2) == pytest.approx(20.0, abs=1e-4)
    # the decoder's output is clipped: 5 becomes 1, an error of 0.5 in [0, 1]
    assert evaluate.vae_psnr(Offset(5.0), clips, batch=2) == pytest.approx(6.0206, abs=1e-4)


def test_to_uint8_is_the_inverse_of_the_scaling():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(evaluate.to_uint8(jnp.asarray(levels, jnp.float32) / 127.5 - 1), levels)
    assert evaluate.to_uint8(jnp.array([-3.0, 3.0])).tolist() == [0, 255]


def test_report_holds_the_results(tmp_path, truth, judge_model):
    phrases, frames = truth[0][:3], truth[1][:3]
    evaluation = evaluate.Evaluation(
        prompts=tuple(p.text for p in phrases),
        frames=frames,
        judgement=evaluate.judge(frames, phrases, judge_model, batch=48),
    )
    folder = tmp_path / "benchmarks" / "mini_model"
    losses = {"vae": [(0, 1.0), (10, 0.1)], "transformer": [(0, 2.0), (5, 0.5)]}
    evaluate.write_report(
        folder, evaluation, losses=losses, command="train --all", details={"vae_psnr_db": 31.5}, samples=2
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["results"] == json.loads(json.dumps(evaluation.summary))
    assert report["losses"]["vae"] == [[0, 1.0], [10, 0.1]]
    assert report["environment"]["jax"] == jax.__version__
    text = (folder / "report.md").read_text()
    assert "| vae_psnr_db | 31.5 |" in text
    assert "`train --all`" in text
    assert "| direction | 100.0% | 3 / 3 |" in text
    for name in ("loss.png", "samples.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_contact_sheet_wants_one_prompt_per_clip(tmp_path):
    with pytest.raises(ValueError, match="2 clips and 1 prompts"):
        evaluate.contact_sheet(np.zeros((2, 17, 64, 64, 3), np.uint8), ["one"], tmp_path / "x.png")
