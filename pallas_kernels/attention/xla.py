"""`attention` as JAX has it: through cuDNN, or as plain XLA operations."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.common import device

Operand = jax.Array | jax.ShapeDtypeStruct


def attention(
    query: Float[Array, "batch tokens heads head"],
    key: Float[Array, "batch tokens heads head"],
    value: Float[Array, "batch tokens heads head"],
) -> Float[Array, "batch tokens heads head"]:
    """See `api.attention`. Logits and softmax are float32."""
    with jax.numpy_dtype_promotion("standard"):  # promotes 16-bit logits to float32 implicitly
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def cudnn_attention(
    query: Float[Array, "batch tokens heads head"],
    key: Float[Array, "batch tokens heads head"],
    value: Float[Array, "batch tokens heads head"],
) -> Float[Array, "batch tokens heads head"]:
    """See `api.attention`."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def cudnn_refusal(query: Operand, key: Operand, value: Operand) -> str | None:
    """Why cuDNN can't do the call on the default device, if so."""
    if query.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {query.dtype}"
    if device.interpreting():
        return "it is not interpreted"
    return device.refusal(at_least=(8, 0))
