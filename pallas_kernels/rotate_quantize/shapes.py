"""The activations that CogVideoX quantises, to test, tune and time with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One operand x [rows, size].

    Attributes:
        name: model and site.
        rows: tokens of a forward pass, both guidance branches together.
        size: K.
    """

    name: str
    rows: int
    size: int


VIDEO_ROWS = 2 * 17_776
"""49 frames of 480 x 720: 13 x 30 x 45 latent patches and 226 text tokens, with and without the prompt."""

FULL = tuple(
    Shape(name=f"cogvideox-{model} {site}", rows=VIDEO_ROWS, size=size)
    for model, width in (("2b", 1920), ("5b", 3072))
    for site, size in (("attn_in, attn_out, ff_in", width), ("ff_out", 4 * width))
)

SMALL = (
    Shape(name="one row", rows=1, size=128),
    Shape(name="odd rows", rows=7, size=384),
    Shape(name="blocks of 64", rows=5, size=192),
    Shape(name="blocks of 32", rows=3, size=96),
    Shape(name="mini", rows=33, size=256),
)
"""For a CPU: every block size, and row counts that no tile divides."""
