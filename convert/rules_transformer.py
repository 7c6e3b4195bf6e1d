"""`CogVideoXTransformer3DModel` of diffusers -> `sixbit_jax.models.cogvideox.CogVideoXTransformer3DModel`."""

from convert.rules import Rule, Shape
from sixbit_jax.config import TransformerConfig

_BLOCK = r"transformer_blocks\.(?P<i>\d+)\."


def _linear(source: str, target: str, **kwargs) -> tuple[Rule, Rule]:
    return (
        Rule(source=source + r"\.weight", target=target + ".kernel", layout="linear", **kwargs),
        Rule(source=source + r"\.bias", target=target + ".bias", **kwargs),
    )


def _norm(source: str, target: str, **kwargs) -> tuple[Rule, Rule]:
    return (
        Rule(source=source + r"\.weight", target=target + ".scale", **kwargs),
        Rule(source=source + r"\.bias", target=target + ".bias", **kwargs),
    )


RULES: tuple[Rule, ...] = (
    # A table of sinusoids, which we compute for the size at hand.
    Rule(source=r"patch_embed\.pos_embedding", target=""),
    Rule(source=r"patch_embed\.proj\.weight", target="patch_embed.proj.kernel", layout="patch"),
    Rule(source=r"patch_embed\.proj\.bias", target="patch_embed.proj.bias"),
    *_linear(r"patch_embed\.text_proj", "patch_embed.text_proj"),
    *_linear(
        r"(?P<embedding>time_embedding|ofs_embedding)\.(?P<linear>linear_1|linear_2)",
        r"\g<embedding>.\g<linear>",
    ),
    *_linear(_BLOCK + r"(?P<norm>norm1|norm2)\.linear", r"blocks.\g<norm>.linear", index="i"),
    *_norm(_BLOCK + r"(?P<norm>norm1|norm2)\.norm", r"blocks.\g<norm>.norm", index="i"),
    *_linear(_BLOCK + r"attn1\.to_q", "blocks.attn_in", index="i", part=(0, 3)),
    *_linear(_BLOCK + r"attn1\.to_k", "blocks.attn_in", index="i", part=(1, 3)),
    *_linear(_BLOCK + r"attn1\.to_v", "blocks.attn_in", index="i", part=(2, 3)),
    *_norm(_BLOCK + r"attn1\.(?P<norm>norm_q|norm_k)", r"blocks.\g<norm>", index="i"),
    *_linear(_BLOCK + r"attn1\.to_out\.0", "blocks.attn_out", index="i"),
    *_linear(_BLOCK + r"ff\.net\.0\.proj", "blocks.ff_in", index="i"),
    *_linear(_BLOCK + r"ff\.net\.2", "blocks.ff_out", index="i"),
    *_norm(r"norm_final", "norm_final"),
    *_linear(r"norm_out\.linear", "norm_out.linear"),
    *_norm(r"norm_out\.norm", "norm_out.norm"),
    *_linear(r"proj_out", "proj_out"),
)
"""Of `CogVideoXTransformer3DModel`."""


def published_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Shapes that our layout does not determine: spatial patches are published as a 2D convolution."""
    if config.patch_size_t is not None:
        return {}
    return {"patch_embed.proj.weight": (config.inner_dim, config.in_channels, config.patch_size, config.patch_size)}
