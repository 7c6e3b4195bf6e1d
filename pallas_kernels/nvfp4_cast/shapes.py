"""The weights that are cast, to test, tune and time with."""

import dataclasses

from pallas_kernels.scaled_matmul.shapes import FULL as BLOCK_LINEARS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One weight [n, k].

    Attributes:
        name: model and site.
        n: output size.
        k: contracting size.
    """

    name: str
    n: int
    k: int


FULL = tuple(Shape(name=linear.name, n=linear.n, k=linear.k) for linear in BLOCK_LINEARS)

SMALL = (
    Shape(name="one row", n=1, k=128),
    Shape(name="odd rows", n=7, k=384),
    Shape(name="blocks of 64", n=5, k=192),
    Shape(name="blocks of 32", n=3, k=96),
    Shape(name="mini", n=33, k=256),
)
"""For a CPU: every block size, and row counts that no tile divides."""
