"""The tables, figures and verdicts of `benchmarks.fidelity`, from its results.json alone.

`python -m benchmarks.fidelity_report benchmarks/fidelity/ddim` writes them again.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from sixbit_jax.models.linears import SITES

Row = Mapping[str, Any]
HEAD = (
    "row",
    "mean bits",
    "without skipped",
    "skipped",
    "PSNR, dB",
    "worst",
    "against W4A8",
    "SSIM",
    "worst",
    "latents, rel. L2",
    "worst",
    "digit",
    "colour",
    "direction",
)
GROUPS = {
    "reference": "Reference and floor",
    "formats": "One format everywhere",
    "routing": "Routing without a cache",
    "caching": "The cache alone, in bf16",
    "stacking": "Quantisation and cache together",
    "cache format": "How the cache is stored",
    "improvements": "Improvements",
}
SKIPPING = ("stacking", "cache format", "improvements")
"""Groups of rows that quantise and skip."""
STACKED = {"naive stacking": "#b03a5b", "whole steps skipped": "#4c9a6a", "purified, or routed otherwise": "#3b7fb8"}
"""Ways to do both, and their colours."""


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes report.md and its figures beside results.json."""
    rows = record["rows"]
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    parts = ["# Fidelity of the policies on the mini model", _setting(record)]
    for solver in solvers:
        own = [row for row in rows if row["solver"] == solver]
        parts += [f"## {solver}", *_section(folder, solver, own, record["calibration"].get(solver))]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def _setting(record: Mapping[str, Any]) -> str:
    settings, versions = record["settings"], record["versions"]
    prompts = len(set(settings["prompts"]))
    return (
        f"`{record['command']}`, on {record['device']['kind']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f".\n\n{settings['clips']} clips of {prompts} held-out prompts, {settings['steps']} steps, guidance"
        f" {settings['guidance_scale']:g}. Every row starts from the same noise and is compared with the mini model's"
        " own bf16 run of the same solver: PSNR and SSIM of its 8-bit frames, relative L2 error of its latents, mean"
        " and worst clip; accuracies, in percent, are those of the mini model's judge, digit by digit. Mean bits are"
        " weighted by multiply-adds, a skipped block counting as 0; a run of fewer steps counts its missing steps as 0"
        " too. Thresholds were solved for on prompts that training saw, so a row meets its target roughly."
    )


def _section(folder: Path, solver: str, rows: Sequence[Row], calibration: Mapping[str, Any] | None) -> list[str]:
    parts = []
    if verdicts := claims(rows, calibration):
        parts += ["### Claims", _table(("claim", "holds", "found"), verdicts)]
    figures = {
        "stacking": ("Quantisation and cache together", lambda figure: draw_stacking(figure, rows)),
        "routing": ("PSNR by mean bits, without a cache", lambda figure: draw_routing(figure, rows)),
        "caching": ("PSNR by share of skipped blocks, in bf16", lambda figure: draw_caching(figure, rows)),
    }
    if calibration is not None and calibration["scatter"]["volatility"]:
        figures["correlation"] = (
            "Volatility and the next step's NVFP4 error",
            lambda figure: draw_correlation(figure, calibration),
        )
    for name, (title, draw) in figures.items():
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        if draw(figure):
            path = f"{name}_{solver.lower()}.png"
            figure.savefig(folder / path, dpi=110)
            parts.append(f"![{title}]({path})")
    if (folder / (trace := f"trace_{solver.lower()}.png")).exists():
        parts.append(f"![Trace of one clip]({trace})")
    eight = next((row for row in rows if row["name"] == "W4A8"), None)
    for group, title in GROUPS.items():
        if chosen := [row for row in rows if row["group"] == group]:
            parts += [f"### {title}", _table(HEAD, [_cells(row, eight) for row in chosen])]
    return parts


