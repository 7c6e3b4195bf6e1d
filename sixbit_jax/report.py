"""A run against its reference, as a folder of files, and one HTML page made from those files alone.

`save_run` writes the folder: three videos, the trace of decisions, and run.json with every number. `write` makes
report.html from it, with everything embedded: the page asks nothing of the network, and can be sent to someone.
"""

import base64
import dataclasses
import hashlib
import html
import json
import math
import shlex
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from sixbit_jax import metrics, trace_plot, video
from sixbit_jax.errors import ArgumentError
from sixbit_jax.pipeline import Pipeline, PipelineOutput
from sixbit_jax.precision.blocks import PrecisionTrace, init_state

FORMAT = 1
"""Version of run.json. Others are refused."""
RUN, TRACE, PAGE = "run.json", "trace.npz", "report.html"
VIDEOS = ("reference.mp4", "quantized.mp4", "difference.mp4")
FILES = (*VIDEOS, TRACE, RUN)
"""What a page is made from."""
ASSETS = Path(__file__).parent / "assets" / "report"
GAIN = 4
"""The difference of two videos is shown this many times as large."""
STAGES = {"text_encoder": "Text encoder", "sampling": "Sampling", "vae": "VAE decoder"}
WEIGHTS = {"text_encoder": "text_encoder", "sampling": "transformer", "vae": "vae"}
"""Stage -> the part of a pipeline whose weights it reads."""


