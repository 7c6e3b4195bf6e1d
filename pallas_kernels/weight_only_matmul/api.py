"""A linear layer on a 16-bit activation that reads its weight in 4.5 bits a value."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.weight_only_matmul import pallas_triton, xla

IMPLEMENTATIONS = {
    "pallas_triton": Implementation(run=pallas_triton.weight_only_matmul, refusal=pallas_triton.refusal),
    "xla": xla.weight_only_matmul,
}
DTYPES = ("bfloat16", "float16", "float32")


def weight_only_matmul(
    x: Float[Array, "..."],
    weight: NVFP4Array,
    *,
    bias: Float[Array, "..."] | None = None,
    activation: str | None = None,
    gate: Float[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
    text_length: int = 0,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """residual + gate * activation(x @ W.T + bias), W being what `weight` stores, its rotation undone.

    Of many rows, both factors are rounded to bfloat16 (an x of another type as well: this is the 16-bit route), and
    the weight is cast once a call. Few rows (16, see `pallas_triton`) multiply the packed weight. Sums are float32, and
    so is what follows up to the one rounding to `out_dtype`.

    Args:
        x: bfloat16, float16 or float32 [..., K], not rotated.
        weight: [N, K], rotated or not.
        bias, activation, gate, residual, text_length: the epilogue, as in `scaled_matmul`.
        out_dtype: bfloat16, float16 or float32; None for that of x.
        implementation: "xla", "pallas_triton", or None for the best one here.

    Returns:
        [..., N].

    Raises:
        ValueError: if x, weight or parts of the epilogue do not fit together; the message has the sizes.
        NotImplementedError: if an implementation is named that the device or the call rules out.
    """
    weight.validate()
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    for name, dtype in (("x", x.dtype), ("out_dtype", out_dtype)):
        if dtype.name not in DTYPES:
            raise ValueError(f"{name} must be of {', '.join(DTYPES)}, found {dtype.name}")
    if len(weight.shape) != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x must be [..., K] and weight [N, K], found {x.shape} and {weight.shape}")
    if 0 in (*x.shape, *weight.shape):
        raise ValueError(f"x and weight must not be empty, found {x.shape} and {weight.shape}")
    epilogue = Epilogue(bias=bias, activation=activation, gate=gate, residual=residual, text_length=text_length)
    epilogue.validate((*x.shape[:-1], weight.shape[0]))
    run = choose(
        "weight_only_matmul", IMPLEMENTATIONS, implementation, x, weight, epilogue=epilogue, out_dtype=out_dtype
    )
    return run(x, weight, epilogue=epilogue, out_dtype=out_dtype)
