"""Counts the bits that a run spent, from its trace: the mean activation width, weighted by multiply-adds (5)."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from sixbit_jax.config import TransformerConfig
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES

ROUTE_BITS = {"skipped": 0, "nvfp4": 4, "int8": 8, "16bit": 16}
"""Activation bits of each route as the trace records them; a block that is skipped takes none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run, or one video of it, spent.

    Attributes:
        mean_bits: mean activation width over steps, blocks and sites, weighted by multiply-adds; a skipped block counts
            as 0.
        mean_bits_computed: the same without skipped blocks; NaN if all are skipped.
        skip_share: share of the blocks, over all steps, that were skipped.
        route_shares: name in `ROUTE_BITS` -> share of the multiply-adds; they sum to 1.
        videos: the same for each group that was decided on together: for each video, or, with joint decisions, for the
            whole batch. Empty in the summary of one.
    """

    mean_bits: float
    mean_bits_computed: float
    skip_share: float
    route_shares: Mapping[str, float]
    videos: tuple["Summary", ...] = ()


def site_weights(config: TransformerConfig) -> dict[str, float]:
    """Site -> its share of the multiply-adds of a CogVideoX block's linears; 3 : 1 : 4 : 4 of 12, at any width."""
    width = config.inner_dim
    products = {"attn_in": 3 * width, "attn_out": width, "ff_in": 4 * width, "ff_out": 4 * width}
    total = sum(products.values())
    return {site: products[site] / total for site in SITES}


def summary(bits: np.ndarray | jax.Array, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> Summary:
    """Counts the bits of a trace.

    Args:
        bits: uint8 [steps, blocks, groups, sites], of a whole run.
        weights: multiply-adds of each site, in the trace's order and any unit; `site_weights` has CogVideoX's.

    Raises:
        ArgumentError: if the trace is not of a run of that many sites, a weight is negative or all are zero, or there
            is a width that no route has.
    """
    bits = np.asarray(bits)
    weights = np.asarray(list(weights.values()) if isinstance(weights, Mapping) else weights, np.float64)
    if weights.ndim != 1 or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ArgumentError(f"weights must be one number a site, none negative and not all 0, found {weights.tolist()}")
    if bits.ndim != 4 or bits.shape[3] != len(weights) or not bits.size:
        raise ArgumentError(
            f"bits of a run's trace must be [steps, blocks, groups, {len(weights)} sites], found {list(bits.shape)}"
        )
    if unknown := set(np.unique(bits).tolist()) - set(ROUTE_BITS.values()):
        raise ArgumentError(f"a trace holds widths of {sorted(unknown)} bits, which no route has")
    weights = weights / weights.sum()
    videos = [_count(bits[:, :, group], weights) for group in range(bits.shape[2])]
    return dataclasses.replace(_count(bits.swapaxes(1, 2), weights), videos=tuple(videos))


def _count(bits: np.ndarray, weights: np.ndarray) -> Summary:
    """Of bits [..., blocks, sites]."""
    spent = bits.astype(np.float64) @ weights
    skipped = (bits == 0).all(-1)
    return Summary(
        mean_bits=float(spent.mean()),
        mean_bits_computed=float(spent[~skipped].mean()) if not skipped.all() else float("nan"),
        skip_share=float(skipped.mean()),
        route_shares={name: float(((bits == width) @ weights).mean()) for name, width in ROUTE_BITS.items()},
    )
