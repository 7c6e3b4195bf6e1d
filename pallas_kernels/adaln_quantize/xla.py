"""`adaln_quantize` in plain JAX: `modulate` within the reference's bound, the rest equal to it in every byte."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.common.xla import rounded
from pallas_kernels.rotate_quantize import xla as rotation
from pallas_kernels.rotate_quantize.types import RowStatistics


@functools.partial(
    jax.jit, static_argnames=("text_length", "epsilon", "format", "hadamard", "four_over_six", "carrier")
)
def adaln_quantize(
    x: Float[Array, "batch tokens dim"],
    *,
    norm_scale: Float[Array, " dim"],
    norm_bias: Float[Array, " dim"],
    shift: Float[Array, "batch 2 dim"],
    scale: Float[Array, "batch 2 dim"],
    text_length: int,
    epsilon: float,
    format: str,
    hadamard: int,
    four_over_six: bool = False,
    carrier: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.adaln_quantize`; `hadamard` is a block size or 0."""
    y = modulate(
        x,
        norm_scale=norm_scale,
        norm_bias=norm_bias,
        shift=shift,
        scale=scale,
        text_length=text_length,
        epsilon=epsilon,
    )
    return rotation.rotate_quantize(
        y,
        format=format,
        hadamard=hadamard,
        scale_dims=2 if format == "nvfp4" else 0,
        four_over_six=four_over_six,
        carrier=carrier,
    )


def modulate(
    x: Float[Array, "batch tokens dim"],
    *,
    norm_scale: Float[Array, " dim"],
    norm_bias: Float[Array, " dim"],
    shift: Float[Array, "batch 2 dim"],
    scale: Float[Array, "batch 2 dim"],
    text_length: int,
    epsilon: float,
) -> Float[Array, "batch tokens dim"]:
    """Layer norm with two-pass variance, then modulation, in float32, rounded once to x's dtype."""
    dtype = x.dtype
    x, norm_scale, norm_bias, shift, scale = (
        value.astype(jnp.float32) for value in (x, norm_scale, norm_bias, shift, scale)
    )
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    text = (jnp.arange(x.shape[1]) < text_length)[:, None]
    shift, scale = (jnp.where(text, value[:, :1], value[:, 1:]) for value in (shift, scale))
    return rounded((normed * norm_scale + norm_bias) * (1 + scale) + shift, dtype)
