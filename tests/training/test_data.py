"""The rendered clips show what their captions say."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sixbit_jax.training import data


@pytest.fixture(scope="module")
def digits():
    return tuple(jnp.asarray(a) for a in data.load_digits("train"))


@pytest.fixture(scope="module")
def clip(digits):
    with jax.numpy_dtype_promotion("strict"):
        return jax.jit(data.sample_batch, static_argnums=3, static_argnames="two_digits")(
            jax.random.key(3), *digits, 64, two_digits=0.5
        )


def test_splits_are_disjoint_and_balanced():
    train, train_labels = data.load_digits("train")
    held, held_labels = data.load_digits("held_out")
    assert train.shape == (4500, 28, 28)
    assert np.bincount(train_labels).tolist() == [450] * 10
    assert np.bincount(held_labels).tolist() == [50] * 10
    assert not {i.tobytes() for i in train} & {i.tobytes() for i in held}


def test_caption_table_is_the_whole_grammar_in_index_order():
    table = data.caption_table()
    assert len(set(table)) == data.NUM_PHRASES == 480
    assert all(len(text.split(" ")) == 6 for text in table)
    assert all(data.Phrase.parse(text).index == i for i, text in enumerate(table))
    assert "a red 3 moves left slowly" in table


@pytest.mark.parametrize("text", ["a red 3 moves left", "a pink 3 moves left slowly", "a red 3  moves left slowly", ""])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not of the form"):
        data.parse_caption(text)


def test_phrase_index_out_of_range_is_refused():
    with pytest.raises(IndexError, match="480"):
        data.Phrase.from_index(480)


def test_held_out_phrases_are_a_balanced_tenth():
    held = data.held_out_scenes()
    assert len(held) == len({p.index for p in held}) == 48
    assert set(collections.Counter(p.colour for p in held).values()) == {8}
    assert set(collections.Counter(p.digit for p in held).values()) == {4, 5}
    assert set(collections.Counter((p.direction, p.speed) for p in held).values()) == {6}
    assert len({(p.digit, p.colour) for p in held}) == 48
    assert not {p.index for p in held} & set(data.training_phrases())


def test_training_clips_never_show_a_held_out_phrase(digits):
    draw = jax.jit(lambda key: data.sample_batch(key, *digits, 4096, two_digits=0.5).scene.phrase)
    seen = set(np.asarray(draw(jax.random.key(0))).ravel().tolist())
    assert seen == set(data.training_phrases())


def test_scene_is_what_its_caption_says(clip):
    texts = data.captions(clip.scene)
    for text, count, phrases in zip(texts, clip.scene.count, np.asarray(clip.scene.phrase), strict=True):
        assert [p.index for p in data.parse_caption(text)] == phrases[: int(count)].tolist()
    assert {len(t.split(" ")) for t in texts} == {6, 13}


def test_video_range_colour_and_background(clip):
    video = np.asarray(clip.video)
    assert video.shape == (64, 17, 64, 64, 3)
    assert video.dtype == np.float32
    assert video.min() == -1.0
    assert 0.9 < video.max() <= 1.0
    single = np.asarray(clip.scene.count) == 1
    lit = video[single].max(axis=(1, 2, 3)) > -1.0
    colours = np.asarray(data.phrase_fields(clip.scene.phrase)[1])[single, 0]
    np.testing.assert_array_equal(lit, np.array(list(data.COLOURS.values()))[colours] > 0)


def test_digits_keep_their_ink_and_the_named_motion(clip):
    """Bilinear weights sum to one, so ink is conserved and its centre moves exactly by the velocity."""
    single = np.asarray(clip.scene.count) == 1
    ink = ((np.asarray(clip.video, np.float64) + 1) / 2)[single].max(-1)
    mass = ink.sum((2, 3))
    # float32 sums of some 100 bright pixels: 1e-5 is their rounding; a digit leaving the frame loses percents.
    np.testing.assert_allclose(mass, mass[:, :1].repeat(data.FRAMES, 1), rtol=1e-5)
    grid = np.arange(data.SIZE)
    centre = np.stack([(ink.sum(3) * grid).sum(2), (ink.sum(2) * grid).sum(2)], -1) / mass[..., None]
    step = np.diff(centre, axis=1)
    _, _, direction, speed = data.phrase_fields(np.asarray(clip.scene.phrase)[single, 0])
    velocity = (
        np.array(list(data.DIRECTIONS.values()))[direction] * np.array(list(data.SPEEDS.values()))[speed][:, None]
    )
    steady = step[:, : data.STEADY_FRAMES]
    # centre of mass of float32 pixels: 1e-4 pixel is rounding, a wrong speed is wrong by whole pixels.
    np.testing.assert_allclose(steady, np.broadcast_to(velocity[:, None], steady.shape), atol=1e-4)
    # bounces do happen after that, and keep within the frame
    assert (np.sign(step[:, -1]) == -np.sign(velocity)).all(-1).any()


def test_whole_pixel_shift_copies_the_image(digits):
    scene = data.Scene(
        count=jnp.array([1]),
        phrase=jnp.array([[data.Phrase.parse("a green 4 moves down slowly").index, 0]]),
        start=jnp.array([[[3.0, 5.0], [0.0, 0.0]]]),
        image=jnp.array([[7, 0]]),
    )
    video = np.asarray(data.render(scene, digits[0]))
    expected = np.zeros((64, 64, 3))
    expected[5:33, 5:33, 1] = np.asarray(digits[0][7]) / 255.0
    # one float32 rounding of a value in [0, 255] mapped to [-1, 1]
    np.testing.assert_allclose((video[0, 2] + 1) / 2, expected, atol=1e-6)


def test_images_are_of_the_named_class(clip, digits):
    digit = data.phrase_fields(clip.scene.phrase)[0]
    np.testing.assert_array_equal(digits[1][clip.scene.image], digit)


def test_overlap_takes_the_larger_value_per_channel(digits):
    red, green = (data.Phrase.parse(f"a {c} 8 moves up slowly").index for c in ("red", "green"))
    start, image = jnp.full((2, 2, 2), 20.0), jnp.array([[11, 11], [11, 11]])
    both = data.Scene(count=jnp.array([2, 1]), phrase=jnp.array([[red, green]] * 2), start=start, image=image)
    video = np.asarray(data.render(both, digits[0]))
    np.testing.assert_array_equal(video[0, ..., 0], video[0, ..., 1])
    np.testing.assert_array_equal(video[0, ..., 0], video[1, ..., 0])
    assert (video[1, ..., 1:] == -1).all()


def test_batches_repeat_with_their_key(digits):
    def draw(seed):
        return np.asarray(data.sample_batch(jax.random.key(seed), *digits, 2).video)

    np.testing.assert_array_equal(draw(5), draw(5))
    assert (draw(5) != draw(6)).any()


def test_composed_ids_are_those_of_the_caption(clip):
    words = {w: i + 2 for i, w in enumerate(sorted({w for t in data.caption_table() for w in t.split()} | {"and"}))}
    phrase_ids = jnp.array([[words[w] for w in t.split()] for t in data.caption_table()])
    ids = data.compose_token_ids(clip.scene, phrase_ids, jnp.array([words["and"]]), length=20, eos_id=1, pad_id=0)
    expected = [[*(words[w] for w in text.split()), 1] for text in data.captions(clip.scene)]
    assert ids.tolist() == [e + [0] * (20 - len(e)) for e in expected]
    with pytest.raises(ValueError, match="takes 14 tokens"):
        data.compose_token_ids(clip.scene, phrase_ids, jnp.array([2]), length=13, eos_id=1, pad_id=0)
