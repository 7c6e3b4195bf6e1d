"""The linears of one row a sample, to test, tune and time with."""

import dataclasses

from pallas_kernels.scaled_matmul.shapes import FULL as BLOCK_LINEARS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One product [rows, k] x [n, k].

    Attributes:
        name: model and site.
        rows: one a sample, guidance branches counted.
        k: contracting size.
        n: output size.
    """

    name: str
    rows: int
    k: int
    n: int


EMBEDDING = 512
"""Width of the time embedding, which the modulation linears read."""

MODULATION = tuple(
    Shape(name=f"cogvideox-{model} modulation", rows=2, k=EMBEDDING, n=6 * width)
    for model, width in (("5b", 3072), ("2b", 1920))
)
FULL = MODULATION + tuple(
    Shape(name=f"{linear.name}, {rows} rows", rows=rows, k=linear.k, n=linear.n)
    for linear in BLOCK_LINEARS
    if "5b" in linear.name
    for rows in (1, 2, 16)
)

SMALL = (
    Shape(name="one row", rows=1, k=128, n=16),
    Shape(name="odd sizes", rows=3, k=384, n=71),
    Shape(name="blocks of 64", rows=16, k=192, n=33),
    Shape(name="blocks of 32", rows=5, k=96, n=7),
    Shape(name="mini", rows=2, k=512, n=384),
)
"""For a CPU: every block size, and sizes that no tile divides."""