def _cells(row: Row, eight: Row | None) -> list[str]:
    psnr = ["equal", "equal"] if row["psnr"] is None else [f"{row['psnr'][k]:.2f}" for k in ("mean", "worst")]
    return [
        row["name"],
        f"{row['mean_bits']:.2f}",
        f"{row['mean_bits_computed']:.2f}",
        f"{100 * row['skip_share']:.1f} %",
        *psnr,
        "" if eight is None or row["psnr"] is None else "{:+.2f} ± {:.2f}".format(*_differences(row, eight)),
        *(f"{row['ssim'][k]:.4f}" for k in ("mean", "worst")),
        *(f"{row['latent_error'][k]:.4f}" for k in ("mean", "worst")),
        *(f"{100 * value:.1f}" for value in row["accuracy"].values()),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _psnr(row: Row) -> float:
    return row["psnr"]["mean"] if row["psnr"] else float("inf")


def _differences(row: Row, other: Row) -> tuple[float, float]:
    """Mean of PSNR(row) - PSNR(other) over the clips, and its standard error."""
    pairs = [(a, b) for a, b in zip(row["psnr_by_clip"], other["psnr_by_clip"], strict=True) if None not in (a, b)]
    gaps = np.array([a - b for a, b in pairs])
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else float("nan")


def claims(rows: Sequence[Row], calibration: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(claim, whether it holds, evidence) of those whose rows are there."""
    named = {row["name"]: row for row in rows}
    verdicts = []

    def add(claim: str, holds: bool, found: str) -> None:
        verdicts.append((claim, "yes" if holds else "no", found))

    if calibration is not None and calibration["scatter"]["volatility"]:
        r = np.array(calibration["correlation"])
        sites = ", ".join(f"{site} {r[:, i].min():+.2f} to {r[:, i].max():+.2f}" for i, site in enumerate(SITES))
        add("G predicts the next step's NVFP4 error (r > 0.7)", bool((r > 0.7).all()), f"r by block: {sites}")
    for bits in sorted({float(name.split()[1]) for name in named if re.fullmatch(r"DMPQ, \S+ bits", name)}):
        dynamic = named[f"DMPQ, {bits:g} bits"]
        static = [
            named[name]
            for name in (
                f"static sites, {bits:g} bits",
                f"first and last steps, {bits:g} bits",
                f"first steps, {bits:g} bits",
                f"last steps, {bits:g} bits",
                f"static sites and steps, {bits:g} bits",
            )
            if name in named
        ]
        if static:
            gaps = [(_differences(dynamic, row), row["name"].rpartition(",")[0]) for row in static]
            add(
                f"DMPQ at least as good as static allocations at {bits:g} bits",
                all(gap >= -error for (gap, error), _ in gaps),
                "; ".join(f"{gap:+.2f} ± {error:.2f} dB against {name}" for (gap, error), name in gaps),
            )
    eight, bf16 = named.get("W4A8"), named.get("bf16")
    if eight is None or bf16 is None:
        return verdicts
    for name, row in named.items():
        if not name.startswith("DMPQ + TDC, PDR ("):
            continue
        label = name[name.index("(") :]
        naive = named.get(f"DMPQ + TDC, naive {label}")
        if naive is not None:
            loss, gain = _psnr(eight) - _psnr(naive), _psnr(row) - _psnr(naive)
            add(
                f"PDR takes back what naive stacking loses {label}",
                loss > 0 and gain > 0.5 * loss,
                f"naive loses {loss:.2f} dB against W4A8 without cache; PDR takes back {gain:+.2f} dB"
                + (f", {100 * gain / loss:.0f} % of it" if loss > 0 else ""),
            )
    for name, row in named.items():
        if not name.startswith("DMPQ + TDC, PDR (") and row["group"] != "improvements":
            continue
        gap, error = _differences(row, eight)
        semantics = max(bf16["accuracy"][k] - row["accuracy"][k] for k in bf16["accuracy"])
        add(
            f"{name}: within 1 dB of W4A8 without cache, semantics within 2 points of bf16",
            gap >= -1 and semantics <= 0.02,
            f"{gap:+.2f} ± {error:.2f} dB; semantics at most {100 * semantics:.1f} points lower;"
            f" {row['mean_bits']:.2f} bits, {100 * row['skip_share']:.0f} % skipped",
        )
    promised = [row for row in rows if row["group"] in SKIPPING and row["skip_share"] >= 0.3 and row["mean_bits"] <= 6]
    if promised:
        gap, error, best = max((*_differences(row, eight), row["name"]) for row in promised)
        add(
            "with at least 30 % of the blocks skipped and at most 6 bits, fidelity can be that of W4A8 without cache"
            " (within the standard error; the best of these rows)",
            gap + error >= 0,
            f"{gap:+.2f} ± {error:.2f} dB: {best}",
        )
    return verdicts


def draw_correlation(figure: Figure, calibration: Mapping[str, Any]) -> bool:
    """One panel a site: error of the NVFP4 product against the volatility one step before, coloured by block."""
    volatility, error = (np.array(calibration["scatter"][k]) for k in ("volatility", "error"))
    r = np.array(calibration["correlation"])
    figure.set_size_inches(12, 3.4)
    colours = colormaps["viridis"](np.linspace(0, 0.95, volatility.shape[-1]))
    for i, (site, axes) in enumerate(zip(SITES, figure.subplots(1, len(SITES)), strict=True)):
        for block, colour in enumerate(colours):
            axes.scatter(volatility[..., block].ravel(), error[..., block, i].ravel(), s=3, color=colour)
        axes.set(title=f"{site}: r {r[:, i].min():+.2f} to {r[:, i].max():+.2f}", xlabel="G, one step before")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative NVFP4 error")
    return True


def draw_routing(figure: Figure, rows: Sequence[Row]) -> bool:
    """PSNR against mean bits, a line for each way to route."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["group"] == "routing":
            lines.setdefault(row["name"].rpartition(",")[0], []).append((row["mean_bits"], _psnr(row)))
    ends = [(row["mean_bits"], _psnr(row)) for row in rows if row["name"] in ("W4A4", "W4A8")]
    if lines:
        axes = figure.subplots()
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points + ends), strict=True), marker="o", markersize=4, label=name)
        axes.set(xlabel="mean activation bits", ylabel="mean PSNR against bf16, dB")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return bool(lines)


