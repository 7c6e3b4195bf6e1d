"""The residual streams whose deltas are stored, to test and time with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One block's input and output, [batch, tokens, dim]."""

    name: str
    batch: int
    tokens: int
    dim: int


FULL = tuple(
    Shape(name=f"cogvideox-{model}", batch=2, tokens=17_776, dim=dim) for model, dim in (("2b", 1920), ("5b", 3072))
)
"""49 frames of 480 x 720, with and without the prompt."""

SMALL = (
    Shape(name="one row", batch=1, tokens=1, dim=16),
    Shape(name="odd rows and blocks", batch=2, tokens=7, dim=208),
    Shape(name="two chunks", batch=1, tokens=5, dim=1200),
    Shape(name="mini", batch=2, tokens=33, dim=256),
)
