"""The residual streams that CogVideoX normalises, to test, tune and time with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One operand x [batch, tokens, dim].

    Attributes:
        name: model.
        batch: samples, both guidance branches of each.
        tokens: text and video rows of a sample.
        text_length: rows of text at its beginning.
        dim: width.
    """

    name: str
    batch: int
    tokens: int
    text_length: int
    dim: int


FULL = tuple(
    Shape(name=f"cogvideox-{model}", batch=2, tokens=17_776, text_length=226, dim=dim)
    for model, dim in (("2b", 1920), ("5b", 3072))
)
"""49 frames of 480 x 720, with and without the prompt."""

SMALL = (
    Shape(name="one row", batch=1, tokens=1, text_length=0, dim=128),
    Shape(name="odd rows", batch=2, tokens=7, text_length=3, dim=384),
    Shape(name="blocks of 64", batch=3, tokens=5, text_length=5, dim=192),
    Shape(name="blocks of 32", batch=1, tokens=9, text_length=2, dim=96),
    Shape(name="mini", batch=2, tokens=33, text_length=8, dim=256),
)
"""For a CPU: every block size, and rows of text and video in one tile."""
