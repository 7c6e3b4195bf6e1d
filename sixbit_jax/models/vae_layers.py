"""Building blocks of the causal video autoencoder: convolutions with carried frames, latent-modulated norms, resizing.

Everything is channels-last, [batch, frames, height, width, channels], and time only ever looks back. A block that
needs frames of the previous chunk takes a cache and returns the next one: a dict of arrays, or None before the first
chunk. Sources: diffusers `CogVideoXCausalConv3d`, `CogVideoXSpatialNorm3D`, `CogVideoXResnetBlock3D`,
`CogVideoXDownsample3D`, `CogVideoXUpsample3D`.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

type Cache = Mapping[str, Any]
"""Nested dict that ends in arrays [B, 2, H, W, C]: the last two input frames of each causal convolution."""


def group_norm(
    x: Float[Array, "B F H W C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, groups: int, eps: float
) -> Float[Array, "B F H W C"]:
    """Normalises each group of channels over all frames and positions of one sample; float32 inside and out.

    One pass over `x`: sums are taken per channel about that channel's first value, so that a mean far from zero costs
    no precision, and channels are then combined into groups.
    """
    x = x.astype(jnp.float32)
    pivot = lax.stop_gradient(x[:, :1, :1, :1])
    offset = (x - pivot).mean((1, 2, 3), keepdims=True)
    spread = jnp.square(x - pivot).mean((1, 2, 3), keepdims=True) - jnp.square(offset)
    channel_mean = (pivot + offset).reshape(x.shape[0], groups, -1)
    group_mean = channel_mean.mean(-1, keepdims=True)
    variance = spread.reshape(channel_mean.shape) + jnp.square(channel_mean - group_mean)
    inverse = lax.rsqrt(jnp.maximum(variance.mean(-1, keepdims=True), 0) + eps)
    mean, inverse = (jnp.broadcast_to(v, channel_mean.shape).reshape(offset.shape) for v in (group_mean, inverse))
    return (x - mean) * (inverse * scale.astype(jnp.float32)) + bias.astype(jnp.float32)


def nearest(z: Float[Array, "B f h w C"], frames: int, height: int, width: int) -> Float[Array, "B F H W C"]:
    """Repeats latents up to a feature map's size; in an odd number of frames > 1, the first latent fills one frame."""
    if frames > 1 and frames % 2:
        rest = jnp.repeat(z[:, 1:], (frames - 1) // (z.shape[1] - 1), axis=1)
        z = jnp.concatenate([z[:, :1], rest], axis=1)
    else:
        z = jnp.repeat(z, frames // z.shape[1], axis=1)
    z = jnp.repeat(z, height // z.shape[2], axis=2)
    return jnp.repeat(z, width // z.shape[3], axis=3)


class CausalConv3d(nnx.Module):
    """3x3x3 convolution, zero-padded in space, that sees two earlier frames: carried ones, or copies of the first."""

    def __init__(
        self, features_in: int, features_out: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            features_in,
            features_out,
            (3, 3, 3),
            padding=((0, 0), (1, 1), (1, 1)),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B F H W I"], cache: Float[Array, "B 2 H W I"] | None
    ) -> tuple[Float[Array, "B F H W O"], Float[Array, "B 2 H W I"]]:
        before = jnp.repeat(x[:, :1], 2, axis=1) if cache is None else cache
        x = jnp.concatenate([before, x], axis=1)
        return self.conv(x), x[:, -2:]


class NormSilu(nnx.Module):
    """GroupNorm, in the decoder times and plus a pointwise map of the latents, then SiLU.

    The latents are mapped at their own size and repeated afterwards, which commutes and is cheaper. The backward pass
    keeps only the input and computes the rest again, so no float32 copy of a feature map is stored.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        eps: float,
        latent_channels: int | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.groups, self.eps, self.dtype = groups, eps, dtype
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.modulation = (
            None
            if latent_channels is None
            else nnx.Conv(
                latent_channels,
                2 * channels,
                (1, 1, 1),
                bias_init=lambda key, shape, d: jnp.repeat(jnp.array([1, 0], d), channels),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self, x: Float[Array, "B F H W C"], latents: Float[Array, "B f h w Z"] | None
    ) -> Float[Array, "B F H W C"]:
        gain_and_shift = None
        if self.modulation is not None:
            assert latents is not None
            gain_and_shift = self.modulation(latents)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def apply(x, scale, bias, gain_and_shift):
            x = group_norm(x, scale, bias, groups=self.groups, eps=self.eps)
            if gain_and_shift is not None:
                gain, shift = (
                    nearest(part, *x.shape[1:4]).astype(jnp.float32) for part in jnp.split(gain_and_shift, 2, axis=-1)
                )
                x = x * gain + shift
            return jax.nn.silu(x).astype(self.dtype)

        return apply(x, self.scale[...], self.bias[...], gain_and_shift)


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, plus the input (through a pointwise convolution if the width changes)."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        groups: int,
        eps: float,
        latent_channels: int | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(NormSilu, groups=groups, eps=eps, latent_channels=latent_channels, **common)
        self.norm1 = norm(features_in)
        self.conv1 = CausalConv3d(features_in, features_out, **common)
        self.norm2 = norm(features_out)
        self.conv2 = CausalConv3d(features_out, features_out, **common)
        changes = features_in != features_out
        self.conv_shortcut = nnx.Conv(features_in, features_out, (1, 1, 1), **common) if changes else None

    def __call__(
        self, x: Float[Array, "B F H W I"], latents: Float[Array, "B f h w Z"] | None, cache: Cache | None
    ) -> tuple[Float[Array, "B F H W O"], Cache]:
        cache = cache or {}
        h, cache1 = self.conv1(self.norm1(x, latents), cache.get("conv1"))
        h, cache2 = self.conv2(self.norm2(h, latents), cache.get("conv2"))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h, {"conv1": cache1, "conv2": cache2}


class Downsample(nnx.Module):
    """Halves height and width with a strided convolution, after averaging pairs of frames if `compress_time`."""

    def __init__(self, features: int, *, compress_time: bool, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.compress_time = compress_time
        self.conv = nnx.Conv(
            features,
            features,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B f h w C"]:
        if self.compress_time:
            first = x.shape[1] % 2
            pairs = x[:, first:].reshape(x.shape[0], -1, 2, *x.shape[2:])
            x = jnp.concatenate([x[:, :first], pairs.mean(2)], axis=1)
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, convolves frame by frame, then repeats frames if `compress_time`.

    An odd number of frames keeps its first frame single. Repeating after the convolution gives the same frames for
    half the work.
    """

    def __init__(self, features: int, *, compress_time: bool, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.compress_time = compress_time
        self.conv = nnx.Conv(features, features, (3, 3), padding=1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B f h w C"]) -> Float[Array, "B F H W C"]:
        _, frames, height, width, _ = x.shape
        x = self.conv(nearest(x, frames, 2 * height, 2 * width))
        if self.compress_time:
            first = frames % 2
            x = jnp.concatenate([x[:, :first], jnp.repeat(x[:, first:], 2, axis=1)], axis=1)
        return x


class Stage(nnx.Module):
    """Residual blocks in a row, then at most one change of size (`downsamplers` or `upsamplers`)."""

    def __init__(
        self,
        widths: tuple[int, ...],
        *,
        downsample: bool = False,
        upsample: bool = False,
        compress_time: bool = False,
        groups: int,
        eps: float,
        latent_channels: int | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.resnets = nnx.List(
            ResnetBlock(a, b, groups=groups, eps=eps, latent_channels=latent_channels, **common)
            for a, b in itertools.pairwise(widths)
        )
        resize = {"compress_time": compress_time, **common}
        self.downsamplers = nnx.List([Downsample(widths[-1], **resize)] if downsample else [])
        self.upsamplers = nnx.List([Upsample(widths[-1], **resize)] if upsample else [])

    def __call__(
        self, x: Float[Array, "B F H W I"], latents: Float[Array, "B f h w Z"] | None, cache: Cache | None
    ) -> tuple[Float[Array, "B G K L O"], Cache]:
        cache, carried = cache or {}, {}
        for i, resnet in enumerate(self.resnets):
            x, carried[f"resnet_{i}"] = resnet(x, latents, cache.get(f"resnet_{i}"))
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x, carried
