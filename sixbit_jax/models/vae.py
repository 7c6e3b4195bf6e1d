"""The causal 3D variational autoencoder of CogVideoX: videos to latents and back, in chunks of a few frames.

Source: diffusers `AutoencoderKLCogVideoX`. Group statistics are taken over one chunk of frames (and over one tile, if
tiled), so chunk and tile borders are part of what the model computes, and are those of diffusers.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from sixbit_jax.config import VAEConfig
from sixbit_jax.models.vae_layers import Cache, CausalConv3d, NormSilu, Stage

SAMPLE_CHUNK = 8
"""Frames that the encoder takes at a time; the remainder of the video goes with the first chunk."""
LATENT_CHUNK = 2
"""Latent frames that the decoder takes at a time; the remainder goes with the first chunk."""
_OVERLAP = (1 / 6, 1 / 5)
_FIXED_EPS = 1e-6


class Encoder(nnx.Module):
    """One chunk of frames to the moments of its latents (diffusers `CogVideoXEncoder3D`)."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        widths = config.block_out_channels
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stage = {"groups": config.norm_num_groups, "eps": config.norm_eps, "latent_channels": None, **common}
        self.conv_in = CausalConv3d(config.in_channels, widths[0], **common)
        self.down_blocks = nnx.List(
            Stage(
                (before,) + (width,) * config.layers_per_block,
                downsample=i < len(widths) - 1,
                compress_time=2 ** (i + 1) <= config.temporal_compression_ratio,
                **stage,
            )
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = Stage((widths[-1],) * 3, **stage)
        self.norm_out = NormSilu(widths[-1], **{**stage, "eps": _FIXED_EPS})
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, **common)

    def __call__(self, x: Float[Array, "B F H W C"], cache: Cache | None) -> tuple[Float[Array, "B f h w Z"], Cache]:
        cache, carried = cache or {}, {}
        x, carried["conv_in"] = self.conv_in(x, cache.get("conv_in"))
        for i, block in enumerate(self.down_blocks):
            x, carried[f"down_block_{i}"] = block(x, None, cache.get(f"down_block_{i}"))
        x, carried["mid_block"] = self.mid_block(x, None, cache.get("mid_block"))
        x, carried["conv_out"] = self.conv_out(self.norm_out(x, None), cache.get("conv_out"))
        return x, carried


