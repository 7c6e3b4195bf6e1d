"""The adaptive layer norm in front of a linear layer."""

import dataclasses
import typing

import jax
from jaxtyping import Array, Float


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdaptiveNorm:
    """y = (normalised x * norm_scale + norm_bias) * (1 + scale) + shift, of x [batch, tokens, dim].

    Arrays are of any float dtype, and are converted to float32.

    Attributes:
        norm_scale: [dim], what the normalised row is multiplied by; `norm_bias`, [dim], is then added.
        norm_bias: see `norm_scale`.
        shift: [batch, 2, dim]: entry 0 for the rows of text, 1 for those of video.
        scale: as `shift`.
        text_length: rows of text at the beginning of each sample.
        epsilon: added to the variance.
    """

    norm_scale: Float[Array, " dim"]
    norm_bias: Float[Array, " dim"]
    shift: Float[Array, "batch 2 dim"]
    scale: Float[Array, "batch 2 dim"]
    text_length: int = dataclasses.field(metadata={"static": True})
    epsilon: float = dataclasses.field(metadata={"static": True})

    def validate(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, with the sizes, unless the parts fit x of this shape."""
        if len(shape) != 3:
            raise ValueError(f"x must be [batch, tokens, dim], found {shape}")
        batch, tokens, dim = shape
        for name in ("norm_scale", "norm_bias", "shift", "scale"):
            wanted = (dim,) if name.startswith("norm") else (batch, 2, dim)
            if (found := getattr(self, name).shape) != wanted:
                raise ValueError(f"{name} must be {wanted} for x of {shape}, found {found}")
        if not 0 <= self.text_length <= tokens:
            raise ValueError(f"text_length={self.text_length} must be 0 to {tokens}, the tokens of x of {shape}")