def draw_caching(figure: Figure, rows: Sequence[Row]) -> bool:
    """PSNR against the share of the work that is saved, in bf16."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["group"] == "caching":
            kind = "TDC" if row["name"].startswith("TDC") else "every n-th step"
            kinds.setdefault(kind, []).append((row["skip_share"], _psnr(row)))
        elif row["name"].startswith("bf16, "):
            kinds.setdefault("fewer steps", []).append((1 - row["mean_bits"] / 16, _psnr(row)))
    if kinds:
        axes = figure.subplots()
        for name, points in kinds.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
        axes.set(xlabel="share of the blocks' work that is saved", ylabel="mean PSNR against bf16, dB")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return bool(kinds)


def stacked_how(name: str) -> str:
    """Which of `STACKED` a row of that name is; a cache over one format is naive unless it is purified."""
    if "step skipped" in name:
        return "whole steps skipped"
    naive = "naive" in name or (name.startswith("W4") and "PDR" not in name)
    return "naive stacking" if naive else "purified, or routed otherwise"


def draw_stacking(figure: Figure, rows: Sequence[Row]) -> bool:
    """Mean PSNR of what is stacked, best first, worst clip as a tick, beside W4A8 without a cache."""
    chosen = [row for row in rows if row["group"] in ("stacking", "improvements") and row["psnr"]]
    if not chosen:
        return False
    chosen.sort(key=_psnr)
    figure.set_size_inches(10, 1.5 + 0.22 * len(chosen))
    axes = figure.subplots()
    names = [f"{row['name']}: {row['mean_bits']:.1f} bits, {100 * row['skip_share']:.0f} % skipped" for row in chosen]
    worst = [row["psnr"]["worst"] for row in chosen]
    for kind, colour in STACKED.items():
        own = [i for i, row in enumerate(chosen) if stacked_how(row["name"]) == kind]
        axes.barh(own, [_psnr(chosen[i]) for i in own], color=colour, label=kind)
    axes.plot(worst, range(len(chosen)), "|", color="black", label="worst clip")
    for row in rows:
        if row["name"] in ("W4A8", "W4A4"):
            style = "--" if row["name"] == "W4A8" else ":"
            axes.axvline(_psnr(row), color="0.3", linestyle=style, label=f"{row['name']} without cache")
    axes.set(xlabel="mean PSNR against bf16, dB", ylim=(-1, len(chosen)), xlim=(np.floor(min(worst)) - 1, None))
    axes.set_yticks(range(len(chosen)), names, fontsize=7)
    figure.legend(fontsize=7, loc="outside lower center", ncols=6)
    return True


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target, json.loads((target / "results.json").read_text()))
