"""`nvfp4_matmul` on the tensor cores that take NVFP4 as it is stored, through `jax.nn.scaled_matmul`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels.common import device
from pallas_kernels.common.epilogue import Epilogue, apply
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.nvfp4_cast.xla import scale_a_row

BLACKWELL = (10, 0)


def refusal(a: NVFP4Array, b: NVFP4Array, *, epilogue: Epilogue, out_dtype: DTypeLike) -> str | None:
    """Why `native` can't run on the default device, if so. Elsewhere XLA would decode, silently and slowly."""
    return device.refusal(at_least=BLACKWELL)


@functools.partial(jax.jit, static_argnames="out_dtype")
def native(a: NVFP4Array, b: NVFP4Array, *, epilogue: Epilogue, out_dtype: DTypeLike) -> Float[Array, "*rows n"]:
    """The product of codes and block scales by the device's own instruction; tensor scales and the rest after it."""
    size = a.shape[-1]
    product = jax.nn.scaled_matmul(
        as_e2m1(a.codes).reshape(1, -1, size),
        as_e2m1(b.codes).reshape(1, -1, size),
        as_e4m3(a.scales).reshape(1, -1, a.scales.shape[-1]),
        as_e4m3(b.scales).reshape(1, -1, b.scales.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    y = product.reshape(*a.shape[:-1], b.shape[0]) * scale_a_row(a)[..., None] * scale_a_row(b)
    return apply(epilogue, y).astype(out_dtype)


def as_e2m1(packed: UInt8[Array | np.ndarray, "*rows half"]) -> Float[Array, "*rows k"]:
    """The same bits as float4_e2m1fn [..., K]; JAX, too, counts the low nibble first."""
    codes = jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn)
    return codes.reshape(*packed.shape[:-1], -1)


def as_e4m3(scales: UInt8[Array | np.ndarray, "*rows blocks"]) -> Float[Array, "*rows blocks"]:
    """The same bits as float8_e4m3fn."""
    return jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
