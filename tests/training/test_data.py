"""The rendered clips show what their captions say."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sixbit_jax.training import data

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def test_held_out_captions_are_distinct_and_tell_two_digits_apart():
    captions = data.held_out_captions()
    assert len(captions) == len({data.caption_text(caption) for caption in captions}) == 96
    assert {len(caption) for caption in captions[:48]} == {1}
    assert {len(caption) for caption in captions[48:]} == {2}
    assert {phrase for caption in captions for phrase in caption} == set(data.held_out_scenes())
    channels = np.array(list(data.COLOURS.values()))
    for caption in captions:
        assert data.parse_caption(data.caption_text(caption)) == caption
        assert channels[[phrase.colour for phrase in caption]].sum(0).max() == 1
    assert len({frozenset(phrase.colour for phrase in caption) for caption in captions[48:64]}) == 6


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


def test_digits_keep_their_ink_and_the_named_motion(clip, digits):
    single = np.asarray(clip.scene.count) == 1
    ink = ((np.asarray(clip.video, np.float64) + 1) / 2)[single].max(-1)
    mass = ink.sum((2, 3))
    drawn = np.asarray(digits[0], np.float64)[np.asarray(clip.scene.image)[single, 0]].sum((1, 2)) / 255
    # Where the pixels fall in the enlarged image changes the sum by up to 1.3 %; a digit leaving the frame, or one
    # that is not enlarged, by more.
    np.testing.assert_allclose(mass, (drawn * (data.DRAWN_SIZE / 28) ** 2)[:, None].repeat(data.FRAMES, 1), rtol=0.02)
    grid = np.arange(data.SIZE)
    centre = np.stack([(ink.sum(3) * grid).sum(2), (ink.sum(2) * grid).sum(2)], -1) / mass[..., None]
    _, _, direction, speed = data.phrase_fields(np.asarray(clip.scene.phrase)[single, 0])
    velocity = (
        np.array(list(data.DIRECTIONS.values()))[direction] * np.array(list(data.SPEEDS.values()))[speed][:, None]
    )
    # Over two frames both speeds are whole pixels, so the same picture is seen elsewhere. Centre of mass of float32
    # pixels: 1e-4 pixel is rounding, a wrong speed is wrong by whole pixels.
    pairs = (centre[:, 2:] - centre[:, :-2])[:, : data.STEADY_FRAMES - 1]
    np.testing.assert_allclose(pairs, np.broadcast_to(2 * velocity[:, None], pairs.shape), atol=1e-4)
    # bounces do happen after that, and keep within the frame
    last = centre[:, -1] - centre[:, -2]
    assert (np.sign(last.round(1)) == -np.sign(velocity)).all(-1).any()


def test_drawing_is_bilinear_enlargement_along_the_path(clip, digits):
    """Against np.interp along each axis and a path walked frame by frame; every sixth clip, of one digit or two.

    The device keeps a corner of up to 24 pixels in float32, so places to 2e-6 pixel, and a pixel's ink is at most 1
    per pixel of that: 1e-5. One grid cell of 28 / 40 of a pixel, or half a pixel of shift, is off by 0.3 or more.
    """
    pixels = np.arange(data.SIZE) + 0.5
    for b in range(0, 64, 6):
        wanted = np.zeros((data.FRAMES, data.SIZE, data.SIZE, 3))
        for slot in range(int(clip.scene.count[b])):
            _, colour, direction, speed = data.phrase_fields(int(clip.scene.phrase[b, slot]))
            image = np.pad(np.asarray(digits[0][clip.scene.image[b, slot]], np.float64) / 255, 1)
            place = np.asarray(clip.scene.start[b, slot], np.float64)
            velocity = np.array(list(data.DIRECTIONS.values())[direction]) * list(data.SPEEDS.values())[speed]
            for frame in range(data.FRAMES):
                rows, columns = ((pixels - corner) * 28 / 40 + 0.5 for corner in place)
                across = np.stack([np.interp(columns, np.arange(30), line) for line in image])
                drawn = np.stack([np.interp(rows, np.arange(30), line) for line in across.T], 1)
                coloured = drawn[..., None] * np.array(list(data.COLOURS.values())[colour])
                wanted[frame] = np.maximum(wanted[frame], coloured)
                place = place + velocity
                velocity = np.where((place < 0) | (place > 24), -velocity, velocity)
                place = np.where(place < 0, -place, np.where(place > 24, 48 - place, place))
        np.testing.assert_allclose((np.asarray(clip.video[b], np.float64) + 1) / 2, wanted, atol=1e-5)


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
