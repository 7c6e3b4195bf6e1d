"""`T5EncoderModel` of transformers, or the encoder half of a whole T5 -> `sixbit_jax.models.t5.T5EncoderModel`."""

from convert.rules import Rule

_BLOCK = r"encoder\.block\.(?P<i>\d+)\.layer\."


def _linear(source: str, target: str, part: tuple[int, int] | None = None) -> Rule:
    return Rule(
        source=_BLOCK + source + r"\.weight", target=f"blocks.{target}.kernel", layout="linear", index="i", part=part
    )


RULES: tuple[Rule, ...] = (
    Rule(source=r"shared\.weight", target="shared.embedding"),
    # Tied copies of shared.weight.
    Rule(source=r"(encoder|decoder)\.embed_tokens\.weight", target=""),
    Rule(
        source=r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        target="relative_attention_bias.embedding",
    ),
    _linear(r"0\.SelfAttention\.q", "attn_in", (0, 3)),
    _linear(r"0\.SelfAttention\.k", "attn_in", (1, 3)),
    _linear(r"0\.SelfAttention\.v", "attn_in", (2, 3)),
    _linear(r"0\.SelfAttention\.o", "attn_out"),
    Rule(source=_BLOCK + r"0\.layer_norm\.weight", target="blocks.attn_norm.scale", index="i"),
    _linear(r"1\.DenseReluDense\.wi_0", "ff_in", (0, 2)),
    _linear(r"1\.DenseReluDense\.wi_1", "ff_in", (1, 2)),
    _linear(r"1\.DenseReluDense\.wo", "ff_out"),
    Rule(source=_BLOCK + r"1\.layer_norm\.weight", target="blocks.ff_norm.scale", index="i"),
    Rule(source=r"encoder\.final_layer_norm\.weight", target="final_layer_norm.scale"),
    # The half of a whole T5 that a text encoder has no use for.
    Rule(source=r"decoder\.(block\..*|final_layer_norm\.weight)", target=""),
    Rule(source=r"lm_head\.weight", target=""),
)
"""Of `T5EncoderModel`, or the encoder half of a whole T5."""
