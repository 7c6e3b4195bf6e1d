"""The matmul of two quantised operands, and what follows it in a linear layer, in one operation."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CarriedArray, Int8Array, check_operands
from pallas_kernels.scaled_matmul import pallas_mosaic_gpu, pallas_triton, xla

IMPLEMENTATIONS = {
    "pallas_mosaic_gpu": Implementation(run=pallas_mosaic_gpu.scaled_matmul, refusal=pallas_mosaic_gpu.refusal),
    "pallas_triton": Implementation(
        run=pallas_triton.scaled_matmul, refusal=pallas_triton.refusal, passed_over=pallas_triton.slower
    ),
    "xla": xla.scaled_matmul,
}
OUT_DTYPES = ("bfloat16", "float16", "float32", "int32")


def scaled_matmul(
    a: Int8Array | CarriedArray,
    b: Int8Array | CarriedArray,
    *,
    bias: Float[Array, " n"] | None = None,
    activation: str | None = None,
    gate: Float[Array, "batch 2 n"] | None = None,
    residual: Float[Array, "batch tokens n"] | None = None,
    text_length: int = 0,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*rows n"] | Int32[Array, "*rows n"]:
    """residual + gate * activation(a @ b.T + bias), accumulated in int32 for int8 codes and else in float32.

    The accumulators are converted to float32, multiplied by a's scale and then b's; everything up to the one rounding
    to `out_dtype` is float32. int8 accumulators are exact, so K is at most 133,143 for codes of +-127.

    Args:
        a: activation [..., K], int8 or one of the carriers.
        b: weight [N, K] of the same type of codes, and of the same rotation.
        bias: [N].
        activation: None or "gelu_tanh".
        gate: [batch, 2, N], with a of [batch, tokens, K]: entry 0 for the rows of text, 1 for those of video.
        residual: [batch, tokens, N], with a gate.
        text_length: rows of text at the beginning of each sample.
        out_dtype: bfloat16, float16 or float32; or int32, for int8 codes without an epilogue: the accumulators
            themselves, not scaled.
        implementation: a name in `IMPLEMENTATIONS`, or None for the best one here.

    Returns:
        [..., N]; a NaN scale or code makes its row or column NaN.

    Raises:
        ValueError: if operands or parts of the epilogue do not fit together; the message has the sizes.
        NotImplementedError: if an implementation is named that the device or the call rules out.
    """
    if type(a) is not type(b) or a.codes.dtype != b.codes.dtype:
        raise ValueError(
            f"operands must be of one kind, found {type(a).__name__} of {a.codes.dtype} and {type(b).__name__} of"
            f" {b.codes.dtype}"
        )
    check_operands(a, b)
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype.name not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be one of {', '.join(OUT_DTYPES)}, found {out_dtype.name}")
    epilogue = Epilogue(bias=bias, activation=activation, gate=gate, residual=residual, text_length=text_length)
    epilogue.validate((*a.shape[:-1], b.shape[0]))
    if out_dtype == jnp.int32 and (not isinstance(a, Int8Array) or not epilogue.empty):
        raise ValueError("out_dtype=int32 gives the accumulators of int8 codes, and takes no epilogue")
    run = choose("scaled_matmul", IMPLEMENTATIONS, implementation, a, b, epilogue=epilogue, out_dtype=out_dtype)
    return run(a, b, epilogue=epilogue, out_dtype=out_dtype)
