"""Comparing quantised arrays: byte for byte, and with room for values that were computed in another order."""

import dataclasses

import numpy as np

from pallas_kernels.common import reference as codecs
from pallas_kernels.common.formats import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MAX_FOUR_OVER_SIX,
    INT8_MAX,
    MIN_SCALE,
    Int8Array,
    NVFP4Array,
)

F32 = np.float32


def differences(found, wanted):
    """Names of the fields in which two arrays differ by a byte, a dtype or a shape. One NaN is as good as another."""
    names = []
    for field in dataclasses.fields(wanted):
        a, b = (np.asarray(getattr(array, field.name)) for array in (found, wanted))
        if a.dtype != b.dtype or a.shape != b.shape or _bytes(a) != _bytes(b):
            names.append(field.name)
    return names


def share_of_other_codes(found, wanted) -> float:
    """Share of codes (bytes, if they are packed) in which two arrays differ. One NaN is as good as another."""
    a, b = (np.asarray(array.codes) for array in (found, wanted))
    return np.mean((a != b) & ~((a != a) & (b != b)))


def _bytes(values):
    if not (np.issubdtype(values.dtype, np.floating) or values.dtype.kind == "V"):
        return values.tobytes()
    return np.where(np.isnan(values), values.dtype.type(np.nan), values).astype(values.dtype).tobytes()


def unexplained(
    found: Int8Array | NVFP4Array, rotated: np.ndarray, bound: np.ndarray, *, four_over_six: bool = False
) -> list[str]:
    """What of a quantised array, one scale a row, does not follow from any values within `bound` of `rotated`.

    Args:
        found: the array.
        rotated: [..., K], finite, as exact as they are known.
        bound: of the same shape; every bit of the definition must hold for some values that are this close.
        four_over_six: whether a block may take either scale. Which one it takes is not checked.

    Returns:
        descriptions of what is wrong; empty if everything is explained.
    """
    rotated, bound = np.asarray(rotated, np.float64), np.broadcast_to(np.asarray(bound, np.float64), rotated.shape)
    low, high = np.maximum(np.abs(rotated) - bound, 0), np.abs(rotated) + bound
    room = 1 + 4 * 2.0**-24  # products that the definition rounds
    wrong = []

    def check(name, value, least, largest):
        bad = ~((value >= least) & (value <= largest))
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            wrong.append(
                f"{name}: {bad.sum()} of {bad.size}, first at {at}: {value[at]} not in {least[at], largest[at]}"
            )

    if isinstance(found, Int8Array):
        scale = np.asarray(found.scale, np.float64)
        least, most = (np.maximum(end, MIN_SCALE * INT8_MAX) for end in (low.max(-1), high.max(-1)))
        check("scale", scale * INT8_MAX, least / room, most * room)
        codes, scale = np.asarray(found.codes, np.float64), scale[..., None]
        check(
            "codes", np.abs(codes - rotated / scale), np.zeros_like(bound), 0.5 + bound / scale + INT8_MAX * (room - 1)
        )
        return wrong

    tensor_scale = np.asarray(found.tensor_scale, np.float64)
    largest = E2M1_MAX * (E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX)
    least, most = (np.maximum(end, MIN_SCALE * largest) for end in (low.max(-1), high.max(-1)))
    check("tensor scale", tensor_scale * largest, least / room, most * room)
    low, high = (
        (values / tensor_scale[..., None] * factor).reshape(*rotated.shape[:-1], -1, 16)
        for values, factor in ((low, 1 / room), (high, room))
    )
    scales = np.asarray(found.scales)
    choices = (6, 4) if four_over_six else (6,)
    fits = [
        (scales >= codecs.encode_e4m3_scale(low.max(-1) / divisor / room))
        & (scales <= codecs.encode_e4m3_scale(high.max(-1) / divisor * room))
        for divisor in choices
    ]
    check("scales", np.any(fits, 0).astype(int), np.ones(scales.shape), np.ones(scales.shape))
    decoded = codecs.decode_e4m3(scales)[..., None]
    codes = codecs.unpack(np.asarray(found.codes)).reshape(low.shape)
    ends = [codecs.nearest(values / decoded, codecs.E2M1_TABLE) for values in (low, high)]
    check("codes", codes & 7, *ends)
    signed, bound = rotated.reshape(low.shape), bound.reshape(low.shape)
    check("signs", np.where(codes & 8, -signed, signed), -bound, np.full(low.shape, np.inf))
    return wrong