class Decoder(nnx.Module):
    """One chunk of latents to its frames (diffusers `CogVideoXDecoder3D`)."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stage = {
            "groups": config.norm_num_groups,
            "eps": _FIXED_EPS,
            "latent_channels": config.latent_channels,
            **common,
        }
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], **common)
        self.mid_block = Stage((widths[0],) * 3, **stage)
        self.up_blocks = nnx.List(
            Stage(
                (before,) + (width,) * (config.layers_per_block + 1),
                upsample=i < len(widths) - 1,
                compress_time=2 ** (i + 1) <= config.temporal_compression_ratio,
                **stage,
            )
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.norm_out = NormSilu(widths[-1], **stage)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, **common)

    def __call__(
        self, latents: Float[Array, "B f h w Z"], cache: Cache | None
    ) -> tuple[Float[Array, "B F H W C"], Cache]:
        cache, carried = cache or {}, {}
        x, carried["conv_in"] = self.conv_in(latents, cache.get("conv_in"))
        x, carried["mid_block"] = self.mid_block(x, latents, cache.get("mid_block"))
        for i, block in enumerate(self.up_blocks):
            x, carried[f"up_block_{i}"] = block(x, latents, cache.get(f"up_block_{i}"))
        x, carried["conv_out"] = self.conv_out(self.norm_out(x, latents), cache.get("conv_out"))
        return x, carried


class AutoencoderKLCogVideoX(nnx.Module):
    """The autoencoder. Scaling of latents (`config.scaling_factor`) is the caller's.

    The weights of a fresh module make every norm start as a plain group norm.

    Args:
        config: the published configuration.
        dtype: compute and output dtype. Group statistics are float32 whatever it is.
        param_dtype: dtype of the stored parameters.
        rngs: for random initialisation; under `nnx.eval_shape` nothing is allocated.

    Raises:
        ValueError: if a width of the configuration does not divide into its norm groups, or a chunk of frames would
            not divide by the temporal compression.
    """

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        if odd := [c for c in config.block_out_channels if c % config.norm_num_groups]:
            raise ValueError(f"block_out_channels {odd} must divide by norm_num_groups={config.norm_num_groups}")
        if SAMPLE_CHUNK % config.temporal_compression_ratio:
            raise ValueError(
                f"temporal_compression_ratio={config.temporal_compression_ratio} must divide the {SAMPLE_CHUNK} "
                "frames that are encoded at a time"
            )
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, **common)
        self.decoder = Decoder(config, **common)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nnx.Conv(moments, moments, (1, 1, 1), **common) if config.use_quant_conv else None
        self.post_quant_conv = nnx.Conv(latents, latents, (1, 1, 1), **common) if config.use_post_quant_conv else None

    def encode(self, video: Float[Array, "B F H W C"], *, tiled: bool = False) -> Float[Array, "B f h w Z"]:
        """Moments of the latents of a video with values in [-1, 1].

        Args:
            video: any float dtype. F is a multiple of the temporal compression ratio r, or one more; H and W are
                multiples of the spatial one.
            tiled: encode frames larger than half of `config.sample_height` or `sample_width` in overlapping tiles:
                less memory, slightly different latents.

        Returns:
            Means and log variances concatenated on the last axis, for `mode` and `sample_moments`: f = ceil(F / r),
            Z = 2 * latent_channels, in the compute dtype.

        Raises:
            ValueError: on a number of channels or frames, or a size, that the model cannot take.
        """
        config = self.config
        _, frames, height, width, channels = video.shape
        space, time = config.spatial_compression_ratio, int(config.temporal_compression_ratio)
        if channels != config.in_channels:
            raise ValueError(f"video has {channels} channels on its last axis; the model takes {config.in_channels}")
        if not frames or frames % time not in (0, 1 % time):
            raise ValueError(f"video has {frames} frames; the model takes {time} * k or {time} * k + 1 of them")
        if not height or not width or height % space or width % space:
            raise ValueError(f"frames are {height} x {width}; height and width must be multiples of {space}")

        def chunk(x: Array, cache: Cache | None) -> tuple[Array, Cache]:
            x, cache = self.encoder(x, cache)
            return (x if self.quant_conv is None else self.quant_conv(x)), cache

        def run(x: Array) -> Array:
            return _in_chunks(chunk, x, SAMPLE_CHUNK)

        video = video.astype(self.dtype)
        if not tiled:
            return run(video)
        tile, stride = self._tiles
        return _in_tiles(
            run,
            video,
            tile=(space * tile[0], space * tile[1]),
            stride=(space * stride[0], space * stride[1]),
            tile_out=tile,
            stride_out=stride,
        )

    def decode(self, latents: Float[Array, "B f h w Z"], *, tiled: bool = False) -> Float[Array, "B F H W C"]:
        """The video of some latents, about [-1, 1], not clipped.

        Args:
            latents: any float dtype, unscaled. f odd gives F = 1 + (f - 1) * r frames for temporal compression r,
                f even gives F = f * r.
            tiled: decode latents larger than half of `config.sample_height` or `sample_width` in overlapping tiles:
                less memory, faint differences near tile borders.

        Returns:
            Frames of `config.spatial_compression_ratio` times the size, in the compute dtype.

        Raises:
            ValueError: on a wrong number of channels, or no frames.
        """
        config = self.config
        _, frames, height, width, channels = latents.shape
        if channels != config.latent_channels:
            raise ValueError(
                f"latents have {channels} channels on their last axis; the model takes {config.latent_channels}"
            )
        if not (frames and height and width):
            raise ValueError(f"latents are empty: {frames} frames of {height} x {width}")

        def chunk(z: Array, cache: Cache | None) -> tuple[Array, Cache]:
            return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), cache)

        def run(z: Array) -> Array:
            return _in_chunks(chunk, z, LATENT_CHUNK)

        latents = latents.astype(self.dtype)
        if not tiled:
            return run(latents)
        tile, stride = self._tiles
        space = config.spatial_compression_ratio
        return _in_tiles(
            run,
            latents,
            tile=tile,
            stride=stride,
            tile_out=(space * tile[0], space * tile[1]),
            stride_out=(space * stride[0], space * stride[1]),
        )

    @property
    def _tiles(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size and stride of tiles in latent positions. diffusers rounds those in pixels apart; here they line up."""
        config = self.config
        height, width = (
            max(n // 2 // config.spatial_compression_ratio, 1) for n in (config.sample_height, config.sample_width)
        )
        down, across = (max(int(n * (1 - f)), 1) for n, f in zip((height, width), _OVERLAP, strict=True))
        return (height, width), (down, across)


def split_moments(moments: Float[Array, "*dims Z"]) -> tuple[Float[Array, "*dims C"], Float[Array, "*dims C"]]:
    """Mean and log variance of the diagonal Gaussian; the latter clamped to [-30, 20]. Dtype is kept."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30, 20)


def mode(moments: Float[Array, "*dims Z"]) -> Float[Array, "*dims C"]:
    """The most likely latents: the means."""
    return split_moments(moments)[0]


def sample_moments(moments: Float[Array, "*dims Z"], key: PRNGKeyArray | Array) -> Float[Array, "*dims C"]:
    """Latents drawn from the diagonal Gaussian; computed in float32.

    Args:
        moments: from `AutoencoderKLCogVideoX.encode`.
        key: of the draw.

    Returns:
        In the dtype of `moments`, with half of its channels, not scaled.
    """
    mean, log_variance = split_moments(moments.astype(jnp.float32))
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return (mean + jnp.exp(log_variance / 2) * noise).astype(moments.dtype)


def _in_chunks(apply: Callable[[Array, Cache | None], tuple[Array, Cache]], x: Array, size: int) -> Array:
    """Runs `apply` along axis 1, `size` frames at a time; the remainder joins the first chunk, which has no cache.

    Two copies of the model are compiled, one for the first chunk and one scanned over the others, however many.
    """
    batch, frames = x.shape[:2]
    first = min(frames, size + frames % size)
    head, cache = apply(x[:, :first], None)
    if first == frames:
        return head
    rest = jnp.moveaxis(x[:, first:].reshape(batch, -1, size, *x.shape[2:]), 1, 0)
    _, tail = lax.scan(lambda carried, chunk: apply(chunk, carried)[::-1], cache, rest)
    tail = jnp.moveaxis(tail, 0, 1).reshape(batch, -1, *tail.shape[3:])
    return jnp.concatenate([head, tail], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """The tiles of one axis that have the same length."""

    starts: tuple[int, ...]
    length: int


def _spans(size: int, tile: int, stride: int) -> list[_Span]:
    starts = range(0, size, stride)
    return [
        _Span(starts=tuple(group), length=length)
        for length, group in itertools.groupby(starts, lambda start: min(tile, size - start))
    ]


def _in_tiles(
    apply: Callable[[Array], Array],
    x: Array,
    *,
    tile: tuple[int, int],
    stride: tuple[int, int],
    tile_out: tuple[int, int],
    stride_out: tuple[int, int],
) -> Array:
    """Runs `apply` on overlapping tiles of axes 2 and 3, one after the other, and blends what overlaps linearly.

    Tiles at the far borders are what is left of the frame, and tiles of one size share a compiled loop. Each tile is
    blended with the blended tile above, then with the one to its left, as diffusers does.
    """
    _, _, height, width, _ = x.shape
    if height <= tile[0] and width <= tile[1]:
        return apply(x)
    done = {}
    for rows, columns in itertools.product(_spans(height, tile[0], stride[0]), _spans(width, tile[1], stride[1])):
        corners = list(itertools.product(rows.starts, columns.starts))

        def one(corner: Array, rows: _Span = rows, columns: _Span = columns) -> Array:
            part = lax.dynamic_slice_in_dim(x, corner[0], rows.length, axis=2)
            return apply(lax.dynamic_slice_in_dim(part, corner[1], columns.length, axis=3))

        done |= zip(corners, lax.map(one, jnp.array(corners, jnp.int32)), strict=True)
    blended, strips = {}, []
    for i in range(0, height, stride[0]):
        strip = []
        for j in range(0, width, stride[1]):
            now = done[i, j]
            if i:
                now = _blend(blended[i - stride[0], j], now, tile_out[0] - stride_out[0], axis=2)
            if j:
                now = _blend(blended[i, j - stride[1]], now, tile_out[1] - stride_out[1], axis=3)
            blended[i, j] = now
            strip.append(now[:, :, : stride_out[0], : stride_out[1]])
        strips.append(jnp.concatenate(strip, axis=3))
    return jnp.concatenate(strips, axis=2)


def _blend(before: Array, after: Array, extent: int, *, axis: int) -> Array:
    """Fades from the last `extent` entries of `before` into the first ones of `after`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if not extent:
        return after
    shape = [1] * after.ndim
    shape[axis] = extent
    share = (jnp.arange(extent, dtype=jnp.float32) / extent).reshape(shape)
    old = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis).astype(jnp.float32)
    new = lax.slice_in_dim(after, 0, extent, axis=axis).astype(jnp.float32)
    mixed = (old * (1 - share) + new * share).astype(after.dtype)
    return jnp.concatenate([mixed, lax.slice_in_dim(after, extent, None, axis=axis)], axis=axis)
