"""The projected rows of CogVideoX's attention, to test and time with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: qkv is [batch, tokens, 3 * heads, head].

    Attributes:
        name: of the model.
        rotary: whether there are rotary positions.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    head: int = 64
    rotary: bool = True


FULL = (
    Shape(name="cogvideox-2b", batch=2, tokens=17_776, heads=30, rotary=False),
    Shape(name="cogvideox-5b", batch=2, tokens=17_776, heads=48),
)
"""49 frames of 480 x 720 and 226 text tokens, with and without the prompt."""

SMALL = (
    Shape(name="one token", batch=1, tokens=1, heads=1),
    Shape(name="a tail of tokens and heads", batch=2, tokens=13, heads=5),
    Shape(name="no rotary positions", batch=1, tokens=9, heads=3, rotary=False),
    Shape(name="heads of 128", batch=2, tokens=6, heads=2, head=128),
    Shape(name="heads of 32", batch=1, tokens=40, heads=4, head=32),
)
