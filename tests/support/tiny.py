"""The smallest rotary transformer that tests of the model and of the sampler share."""

from sixbit_jax.config import TransformerConfig

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    time_embed_dim=16,
    text_embed_dim=12,
    in_channels=4,
    out_channels=4,
    sample_width=4,
    sample_height=4,
    sample_frames=9,
    use_rotary_positional_embeddings=True,
)
