"""Normalise, modulate, rotate and quantise the input of a transformer's linear layers, in one operation."""

from jaxtyping import Array, Float

from pallas_kernels.adaln_quantize import pallas_mosaic_gpu, pallas_triton, xla
from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.formats import CarriedArray, Int8Array, NVFP4Array, hadamard_block
from pallas_kernels.rotate_quantize.api import check_format
from pallas_kernels.rotate_quantize.types import RowStatistics

IMPLEMENTATIONS = {
    "pallas_mosaic_gpu": Implementation(run=pallas_mosaic_gpu.adaln_quantize, refusal=pallas_mosaic_gpu.refusal),
    "pallas_triton": Implementation(run=pallas_triton.adaln_quantize, refusal=pallas_triton.refusal),
    "xla": xla.adaln_quantize,
}


def adaln_quantize(
    x: Float[Array, "..."],
    *,
    norm_scale: Float[Array, "..."],
    norm_bias: Float[Array, "..."],
    shift: Float[Array, "..."],
    scale: Float[Array, "..."],
    text_length: int,
    epsilon: float,
    format: str,
    hadamard: int | None = None,
    four_over_six: bool = False,
    carrier: str | None = None,
    implementation: str | None = None,
) -> tuple[NVFP4Array | Int8Array | CarriedArray, RowStatistics]:
    """Quantises y = layer_norm(x) * (1 + scale) + shift. `reference.py` defines the result.

    y is computed in float32 and rounded once, to x's dtype: what follows is `rotate_quantize` of that.

    Rows are quantised one by one: an NVFP4 tensor scale belongs to one row. A row that holds a NaN or an infinity gets
    NaN scales.

    Args:
        x: [batch, tokens, dim], bfloat16, float16 or float32.
        norm_scale, norm_bias, shift, scale, text_length, epsilon: see `AdaptiveNorm`.
        format: "nvfp4" or "int8".
        hadamard: block of the rotation: 128, 64 or 32, 0 for none, None for the largest that divides dim.
        four_over_six: as in `rotate_quantize`.
        carrier: as in `rotate_quantize`.
        implementation: a name in `IMPLEMENTATIONS`, or None for the best one here.

    Returns:
        (the quantised array [batch, tokens, dim], statistics of the rows of y, before their rotation).

    Raises:
        ValueError: on what `rotate_quantize` refuses, or arguments whose sizes do not fit x.
        NotImplementedError: if the named implementation can't do this call here.
    """
    norm = AdaptiveNorm(
        norm_scale=norm_scale, norm_bias=norm_bias, shift=shift, scale=scale, text_length=text_length, epsilon=epsilon
    )
    norm.validate(x.shape)
    check_format(format, x.shape, x.dtype.name, four_over_six=four_over_six, carrier=carrier)
    options = {
        "format": format,
        "hadamard": hadamard_block(x.shape[-1], hadamard),
        "four_over_six": four_over_six,
        "carrier": carrier,
    }
    return choose("adaln_quantize", IMPLEMENTATIONS, implementation, x, norm, **options)(x, norm, **options)
