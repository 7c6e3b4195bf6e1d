"""What a skipped block reuses, in one operation each: storing a block's delta, and adding it."""

from jaxtyping import Array, Float

from pallas_kernels.common.choice import Implementation, choose
from pallas_kernels.common.formats import Int8Array, NVFP4Array
from pallas_kernels.delta_cache import pallas_triton, xla
from pallas_kernels.delta_cache.types import DeltaSums

STORE = {
    "pallas_triton": Implementation(run=pallas_triton.store_delta, refusal=pallas_triton.refusal),
    "xla": xla.store_delta,
}
APPLY = {
    "pallas_triton": Implementation(run=pallas_triton.apply_delta, refusal=pallas_triton.refusal),
    "xla": xla.apply_delta,
}


def store_delta(
    before: Float[Array, "..."],
    after: Float[Array, "..."],
    stored: Float[Array, "..."] | Int8Array | NVFP4Array,
    *,
    compare: bool,
    implementation: str | None = None,
) -> tuple[Float[Array, "..."] | Int8Array | NVFP4Array, DeltaSums]:
    """The delta of a block, after - before, in the format of the stored one, and how large and how new it is.

    The delta is rounded to the dtype of the stream; rows are quantised one by one and not rotated.

    Args:
        before, after: the residual stream in front of and behind a block, [batch, tokens, dim].
        stored: the delta that this one replaces: in 16 bits an array, else an Int8Array or NVFP4Array of such rows.
        compare: whether the two deltas are compared; otherwise only the format of `stored` is looked at.
        implementation: a name in `STORE`, or None for the best one here.

    Returns:
        (what replaces `stored`, sums of magnitudes over the rows).

    Raises:
        ValueError: if shapes or dtypes differ; the message has them.
        NotImplementedError: if the named implementation can't do this call here.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(
            f"before and after must be alike, found {before.dtype}{before.shape} and {after.dtype}{after.shape}"
        )
    _check(before, stored)
    run = choose("store_delta", STORE, implementation, before, after, stored, compare=compare)
    return run(before, after, stored, compare=compare)


def apply_delta(
    x: Float[Array, "..."],
    stored: Float[Array, "..."] | Int8Array | NVFP4Array,
    *,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """x plus a stored delta, in float32, rounded once to x's dtype.

    Args:
        x: the residual stream in front of a skipped block, [batch, tokens, dim].
        stored: what `store_delta` gave.
        implementation: a name in `APPLY`, or None for the best one here.

    Returns:
        The residual stream behind the block, as x.

    Raises:
        ValueError: if the shapes differ; the message has them.
        NotImplementedError: if the named implementation can't do this call here.
    """
    _check(x, stored)
    return choose("apply_delta", APPLY, implementation, x, stored)(x, stored)


def _check(x: Float[Array, "..."], stored: Float[Array, "..."] | Int8Array | NVFP4Array) -> None:
    if x.ndim != 3 or tuple(stored.shape) != x.shape or not x.size:
        raise ValueError(f"a stream [batch, tokens, dim] of {x.shape} and a stored delta of {tuple(stored.shape)}")
