"""The attention of CogVideoX, to test, tune and time with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: query, key and value are [batch, tokens, heads, head].

    Attributes:
        name: of the model.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    head: int = 64


FULL = (
    Shape(name="cogvideox-2b", batch=2, tokens=17_776, heads=30),
    Shape(name="cogvideox-5b", batch=2, tokens=17_776, heads=48),
)
"""49 frames of 480 x 720 and 226 text tokens, with and without the prompt."""

SMALL = (
    Shape(name="one tile", batch=1, tokens=128, heads=1),
    Shape(name="a tail of keys and queries", batch=2, tokens=333, heads=3),
    Shape(name="mini", batch=2, tokens=352, heads=4),
)
