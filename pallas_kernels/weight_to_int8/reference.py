"""The definition of `weight_to_int8`, in NumPy."""

import dataclasses

import numpy as np

from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.common.reference import in_code_units
from pallas_kernels.rotate_quantize.reference import quantize_int8

SMALLEST_NORMAL = np.float32(2.0**-126)


def weight_to_int8(weight: NVFP4Array) -> Int8Array:
    """INT8 of E2M1(code) * E4M3(block scale), which is exact, row by row; then row scale times tensor scale.

    So the codes do not depend on the tensor scale. The product of scales is one float32 operation, at least 2^-126.
    """
    units = quantize_int8(in_code_units(weight).astype(np.float32), hadamard=weight.hadamard)
    tensor_scale = np.asarray(weight.tensor_scale)
    scale = units.scale * tensor_scale.reshape(tensor_scale.shape + (1,) * (units.scale.ndim - tensor_scale.ndim))
    return dataclasses.replace(units, scale=np.maximum(scale, SMALLEST_NORMAL))
