"""How the linears of a transformer block are computed: the seam between a model and its quantisation.

A block names each linear's site and asks for its product, or hands over what surrounds it, so that an implementation
may fuse it: the adaptive layer norm in front (`normed`), or the gate and the residual behind (`gated`). Here is the
plain implementation, in the model's own dtype; `sixbit_jax.precision.linears` has the quantised ones.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float

from sixbit_jax.models.layers import LayerNorm

SITES = ("attn_in", "attn_out", "ff_in", "ff_out")
"""The linears of a CogVideoX block in the order they run. `attn_in` is query, key and value in one product."""


@struct.dataclass(kw_only=True)
class Modulation:
    """What the conditioning makes of one half of a block; index 0 of axis 1 is for text rows, 1 for video rows.

    Attributes:
        shift, scale, gate: [batch, 2, dim], in the model's dtype.
        text_length: number of text rows at the front of the sequence.
    """

    shift: Float[Array, "batch 2 dim"]
    scale: Float[Array, "batch 2 dim"]
    gate: Float[Array, "batch 2 dim"]
    text_length: int = struct.field(pytree_node=False)


@runtime_checkable
class Linears(Protocol):
    """Computes a block's linears."""

    def __call__(self, site: str, linear: Any, x: jax.Array) -> jax.Array:
        """linear(x)."""

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        """linear(norm(x) * (1 + scale) + shift), then GELU (tanh) if asked for.

        Args:
            site: of `SITES`: "attn_in" or "ff_in".
            linear: the block's own layer of that site.
            x: the residual stream, [batch, tokens, dim].
            norm: the layer norm in front.
            modulation: shift and scale.
            gelu: whether an activation follows.

        Returns:
            [batch, tokens, out], in the model's dtype.
        """

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        """residual + gate * linear(x).

        Args:
            site: of `SITES`: "attn_out" or "ff_out".
            linear: the block's own layer of that site.
            x: [batch, tokens, in].
            residual: the residual stream, [batch, tokens, dim].
            modulation: gate.

        Returns:
            [batch, tokens, dim], in the model's dtype.
        """


def per_row(values: Float[Array, "batch 2 dim"], tokens: int, text_length: int) -> Float[Array, "batch {tokens} dim"]:
    """The text vector for the first `text_length` rows, the video vector for the others."""
    is_text = jnp.arange(tokens)[None, :, None] < text_length
    return jnp.where(is_text, values[:, :1], values[:, 1:])


def modulated(norm: LayerNorm, x: Float[Array, "batch tokens dim"], modulation: Modulation) -> Float[Array, "..."]:
    """norm(x) * (1 + scale) + shift, rounded to the model's dtype after each operation."""
    shift, scale = (per_row(v, x.shape[1], modulation.text_length) for v in (modulation.shift, modulation.scale))
    return norm(x) * (1 + scale) + shift


class PlainLinears:
    """Every linear as an ordinary product in the model's dtype; what each is given goes through a call."""

    def __call__(self, site: str, linear: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope(site):
            return linear(x)

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        with jax.named_scope("norm"):
            x = modulated(norm, x, modulation)
        y = self(site, linear, x)
        with jax.named_scope(site):
            return nnx.gelu(y, approximate=True) if gelu else y

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        y = self(site, linear, x)
        with jax.named_scope(site):
            return residual + per_row(modulation.gate, x.shape[1], modulation.text_length) * y
