"""A picture of what the precision policy did: routes of every step, block and site, and the volatility behind them."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES
from sixbit_jax.precision.accounting import ROUTE_BITS
from sixbit_jax.precision.blocks import PrecisionTrace

COLOURS = {"skipped": "#ffffff", "nvfp4": "#8fd3c1", "int8": "#3b7fb8", "16bit": "#b03a5b"}
"""Of each route; skipped blocks stay blank."""


def save_trace(
    trace: PrecisionTrace, path: str | Path, *, sites: Sequence[str] = SITES, title: str = "", video: int = 0
) -> None:
    """Writes one group of a trace as a PNG of what `draw` draws.

    Args:
        trace: of a whole run, leading axis [steps].
        path: the file; its folder must exist.
        sites, title: as in `draw`.
        video: which group of the trace is drawn.

    Raises:
        ArgumentError: if the trace is not of a whole run of a model with those sites, or has no such video.
    """
    bits, volatility = np.asarray(trace.bits), np.asarray(trace.volatility)
    if bits.ndim != 4 or volatility.shape != bits.shape[:3]:
        raise ArgumentError(
            f"a trace of a run has bits [steps, blocks, groups, sites] and volatility [steps, blocks, groups], found"
            f" {list(bits.shape)} and {list(volatility.shape)}"
        )
    if not 0 <= video < bits.shape[2]:
        raise ArgumentError(f"video={video} is not one of the {bits.shape[2]} groups of the trace")
    draw(bits[:, :, video], volatility[:, :, video], sites=sites, title=title).savefig(path, dpi=120)


def draw(
    bits: np.ndarray | jax.Array,
    volatility: np.ndarray | jax.Array | None = None,
    *,
    sites: Sequence[str] = SITES,
    title: str = "",
) -> Figure:
    """Above, steps by blocks (a row for each site of a block) by route; below, volatility over steps.

    Args:
        bits: [steps, blocks, sites], activation bits of the route taken, 0 for a skipped block.
        volatility: [steps, blocks], NaN where it is not known; None leaves its picture out.
        sites: names of the linears of a block.
        title: written on top.

    Returns:
        A figure that no window shows; notebooks display it.

    Raises:
        ArgumentError: if the arrays are not of one run of a model with those sites.
    """
    bits = np.asarray(bits)
    if bits.ndim != 3 or bits.shape[2] != len(sites) or not bits.size:
        raise ArgumentError(f"bits must be [steps, blocks, {len(sites)} sites], found {list(bits.shape)}")
    steps, blocks, _ = bits.shape
    volatility = np.full((steps, blocks), np.nan) if volatility is None else np.asarray(volatility)
    if volatility.shape != (steps, blocks):
        raise ArgumentError(f"volatility must be [{steps} steps, {blocks} blocks], found {list(volatility.shape)}")
    measured = np.isfinite(volatility).any()
    heights = [max(2.2, 0.06 * blocks * len(sites)), 2.4][: 1 + measured]
    figure = Figure(figsize=(min(14.0, 4 + 0.14 * steps), sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]

    widths = sorted(ROUTE_BITS.values())
    colours = ListedColormap([COLOURS[name] for name in sorted(ROUTE_BITS, key=ROUTE_BITS.__getitem__)])
    axes[0].imshow(
        bits.reshape(steps, -1).T,
        cmap=colours,
        norm=BoundaryNorm([width - 0.5 for width in (*widths, widths[-1] + 1)], colours.N),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, steps - 0.5, blocks - 0.5, -0.5),
    )
    for edge in range(1, blocks):
        axes[0].axhline(edge - 0.5, color="0.6", linewidth=0.4)
    axes[0].set(ylabel="block", title=title)
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(
        handles=[Patch(facecolor=colour, edgecolor="0.5", label=name) for name, colour in COLOURS.items()],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=8,
        title="rows of a block:\n" + "\n".join(sites),
        title_fontsize=8,
    )
    if measured:
        for block, colour in enumerate(colormaps["viridis"](np.linspace(0, 0.95, blocks))):
            # Lines join computed steps across skipped ones, which have no volatility.
            known = np.flatnonzero(np.isfinite(volatility[:, block]))
            label = f"block {block}" if block in (0, blocks - 1) else None
            axes[1].plot(
                known, volatility[known, block], color=colour, linewidth=1, marker=".", markersize=3, label=label
            )
        if (volatility[np.isfinite(volatility)] > 0).any():
            axes[1].set_yscale("log")
        axes[1].set(ylabel="volatility G")
        axes[1].grid(alpha=0.3)
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes[-1].set_xlabel("step")
    return figure
