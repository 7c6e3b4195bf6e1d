"""What happens to the product of a linear layer before it is stored, defined once for every matmul.

    y = activation(y + bias), and then, if there is a gate, y = residual + gate * y

in float32. `finish` is written so that a kernel can call it on a tile as `apply` calls it on the whole.
"""

import dataclasses
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

ACTIVATIONS = ("gelu_tanh",)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Epilogue:
    """The epilogue of a product of [..., N]; every part may be missing.

    Attributes:
        bias: [N].
        gate: [batch, 2, N]; of the rows of a sample the first `text_length` take entry 0, the others entry 1.
        residual: [batch, tokens, N], if and only if there is a gate.
        activation: None or "gelu_tanh".
        text_length: rows of text at the beginning of each sample.

    Arrays are of any float dtype, and are converted to float32.
    """

    bias: Float[Array, " n"] | None = None
    gate: Float[Array, "batch 2 n"] | None = None
    residual: Float[Array, "batch tokens n"] | None = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
    text_length: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def empty(self) -> bool:
        """Whether it leaves a product as it is."""
        return self.bias is None and self.gate is None and self.activation is None

    def validate(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, with the sizes, unless the parts fit a product of this shape, [..., N]."""
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"unknown activation {self.activation!r}; activations are None, {', '.join(ACTIVATIONS)}")
        if self.bias is not None and self.bias.shape != shape[-1:]:
            raise ValueError(f"bias must be [N] = {shape[-1:]}, found {self.bias.shape}")
        if (self.gate is None) != (self.residual is None):
            raise ValueError("gate and residual go together: pass both or neither")
        if self.gate is None or self.residual is None:
            if self.text_length:
                raise ValueError(f"text_length={self.text_length} is about the rows of a gate, and there is none")
            return
        if len(shape) != 3:
            raise ValueError(f"a gate needs a product of [batch, tokens, N], found {shape}")
        batch, tokens, n = shape
        if self.gate.shape != (batch, 2, n):
            raise ValueError(f"gate must be [batch, 2, N] = {(batch, 2, n)}, found {self.gate.shape}")
        if self.residual.shape != shape:
            raise ValueError(f"residual must be [batch, tokens, N] = {shape}, found {self.residual.shape}")
        if not 0 <= self.text_length <= tokens:
            raise ValueError(
                f"text_length={self.text_length} must be 0 to {tokens}, the tokens of a product of {shape}"
            )


def apply(epilogue: Epilogue, y: Float32[Array, "*rows n"]) -> Float32[Array, "*rows n"]:
    """The epilogue of a whole product."""
    gate = epilogue.gate
    if gate is not None:
        text = jnp.arange(y.shape[-2]) < epilogue.text_length
        gate = select_gate(text[:, None], gate[:, :1], gate[:, 1:])
    return finish(y, bias=epilogue.bias, activation=epilogue.activation, gate=gate, residual=epilogue.residual)


def select_gate(
    text: Bool[Array, "*rows"] | Bool[Array, "*rows n"], text_gate: Float[Array, "..."], video_gate: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The gate of each row, by whether it is a row of text; the three broadcast against each other."""
    return jnp.where(text, text_gate, video_gate)


def finish(
    y: Float32[Array, "*rows n"],
    *,
    bias: Float[Array, "..."] | None = None,
    activation: str | None = None,
    gate: Float[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
    tanh: Callable[[Array], Array] = jnp.tanh,
) -> Float32[Array, "*rows n"]:
    """The epilogue of a tile, from parts of that tile; `bias` and `gate` broadcast against y.

    A kernel that rounds to 16 bits may pass the `tanh` of its hardware.
    """
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation == "gelu_tanh":
        y = gelu_tanh(y, tanh)
    if gate is not None:
        assert residual is not None
        y = residual.astype(jnp.float32) + gate.astype(jnp.float32) * y
    return y


def gelu_tanh(y: Float32[Array, "*n"], tanh: Callable[[Array], Array] = jnp.tanh) -> Float32[Array, "*n"]:
    """y/2 * (1 + tanh(sqrt(2/pi) * (y + 0.044715 y^3)))."""
    slope = math.sqrt(2 / math.pi)
    half = 0.5 * y
    return half + half * tanh(y * (slope + slope * 0.044715 * (y * y)))


def tanh_by_exp2(u: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """tanh to about 2^-23 of 1, not of itself: enough for `gelu_tanh`, from the exponential that every GPU has."""
    return 1 - 2 / (1 + jnp.exp2(u * (2 * math.log2(math.e))))
