"""The T5 v1.1 text encoder (`T5EncoderModel` of transformers) in Flax NNX.

Pre-norm blocks of unscaled attention, with relative position biases that all blocks share, and a GELU-gated
feed-forward; no linear has a bias vector. Blocks are stacked on a leading parameter axis and scanned. A block's four
linears are named as in the video transformer: `attn_in` (query, key, value), `attn_out`, `ff_in` (gate, then value),
`ff_out`.

Sources: T5 (arXiv:1910.10683), GELU gating (arXiv:2002.05202).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Integer

from sixbit_jax.config import T5Config
from sixbit_jax.models.layers import stack


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Integer[np.ndarray, "length length"]:
    """Bucket of every (query, key) pair, int32.

    Half of the buckets are for keys after the query. Within a half, distances below half of it have a bucket each,
    and the rest grow with the logarithm of the distance until `max_distance`, beyond which all share the last.
    Computed in float32 as transformers does, since a boundary distance is a floor of an almost whole number.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    ratio = np.maximum(np.abs(distance), exact).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    coarse = np.minimum(exact + steps.astype(np.int64), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), coarse)
    return (bucket + half * (distance > 0)).astype(np.int32)


def _attention_init(d_kv: int) -> nnx.Initializer:
    """T5's initialisation of fused query, key and value: queries carry the head ** -0.5 that attention leaves out."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        kernel = nnx.initializers.lecun_normal()(key, shape, dtype)
        return kernel.at[:, : shape[1] // 3].multiply(d_kv**-0.5)

    return init


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis in float32, rounded once to `dtype` (`T5LayerNorm`)."""

    def __init__(self, dim: int, *, epsilon: float, dtype: Any, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class T5Block(nnx.Module):
    """Self-attention and gated feed-forward, each on normalised rows and added to the residual stream (`T5Block`)."""

    def __init__(self, config: T5Config, *, dtype: Any, wo_dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        linear = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"epsilon": config.layer_norm_epsilon, "dtype": dtype, "param_dtype": param_dtype}
        d, inner = config.d_model, config.num_heads * config.d_kv
        self.heads, self.dtype = config.num_heads, dtype
        self.attn_norm = RMSNorm(d, **norm)
        self.attn_in = nnx.Linear(d, 3 * inner, dtype=dtype, kernel_init=_attention_init(config.d_kv), **linear)
        self.attn_out = nnx.Linear(inner, d, dtype=dtype, **linear)
        self.ff_norm = RMSNorm(d, **norm)
        self.ff_in = nnx.Linear(d, 2 * config.d_ff, dtype=dtype, **linear)
        self.ff_out = nnx.Linear(config.d_ff, d, dtype=wo_dtype, **linear)

    def attend(
        self, x: Float[Array, "batch length dim"], bias: Float32[Array, "#batch heads length length"]
    ) -> Float[Array, "batch length dim"]:
        """Attention of normalised rows, up to and including the output projection; logits and softmax in float32."""
        batch, length, _ = x.shape
        query, key, value = jnp.split(self.attn_in(x).reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) + bias
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1).astype(self.dtype), value)
        return self.attn_out(mixed.reshape(batch, length, -1))

    def __call__(
        self, x: Float[Array, "batch length dim"], bias: Float32[Array, "#batch heads length length"]
    ) -> Float[Array, "batch length dim"]:
        x = x + self.attend(self.attn_norm(x), bias).astype(x.dtype)
        gate, value = jnp.split(self.ff_in(self.ff_norm(x)), 2, axis=-1)
        return x + self.ff_out(nnx.gelu(gate, approximate=True) * value)


class T5EncoderModel(nnx.Module):
    """Turns token ids into text features.

    Args:
        config: the encoder's fields of the published configuration.
        dtype: compute dtype. Norms, logits and softmax are float32 whatever it is. With float16, whose range the
            feed-forward of large T5s exceeds, `ff_out` and the residual stream are float32 too, as in transformers.
        param_dtype: dtype of the stored parameters.
        rngs: for random initialisation; under `nnx.eval_shape` nothing is allocated.
    """

    def __init__(self, config: T5Config, *, dtype: Any = jnp.bfloat16, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.config, self.dtype = config, dtype
        self.residual_dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        embed = {"param_dtype": param_dtype, "rngs": rngs}
        self.shared = nnx.Embed(config.vocab_size, config.d_model, embedding_init=nnx.initializers.normal(1.0), **embed)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(config.d_model**-0.5),
            **embed,
        )
        kinds = {"dtype": dtype, "wo_dtype": self.residual_dtype, "param_dtype": param_dtype}
        self.blocks = stack(lambda r: T5Block(config, **kinds, rngs=r), config.num_layers, rngs)
        self.final_layer_norm = RMSNorm(
            config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )

    def attention_bias(
        self, length: int, attention_mask: Bool[Array, "batch length"] | Integer[Array, "batch length"] | None = None
    ) -> Float32[Array, "#batch heads length length"]:
        """What every block adds to its logits.

        Args:
            length: number of tokens.
            attention_mask: 0 or False where a token must not be attended to; None attends to all.

        Returns:
            The relative position biases, and the lowest float32 on masked keys.
        """
        config = self.config
        buckets = relative_position_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = self.relative_attention_bias.embedding[...][buckets].astype(jnp.float32).transpose(2, 0, 1)[None]
        if attention_mask is None:
            return bias
        return jnp.where(attention_mask.astype(bool)[:, None, None, :], bias, jnp.finfo(jnp.float32).min)

    def __call__(
        self,
        input_ids: Integer[Array, "..."],
        attention_mask: Bool[Array, "..."] | Integer[Array, "..."] | None = None,
    ) -> Float[Array, "batch length d_model"]:
        """Encodes a batch of equally long token sequences.

        Args:
            input_ids: [batch, length]. An id of `vocab_size` or more yields NaN features.
            attention_mask: [batch, length], 0 or False where a token must not be attended to; None attends to all,
                padding included, which is how CogVideoX uses its encoder.

        Returns:
            Text features in the compute dtype.

        Raises:
            ValueError: if `input_ids` is not two-dimensional or the mask is of another shape.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be [batch, length >= 1]; its shape is {input_ids.shape}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {attention_mask.shape} must have the shape of input_ids {input_ids.shape}"
            )
        x = self.shared.embedding.at[input_ids].get(mode="fill", fill_value=jnp.nan).astype(self.residual_dtype)
        bias = self.attention_bias(input_ids.shape[1], attention_mask)
        graph, blocks = nnx.split(self.blocks)

        def body(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, params)(x, bias), None

        x, _ = jax.lax.scan(body, x, blocks)
        return self.final_layer_norm(x)
