"""The CogVideoX video diffusion transformer (`CogVideoXTransformer3DModel` of diffusers 0.42) in Flax NNX.

Text and video tokens travel as one sequence [batch, text + video, width], text first. Blocks are stacked on a leading
parameter axis and scanned. A forward pass is `embed` -> `blocks` -> `project`; a block's four linears are its sites:
`attn_in` (query, key and value in one product), `attn_out`, `ff_in`, `ff_out`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.attention import packed_attention
from pallas_kernels.norm_rotary import logit_bound, norm_rotary
from sixbit_jax.config import TransformerConfig
from sixbit_jax.models import positions
from sixbit_jax.models.layers import LayerNorm, stack
from sixbit_jax.models.linears import Linears, Modulation, PlainLinears

PLAIN = PlainLinears()


@struct.dataclass(kw_only=True)
class BlockContext:
    """What every block of one forward pass reads beside the residual stream.

    Attributes:
        temb: time embedding, [batch, time_embed_dim].
        rotary: (cos, sin), each float32 [tokens, head], identity on the text rows; None with sincos positions.
        text_length: number of text tokens at the front of the sequence.
    """

    temb: Float[Array, "batch time_embed"]
    rotary: tuple[Float32[Array, "tokens head"], Float32[Array, "tokens head"]] | None
    text_length: int = struct.field(pytree_node=False)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, linear over timestep sinusoids (`TimestepEmbedding` of diffusers)."""

    def __init__(self, in_dim: int, dim: int, **kw: Any):
        self.linear_1 = nnx.Linear(in_dim, dim, **kw)
        self.linear_2 = nnx.Linear(dim, dim, **kw)

    def __call__(self, x: Float[Array, "batch in"]) -> Float[Array, "batch out"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ModulatedNorm(nnx.Module):
    """Adaptive layer norm with separate shift, scale and gate for text and video rows (`CogVideoXLayerNormZero`)."""

    def __init__(self, conditioning: int, dim: int, eps: float, **kw: Any):
        self.linear = nnx.Linear(conditioning, 6 * dim, **kw)
        self.norm = LayerNorm(dim, epsilon=eps, **kw)

    def modulation(self, context: BlockContext) -> Modulation:
        """Shift, scale and gate of this forward pass."""
        parts = jnp.split(self.linear(nnx.silu(context.temb)), 6, axis=-1)
        shift, scale, gate = (jnp.stack([parts[i + 3], parts[i]], axis=1) for i in range(3))
        return Modulation(shift=shift, scale=scale, gate=gate, text_length=context.text_length)


class CogVideoXBlock(nnx.Module):
    """Joint attention and feed-forward over text and video tokens (`CogVideoXBlock` of diffusers)."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        d, t = config.inner_dim, config.time_embed_dim
        self.heads = config.num_attention_heads
        self.norm1 = ModulatedNorm(t, d, config.norm_eps, **kw)
        self.attn_in = nnx.Linear(d, 3 * d, use_bias=config.attention_bias, **kw)
        self.norm_q = LayerNorm(config.attention_head_dim, epsilon=1e-6, **kw)
        self.norm_k = LayerNorm(config.attention_head_dim, epsilon=1e-6, **kw)
        self.attn_out = nnx.Linear(d, d, **kw)
        self.norm2 = ModulatedNorm(t, d, config.norm_eps, **kw)
        self.ff_in = nnx.Linear(d, 4 * d, **kw)
        self.ff_out = nnx.Linear(4 * d, d, **kw)

    def attend(self, qkv: Float[Array, "batch tokens three_dim"], context: BlockContext) -> Float[Array, "..."]:
        """Self-attention of projected rows -> [batch, tokens, dim], before the output projection."""
        batch, tokens, _ = qkv.shape
        query, key = ((norm.scale[...], norm.bias[...]) for norm in (self.norm_q, self.norm_k))
        with jax.named_scope("norm_rotary"):
            qkv = norm_rotary(
                qkv.reshape(batch, tokens, 3 * self.heads, -1),
                query=query,
                key=key,
                rotary=context.rotary,
                epsilon=self.norm_q.epsilon,
            )
        with jax.named_scope("attention"):
            return packed_attention(qkv, logit_bound=logit_bound(query, key)).reshape(batch, tokens, -1)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], context: BlockContext, linears: Linears = PLAIN
    ) -> Float[Array, "batch tokens dim"]:
        """The residual stream after this block; `linears` computes its four sites."""
        with jax.named_scope("modulation"):
            first, second = self.norm1.modulation(context), self.norm2.modulation(context)
        qkv = linears.normed("attn_in", self.attn_in, x, self.norm1.norm, first)
        x = linears.gated("attn_out", self.attn_out, self.attend(qkv, context), x, first)
        hidden = linears.normed("ff_in", self.ff_in, x, self.norm2.norm, second, gelu=True)
        return linears.gated("ff_out", self.ff_out, hidden, x, second)


class PatchEmbed(nnx.Module):
    """Projections of latent patches and text features to the residual width (`CogVideoXPatchEmbed`)."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        patch = (config.patch_size_t or 1) * config.patch_size**2
        self.proj = nnx.Linear(
            config.in_channels * patch,
            config.inner_dim,
            use_bias=config.patch_bias or config.patch_size_t is not None,
            **kw,
        )
        self.text_proj = nnx.Linear(config.text_embed_dim, config.inner_dim, **kw)


class FinalNorm(nnx.Module):
    """Adaptive layer norm before the output projection (`AdaLayerNorm` of diffusers, shift first)."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        self.linear = nnx.Linear(config.time_embed_dim, 2 * config.inner_dim, **kw)
        self.norm = LayerNorm(config.inner_dim, epsilon=config.norm_eps, **kw)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], temb: Float[Array, "batch time_embed"]
    ) -> Float[Array, "batch tokens dim"]:
        shift, scale = jnp.split(self.linear(nnx.silu(temb))[:, None, :], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXTransformer3DModel(nnx.Module):
    """Predicts the scheduler's target (CogVideoX: velocity) from noisy latents, text features and a timestep.

    Args:
        config: the published configuration.
        dtype: compute dtype of products and the residual stream. Norm statistics, softmax and rotary positions are
            float32 whatever it is.
        param_dtype: dtype of the stored parameters.
        rngs: for random initialisation; under `nnx.eval_shape` nothing is allocated.
    """

    def __init__(
        self, config: TransformerConfig, *, dtype: Any = jnp.bfloat16, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kw = {"dtype": dtype, "param_dtype": param_dtype}
        d, patch = config.inner_dim, (config.patch_size_t or 1) * config.patch_size**2
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.patch_embed = PatchEmbed(config, **kw, rngs=rngs)
        self.time_embedding = TimestepEmbedding(d, config.time_embed_dim, **kw, rngs=rngs)
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim, **kw, rngs=rngs)
        self.blocks = stack(lambda r: CogVideoXBlock(config, **kw, rngs=r), config.num_layers, rngs)
        self.norm_final = LayerNorm(d, epsilon=config.norm_eps, **kw, rngs=rngs)
        self.norm_out = FinalNorm(config, **kw, rngs=rngs)
        self.proj_out = nnx.Linear(d, config.out_channels * patch, **kw, rngs=rngs)

    def token_grid(self, latents_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Video tokens along time, height and width for latents [batch, frames, channels, height, width].

        Raises:
            ValueError: if a patch does not divide the latents, or the channels are not the model's.
        """
        _, frames, channels, height, width = latents_shape
        p, pt = self.config.patch_size, self.config.patch_size_t or 1
        if frames % pt or height % p or width % p or channels != self.config.in_channels:
            raise ValueError(
                f"latents [batch, frames, channels, height, width] = {tuple(latents_shape)} do not fit the model: "
                f"frames must divide by {pt}, height and width by {p}, channels be {self.config.in_channels}"
            )
        return frames // pt, height // p, width // p

    def embed(
        self,
        hidden_states: Float[Array, "batch frames channels height width"],
        encoder_hidden_states: Float[Array, "batch text text_dim"],
        timestep: Int[Array, " batch"],
        ofs: Float[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens dim"], BlockContext]:
        """What goes into the first block.

        Args:
            hidden_states: as in a call, like all that follow.
            encoder_hidden_states: text features.
            timestep: of each sample.
            ofs: the offset condition, for models that have one.

        Returns:
            The residual stream, text rows first, and what the blocks read beside it.

        Raises:
            ValueError: if the latents do not fit the patches, or `ofs` does not fit the model.
        """
        config = self.config
        if (ofs is None) != (config.ofs_embed_dim is None):
            raise ValueError(f"ofs must be given exactly for models with ofs_embed_dim; here {config.ofs_embed_dim=}")
        f, h, w = grid = self.token_grid(hidden_states.shape)
        sinusoids = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        temb = positions.timestep_embedding(timestep, config.inner_dim, **sinusoids)
        temb = self.time_embedding(temb.astype(self.dtype))
        if ofs is not None and config.ofs_embed_dim is not None:
            offset = positions.timestep_embedding(ofs, config.ofs_embed_dim, **sinusoids)
            temb = temb + self.ofs_embedding(offset.astype(self.dtype))

        batch, _, channels, _, _ = hidden_states.shape
        p, pt = config.patch_size, config.patch_size_t or 1
        patches = hidden_states.astype(self.dtype).reshape(batch, f, pt, channels, h, p, w, p)
        patches = patches.transpose(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, f * h * w, channels * pt * p * p)
        video = self.patch_embed.proj(patches)
        rotary = None
        text_length = encoder_hidden_states.shape[1]
        if config.use_rotary_positional_embeddings:
            rotary = positions.prepend_identity(positions.rotary_3d(config, grid), text_length)
        else:
            video = video + positions.sincos_3d(config, grid).astype(self.dtype)
        text = self.patch_embed.text_proj(encoder_hidden_states.astype(self.dtype))
        context = BlockContext(temb=temb, rotary=rotary, text_length=text_length)
        return jnp.concatenate([text, video], axis=1), context

    def project(
        self, x: Float[Array, "batch tokens dim"], context: BlockContext, latents_shape: tuple[int, ...]
    ) -> Float[Array, "batch frames channels height width"]:
        """The prediction, from the residual stream behind the last block.

        Args:
            x: the stream.
            context: from `embed`.
            latents_shape: [batch, frames, channels, height, width].

        Returns:
            The prediction of a call, in the layout of the latents and the compute dtype.
        """
        f, h, w = self.token_grid(latents_shape)
        p, pt = self.config.patch_size, self.config.patch_size_t or 1
        video = self.norm_out(self.norm_final(x[:, context.text_length :]), context.temb)
        patches = self.proj_out(video).reshape(-1, f, h, w, self.config.out_channels, pt, p, p)
        return patches.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(-1, f * pt, self.config.out_channels, h * p, w * p)

    def __call__(
        self,
        hidden_states: Float[Array, "batch frames channels height width"],
        encoder_hidden_states: Float[Array, "batch text text_dim"],
        timestep: Int[Array, " batch"],
        ofs: Float[Array, " batch"] | None = None,
    ) -> Float[Array, "batch frames channels height width"]:
        """One forward pass.

        Args:
            hidden_states: noisy latents; `frames` divides by patch_size_t, height and width by patch_size.
            encoder_hidden_states: text features of the T5 encoder.
            timestep: training timestep of each sample.
            ofs: the offset condition of CogVideoX 1.5 image-to-video models; None for all others.

        Returns:
            The prediction, in the compute dtype.

        Raises:
            ValueError: if the latents do not fit the patches, or `ofs` does not fit the model.
        """
        x, context = self.embed(hidden_states, encoder_hidden_states, timestep, ofs)
        graph, blocks = nnx.split(self.blocks)

        def body(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, params)(x, context), None

        x, _ = jax.lax.scan(body, x, blocks)
        return self.project(x, context, hidden_states.shape)
