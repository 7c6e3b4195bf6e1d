"""The matmul of two NVFP4 operands, and what follows it in a linear layer."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CARRIERS, NVFP4Array, check_operands
from pallas_kernels.nvfp4_cast import cast
from pallas_kernels.nvfp4_matmul import xla
from pallas_kernels.scaled_matmul import scaled_matmul

NATIVE = {"xla": Implementation(run=xla.native, refusal=xla.refusal)}
OUT_DTYPES = ("bfloat16", "float16", "float32")


def nvfp4_matmul(
    a: NVFP4Array,
    b: NVFP4Array,
    *,
    carrier: str = "exact",
    bias: Float[Array, " n"] | None = None,
    activation: str | None = None,
    gate: Float[Array, "batch 2 n"] | None = None,
    residual: Float[Array, "batch tokens n"] | None = None,
    text_length: int = 0,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*rows n"]:
    """residual + gate * activation(a @ b.T + bias), of NVFP4 operands.

    Args:
        a: activation [..., K]. A caller that only multiplies it can have `rotate_quantize` give the carrier at once,
            and pass that to `scaled_matmul`.
        b: weight [N, K] of the same rotation.
        carrier: what the tensor cores multiply:
            "exact": bfloat16, which holds E2M1 * E4M3 exactly.
            "fp8": E4M3, with one more rounding of both operands.
            "native": NVFP4 itself; Blackwell only.
        bias, activation, gate, residual, text_length: the epilogue, as in `scaled_matmul`.
        out_dtype: bfloat16, float16 or float32.
        implementation: of `scaled_matmul`, or "xla" for "native"; None for the best one here.

    Returns:
        [..., N]; a NaN block scale makes its row or column NaN.

    Raises:
        ValueError: on an unknown carrier, or operands or parts of the epilogue that do not fit together.
        NotImplementedError: on a carrier or a named implementation that the device rules out.
    """
    if carrier not in (*CARRIERS, "native"):
        raise ValueError(f"unknown carrier {carrier!r}; carriers are {', '.join(CARRIERS)}, native")
    check_operands(a, b)
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype.name not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be one of {', '.join(OUT_DTYPES)}, found {out_dtype.name}")
    parts = {
        "bias": bias,
        "activation": activation,
        "gate": gate,
        "residual": residual,
        "text_length": text_length,
    }
    if carrier != "native":
        return scaled_matmul(
            cast(a, to=carrier), cast(b, to=carrier), **parts, out_dtype=out_dtype, implementation=implementation
        )
    call = {"epilogue": Epilogue(**parts), "out_dtype": out_dtype}
    call["epilogue"].validate((*a.shape[:-1], b.shape[0]))
    return choose("nvfp4_matmul", NATIVE, implementation, a, b, **call)(a, b, **call)
