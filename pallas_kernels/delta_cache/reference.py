"""The definition of the delta cache's operations, in NumPy."""

import numpy as np

from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.common.reference import dequantize
from pallas_kernels.delta_cache.types import DeltaSums
from pallas_kernels.rotate_quantize.reference import prepare, quantize_int8, quantize_nvfp4

Stored = np.ndarray | Int8Array | NVFP4Array


def store_delta(before: np.ndarray, after: np.ndarray, stored: Stored, *, compare: bool) -> tuple[Stored, DeltaSums]:
    """See `api.store_delta`. The delta is rounded to the stream's dtype before anything else; sums are float64."""
    delta = (after.astype(np.float32) - before.astype(np.float32)).astype(before.dtype)
    if isinstance(stored, Int8Array):
        entry = quantize_int8(prepare(delta))
    elif isinstance(stored, NVFP4Array):
        entry = quantize_nvfp4(prepare(delta), scale_dims=delta.ndim - 1)
    else:
        entry = delta.astype(stored.dtype)

    def total(values: np.ndarray) -> np.ndarray:
        return np.abs(values.astype(np.float64)).sum(-1)

    old = values(stored).astype(np.float64) if compare else None
    sums = DeltaSums(
        before=total(before),
        delta=total(delta),
        change=None if old is None else total(delta.astype(np.float64) - old),
        stored=None if old is None else total(old),
    )
    return entry, sums


def apply_delta(x: np.ndarray, stored: Stored) -> np.ndarray:
    """See `api.apply_delta`."""
    return (x.astype(np.float32) + values(stored).astype(np.float32)).astype(x.dtype)


def values(stored: Stored) -> np.ndarray:
    """Of a stored delta."""
    return dequantize(stored) if isinstance(stored, Int8Array | NVFP4Array) else stored
