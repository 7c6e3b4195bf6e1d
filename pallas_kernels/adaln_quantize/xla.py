"""`adaln_quantize` in plain JAX: `modulate` within the reference's bound, the rest equal to it in every byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array
from pallas_kernels.common.xla import rounded
from pallas_kernels.rotate_quantize import xla as rotation
from pallas_kernels.rotate_quantize.types import RowStatistics


@functools.partial(jax.jit, static_argnames=("format", "hadamard", "four_over_six", "carrier"))
def adaln_quantize(
    x: Float[Array, "batch tokens dim"], norm: AdaptiveNorm, *, format: str, **options: Any
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """See `api.adaln_quantize`; options are those of `rotate_quantize`."""
    scale_dims = 2 if format == "nvfp4" else 0
    return rotation.rotate_quantize(modulate(x, norm), format=format, scale_dims=scale_dims, **options)


def modulate(x: Float[Array, "batch tokens dim"], norm: AdaptiveNorm) -> Float[Array, "batch tokens dim"]:
    """Layer norm with two-pass variance, then modulation, in float32, rounded once to x's dtype."""
    wide, norm_scale, norm_bias, shift, scale = (
        value.astype(jnp.float32) for value in (x, norm.norm_scale, norm.norm_bias, norm.shift, norm.scale)
    )
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + norm.epsilon)
    text = (jnp.arange(x.shape[1]) < norm.text_length)[:, None]
    shift, scale = (jnp.where(text, value[:, :1], value[:, 1:]) for value in (shift, scale))
    return rounded((normed * norm_scale + norm_bias) * (1 + scale) + shift, x.dtype)