def measured(pipe: Pipeline, output: PipelineOutput, *, guided: bool) -> dict[str, Any]:
    """Time and memory of a run, for run.json.

    Args:
        pipe: that ran, its text encoder and VAE compiled before, so that all compilation was the sampling loop's.
        output: what it returned.
        guided: whether each video was two samples of a forward pass.

    Returns:
        `seconds` of each stage, which do not overlap: `sampling` is without `compilation`; `weights_bytes` of each
        stage's model; `delta_cache_bytes`; `peak_bytes`, the most that the device has held since the process began,
        None where the platform does not say; `weights`, the format of the linears of the blocks.
    """
    seconds = dict(output.timings)
    seconds["sampling"] = max(0.0, seconds["sampling"] - seconds["compilation"])
    model, policy = pipe.transformer.merge(), pipe.policy(len(output.trace.timestep))
    cache = []
    if policy is not None:
        shape, text = output.latents.shape, model.config.max_text_seq_length
        cache = jax.eval_shape(lambda: jax.tree.leaves(init_state(policy, model, shape, text, guided).cache))
    return {
        "weights": "nvfp4" if pipe.is_quantized else str(np.dtype(model.dtype)),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "weights_bytes": {stage: _nbytes(getattr(pipe, part)) for stage, part in WEIGHTS.items()},
        "delta_cache_bytes": _nbytes(cache),
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fidelity(found: PipelineOutput, wanted: PipelineOutput) -> dict[str, Any]:
    """How close the first video of a run is to that of another, for run.json.

    Args:
        found: the run, with frames.
        wanted: the reference, likewise.

    Returns:
        `psnr` and `psnr_by_frame` in dB, None where they are infinite; `ssim`, None for frames smaller than its
        window; `latent_error`, the relative L2 error of the latents.
    """
    ours, theirs = found.frames[:1], wanted.frames[:1]
    large_enough = min(theirs.shape[2:4]) > 2 * metrics.RADIUS
    return {
        "psnr": _finite(metrics.psnr(ours, theirs)[0]),
        "psnr_by_frame": [_finite(value) for value in metrics.psnr(ours[0][:, None], theirs[0][:, None])],
        "ssim": float(metrics.ssim(ours, theirs)[0]) if large_enough else None,
        "latent_error": float(metrics.relative_error(found.latents[:1], wanted.latents[:1])[0]),
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def difference(found: UInt8[np.ndarray, "*video"], wanted: UInt8[np.ndarray, "*video"]) -> UInt8[np.ndarray, "*video"]:
    """|found - wanted| of each pixel, `GAIN` times as large, black where they are equal."""
    gap = np.abs(found.astype(np.int16) - wanted.astype(np.int16))
    return np.minimum(GAIN * gap, 255).astype(np.uint8)


def save_trace(path: str | Path, trace: PrecisionTrace, group: int) -> None:
    """Writes one group of a run's trace as arrays [steps, blocks] and [steps, blocks, sites]."""
    arrays: dict[str, Any] = {
        field.name: np.asarray(getattr(trace, field.name))[:, :, group] for field in dataclasses.fields(trace)
    }
    with video.replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def save_run(folder: Path, record: Mapping[str, Any], quantized: PipelineOutput, reference: PipelineOutput) -> None:
    """Writes what a page is made from; run.json last, so that a folder that holds one is complete.

    Args:
        folder: is made if need be; files of an earlier run in it are replaced.
        record: what run.json holds besides `format` and `fidelity`: `prompt`, `fps`, `quantization`, `summary`,
            `runs` (of "quantized" and "reference", see `measured`), `versions`, and any other setting.
        quantized, reference: the two runs, of one video each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN).unlink(missing_ok=True)
    ours, theirs = quantized.frames[0], reference.frames[0]
    for name, frames in zip(VIDEOS, (theirs, ours, difference(ours, theirs)), strict=True):
        video.write_mp4(folder / name, frames, fps=record["fps"])
    assert quantized.trace.precision is not None
    save_trace(folder / TRACE, quantized.trace.precision, 0)
    record = {"format": FORMAT, **record, "fidelity": fidelity(quantized, reference)}
    with video.replacing(folder / RUN) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write(folder: str | Path) -> Path:
    """Makes report.html of a folder that `save_run` wrote, and returns its path.

    Raises:
        ArgumentError: if files are missing (lists them) or cannot be read.
    """
    folder = Path(folder)
    made_by = "`sixbit generate --quantization NAME --report FOLDER` writes one"
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: no such folder; {made_by}")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ArgumentError(f"{folder}: is not a complete run, {', '.join(missing)} missing; {made_by}")
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"{folder / RUN}: cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ArgumentError(f"{folder / RUN}: is not of format {FORMAT}, the one this version reads; {made_by}")
    trace, videos = _load_trace(folder / TRACE), {name: (folder / name).read_bytes() for name in VIDEOS}
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "trace.png"
        trace_plot.save_trace(trace, picture)
        text = page(record, videos, picture.read_bytes())
    with video.replacing(folder / PAGE) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / PAGE


def _load_trace(path: Path) -> PrecisionTrace:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            fields = dataclasses.fields(PrecisionTrace)
            return PrecisionTrace(**{field.name: arrays[field.name][:, :, None] for field in fields})
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArgumentError(f"{path}: cannot be read: {error}") from error


def page(record: Mapping[str, Any], videos: Mapping[str, bytes], picture: bytes) -> str:
    """The page.

    Args:
        record: run.json.
        videos: name in `VIDEOS` -> the mp4.
        picture: PNG of the trace.
    """
    runs, close, summary, name = record["runs"], record["fidelity"], record["summary"], record["quantization"]["name"]
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[record["dtype"]]
    # Of a checkpoint that was converted there are no other weights to compare with.
    reference = dtype if runs["reference"]["weights"] != "nvfp4" else f"{dtype} activations, NVFP4 weights"
    captions = (
        f"Reference: {reference}",
        f"Quantised: {name}",
        f"Difference, {GAIN} times as large: black where the two are equal",
    )
    small = ' class="small"' if record["height"] < 256 else ""  # enlarged; show its pixels
    template, style, script = ((ASSETS / file).read_text() for file in ("page.html", "style.css", "script.js"))
    return Template(template).substitute(
        # No script but this one runs, and nothing is asked of the network, whatever a prompt holds.
        script_policy=f"script-src 'sha256-{_base64(hashlib.sha256(script.encode()).digest())}'",
        style=style,
        script=script,
        prompt=html.escape(record["prompt"]),
        lead=html.escape(
            f"The same text and the same noise, once in {reference} and once quantised ({name}). The quantised run's "
            f"activations took {summary['mean_bits']:.2f} bits on average; of its blocks, over all steps, "
            f"{summary['skip_share']:.1%} were skipped. PSNR against the reference: {_decibels(close['psnr'])}."
        ),
        videos="".join(
            f'<figure><video{small} src="{_data("video/mp4", videos[file])}" autoplay loop muted playsinline'
            f' aria-label="{html.escape(caption)}"></video><figcaption>{html.escape(caption)}</figcaption></figure>'
            for file, caption in zip(VIDEOS, captions, strict=True)
        ),
        fps=html.escape(str(record["fps"])),
        last_frame=len(close["psnr_by_frame"]) - 1,
        fidelity=_table(("Measure", "Found", "How to read it"), _fidelity_rows(close)),
        spent=_table(("Measure", "Found", "How to read it"), _spent_rows(summary)),
        picture=_data("image/png", picture),
        device=html.escape(record["device"]["kind"]),
        cost=_table(("", reference, name), _cost_rows(runs), numbers=True),
        settings=_settings(record),
        command=html.escape(shlex.join(record["command"])),
    )


_SHOWN_ELSEWHERE = ("format", "prompt", "summary", "runs", "fidelity", "latents_rms", "command")


def _fidelity_rows(close: Mapping[str, Any]) -> list[tuple[str, ...]]:
    frames = close["psnr_by_frame"]
    worst = min(range(len(frames)), key=lambda i: math.inf if frames[i] is None else frames[i])
    ssim = "frames are too small" if close["ssim"] is None else f"{close['ssim']:.4f}"
    return [
        ("PSNR of the video", _decibels(close["psnr"]), "Error of the pixels; higher is closer, 6 dB halves it."),
        ("PSNR of its worst frame", f"{_decibels(frames[worst])} (frame {worst + 1})", "The same, of one frame."),
        ("SSIM", ssim, "Likeness of local structure; 1 is identical."),
        (
            "Relative error of the latents",
            f"{close['latent_error']:.4f}",
            "What sampling returned, before the VAE decoder; 0 is identical.",
        ),
    ]


def _spent_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    computed = summary["mean_bits_computed"]
    routes = [f"{share:.1%} {name}" for name, share in summary["route_shares"].items()]
    return [
        (
            "Mean activation width",
            f"{summary['mean_bits']:.2f} bits",
            "Over the linear layers of all blocks and steps, by work. Unquantised counts as 16, skipped as 0.",
        ),
        (
            "Without skipped blocks",
            "all were skipped" if computed is None else f"{computed:.2f} bits",
            "The same, of what was computed.",
        ),
        ("Blocks skipped", f"{summary['skip_share']:.1%}", "Their last contribution was used again."),
        ("Work by route", ", ".join(routes), "Where the multiply-adds went."),
    ]


def _cost_rows(runs: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def row(title: str, value: Any) -> tuple[str, ...]:
        return (title, *(value(runs[name]) for name in ("reference", "quantized")))

    return [
        *(row(f"{title}, time", lambda run, s=stage: f"{run['seconds'][s]:.4f} s") for stage, title in STAGES.items()),
        row("Compiling sampling, or loading it compiled", lambda run: f"{run['seconds']['compilation']:.4f} s"),
        *(row(f"{title}, weights", lambda run, s=s: _size(run["weights_bytes"][s])) for s, title in STAGES.items()),
        row("Delta cache", lambda run: _size(run["delta_cache_bytes"])),
        row("Highest device memory so far", lambda run: _size(run["peak_bytes"])),
    ]


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.2f} dB"


def _size(count: int | None) -> str:
    return "not reported on this platform" if count is None else f"{count / 2**20:,.2f} MiB"


def _settings(record: Mapping[str, Any]) -> str:
    """A table of the settings of the call, and one of each group of others."""
    rest = {name: value for name, value in record.items() if name not in _SHOWN_ELSEWHERE}
    groups = {"call": {name: value for name, value in rest.items() if not isinstance(value, Mapping)}}
    groups |= {name: value for name, value in rest.items() if isinstance(value, Mapping)}
    return "".join(
        _table((title, ""), [(name, "none" if value is None else str(value)) for name, value in group.items()])
        for title, group in groups.items()
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    kind = ' class="numbers"' if numbers else ""
    return f"<table{kind}>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{_base64(content)}"
