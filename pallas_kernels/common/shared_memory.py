"""Shared memory of Mosaic GPU kernels."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike


def swizzled(shape: tuple[int, ...], dtype: DTypeLike):
    """Shared memory as TMA writes and wgmma reads it, with the widest swizzle that a row allows."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * itemsize * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
