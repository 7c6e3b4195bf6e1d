"""diffusers `AutoencoderKLCogVideoX` keys to the parameters of `sixbit_jax.models.vae`."""

from convert.rules import Rule

_CONV = (
    r"(?P<conv>.+\.conv_in\.conv|.+\.conv_out\.conv|.+\.conv[12]\.conv|.+\.conv_shortcut|.+samplers\.0\.conv"
    r"|quant_conv|post_quant_conv)"
)
_ENCODER_NORM = r"(?P<norm>encoder\.(?:.+\.)?norm(?:\d|_out))"
_DECODER_NORM = r"(?P<norm>decoder\.(?:.+\.)?norm(?:\d|_out))"

RULES: tuple[Rule, ...] = (
    Rule(source=_CONV + r"\.weight", target=r"\g<conv>.kernel", layout="conv"),
    Rule(source=_CONV + r"\.bias", target=r"\g<conv>.bias"),
    Rule(source=_ENCODER_NORM + r"\.weight", target=r"\g<norm>.scale"),
    Rule(source=_ENCODER_NORM + r"\.bias", target=r"\g<norm>.bias"),
    Rule(source=_DECODER_NORM + r"\.norm_layer\.weight", target=r"\g<norm>.scale"),
    Rule(source=_DECODER_NORM + r"\.norm_layer\.bias", target=r"\g<norm>.bias"),
    Rule(
        source=_DECODER_NORM + r"\.conv_y\.conv\.weight",
        target=r"\g<norm>.modulation.kernel",
        layout="conv",
        part=(0, 2),
    ),
    Rule(source=_DECODER_NORM + r"\.conv_y\.conv\.bias", target=r"\g<norm>.modulation.bias", part=(0, 2)),
    Rule(
        source=_DECODER_NORM + r"\.conv_b\.conv\.weight",
        target=r"\g<norm>.modulation.kernel",
        layout="conv",
        part=(1, 2),
    ),
    Rule(source=_DECODER_NORM + r"\.conv_b\.conv\.bias", target=r"\g<norm>.modulation.bias", part=(1, 2)),
)
"""Of `AutoencoderKLCogVideoX`."""
