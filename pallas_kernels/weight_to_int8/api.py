"""Cast an NVFP4 weight [out, K] to INT8 with one scale per output channel."""

from pallas_kernels.common.choice import choose
from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.weight_to_int8 import xla

IMPLEMENTATIONS = {"xla": xla.weight_to_int8}


def weight_to_int8(weight: NVFP4Array, *, implementation: str | None = None) -> Int8Array:
    """Symmetric INT8 of the dequantised weight; `reference.weight_to_int8` defines every bit of the result.

    Args:
        weight: [..., out, K]; the rotation it went through stays.
        implementation: "xla", or None for the best one here.

    Returns:
        codes [..., out, K] and scale [..., out]; an output channel with a NaN block scale has a NaN scale.

    Raises:
        ValueError: on an unknown implementation, or a weight whose fields do not fit together.
    """
    weight.validate()
    return choose("weight_to_int8", IMPLEMENTATIONS, implementation)(weight)
