"""The linears of a CogVideoX block, to test, tune and time with."""

import dataclasses

from pallas_kernels.rotate_quantize.shapes import VIDEO_ROWS

TEXT_LENGTH = 226


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One product [batch, tokens, k] x [n, k].

    Attributes:
        name: model and site.
        batch: samples, guidance branches counted.
        tokens: text and video tokens of a sample.
        k: contracting size.
        n: output size.
        text_length: of the tokens.
        activation: as in `Epilogue`.
        gated: whether the product is gated and added to a residual.
    """

    name: str
    batch: int
    tokens: int
    k: int
    n: int
    text_length: int
    activation: str | None = None
    gated: bool = False


def block(model: str, *, batch: int, tokens: int, width: int, text_length: int) -> tuple[Shape, ...]:
    """The four linears of a block; attn_in is the three projections in one."""
    common = {"batch": batch, "tokens": tokens, "text_length": text_length}
    return (
        Shape(name=f"{model} attn_in", k=width, n=3 * width, **common),
        Shape(name=f"{model} attn_out", k=width, n=width, gated=True, **common),
        Shape(name=f"{model} ff_in", k=width, n=4 * width, activation="gelu_tanh", **common),
        Shape(name=f"{model} ff_out", k=4 * width, n=width, gated=True, **common),
    )


FULL = tuple(
    shape
    for model, width in (("cogvideox-5b", 3072), ("cogvideox-2b", 1920))
    for shape in block(model, batch=2, tokens=VIDEO_ROWS // 2, width=width, text_length=TEXT_LENGTH)
)

SMALL = (
    *block("mini", batch=2, tokens=37, width=64, text_length=5),
    Shape(name="one token", batch=1, tokens=1, k=128, n=16, text_length=0),
    Shape(name="odd tails", batch=3, tokens=131, k=96, n=144, text_length=130, activation="gelu_tanh", gated=True),
    Shape(name="all text", batch=2, tokens=17, k=32, n=48, text_length=17, gated=True),
)
"""For a CPU: sizes that no tile divides, on both sides of the boundary between text and video."""
