"""What a CogVideoX user could run instead: diffusers in torch, eager, compiled, and compiled with INT8 linears.

`python -m benchmarks.rivals --models 5b --out benchmarks/results/rivals_<device>.json`

Needs torch and diffusers, which this package does not; no JAX. Random bfloat16 weights of the published configurations,
made on the device, with the spread that `benchmarks.stages` gives ours. What is timed is one guided denoising step: one
forward of the transformer on a batch of two (with the prompt and without), 49 frames of 480 x 720. The scheduler's few
elementwise operations on the latents are left out; beside the transformer they cost nothing.

The first call of a row compiles, from empty caches; after a second one, `--calls` calls are timed, each synchronised,
and their median reported. A row that cannot run here is named with the reason, and no other takes its place.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record

ROTARY = {"use_rotary_positional_embeddings": True}
TINY_VIDEO = {"sample_frames": 9, "sample_height": 6, "sample_width": 10}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"num_attention_heads": 2, "num_layers": 2, **TINY_VIDEO, **ROTARY},
    "2b": {},
    "5b": {"num_attention_heads": 48, "num_layers": 42, **ROTARY},
}
"""Constructor arguments of `CogVideoXTransformer3DModel` by model name; its defaults are CogVideoX-2B."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """One way to run a model: compiled or eager, attention by cuDNN or as torch chooses, linears in INT8 or not."""

    name: str
    compiled: bool = True
    cudnn: bool = False
    int8: bool = False


RIVALS = {
    "eager": Rival(name="diffusers bf16, eager", compiled=False),
    "compile": Rival(name="diffusers bf16, torch.compile"),
    "cudnn": Rival(name="diffusers bf16, torch.compile, cuDNN attention", cudnn=True),
    "int8": Rival(name="diffusers, torchao INT8, torch.compile, cuDNN attention", cudnn=True, int8=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One rival's figures.

    Attributes:
        attention: the kinds that ran, by the names of torch's operations in a trace of one call.
        calls: that were timed.
        step_ms, compile_s: one guided step, the median; what the first call took longer than that.
        weights_gib: parameters and buffers as they are stored.
        peak_gib: the most that torch's allocator had given out during the timed calls; None without CUDA.
    """

    model: str
    name: str
    attention: str
    calls: int
    step_ms: float
    compile_s: float
    weights_gib: float
    peak_gib: float | None


def unavailable(rival: Rival, device: str) -> str | None:
    """Why a rival cannot run here; None if it can."""
    if rival.int8 and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    return "cuDNN attention needs CUDA" if rival.cudnn and device != "cuda" else None


@torch.no_grad()
def random_model(config: dict[str, Any], device: str) -> CogVideoXTransformer3DModel:
    """A model in bfloat16 with random weights, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = CogVideoXTransformer3DModel(**config).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def inputs(config: Any, device: str) -> dict[str, Any]:
    """Arguments of one guided forward at the size that the model is for; rotary tables as diffusers' pipeline has."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    video = torch.randn(2, frames, config.in_channels, config.sample_height, config.sample_width)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim)
    rotary = None
    if config.use_rotary_positional_embeddings:
        grid = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        crop = get_resize_crop_region_for_grid(grid, grid[1], grid[0])
        rotary = get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames, device=device)
    return {
        "hidden_states": video.to(device, torch.bfloat16),
        "encoder_hidden_states": text.to(device, torch.bfloat16),
        "timestep": torch.full((2,), 999, device=device),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


def to_int8(model: torch.nn.Module) -> None:
    """torchao's INT8, activations included, in the linears that see all tokens: attention's and the feed-forward's."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    wanted = re.compile(r"\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$").search
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: wanted(name) is not None)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def attention_kinds(run: Callable[[], Any]) -> str:
    """Which of torch's attention operations one call runs, such as "cudnn" or "flash"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        run()
    found = [re.match(r"aten::_scaled_dot_product_(?:attention_)?([a-z]+)", e.key) for e in trace.key_averages()]
    return ", ".join(sorted({match[1] for match in found if match}))


@torch.no_grad()
def measure(model: str, rival: Rival, device: str, calls: int, mode: str) -> Row:
    """Builds, compiles and times one row."""
    torch.compiler.reset()
    gc.collect()
    transformer = random_model(CONFIGS[model], device)
    if rival.int8:
        to_int8(transformer)
    arguments = inputs(transformer.config, device)
    forward = torch.compile(transformer, mode=mode, fullgraph=True) if rival.compiled else transformer
    on_gpu, seconds = device == "cuda", []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if rival.cudnn else contextlib.nullcontext():
        for call in range(2 + calls):
            if on_gpu and call == 2:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            forward(**arguments)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None
        attention = attention_kinds(lambda: forward(**arguments))
    step = statistics.median(seconds[2:])
    weights = sum(stored_bytes(x) for x in (*transformer.parameters(), *transformer.buffers()))
    figures = {"step_ms": round(step * 1000, 2), "compile_s": round(max(0.0, seconds[0] - step), 1)}
    figures |= {"weights_gib": round(weights / 2**30, 3), "peak_gib": peak}
    name = f"{rival.name}, {mode}" if rival.compiled and mode != "default" else rival.name
    return Row(model=model, name=name, attention=attention, calls=calls, **figures)


def table(rows: list[Row], missing: dict[str, str]) -> str:
    """A markdown table, and below it what was not measured."""
    lines = ["| model | configuration | attention | step | weights | peak memory | compilation |", "|" + "---|" * 7]
    for r in rows:
        peak = "" if r.peak_gib is None else f"{r.peak_gib:.2f} GiB"
        lines.append(
            f"| {r.model} | {r.name} | {r.attention} | {r.step_ms:.1f} ms | {r.weights_gib:.2f} GiB | {peak} "
            f"| {r.compile_s:.0f} s |"
        )
    return "\n".join(lines + [f"\n{name}: not measured: {reason}" for name, reason in missing.items()])


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=["tiny"])
    parser.add_argument("--rows", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each row")
    parser.add_argument("--mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    torch.compiler.config.force_disable_caches = True
    packages = filter(importlib.util.find_spec, ("torch", "diffusers", "torchao"))
    versions = {package: importlib.metadata.version(package) for package in packages}
    device, about = "cpu", {"kind": "cpu", "platform": "cpu"}
    if torch.cuda.is_available():
        device, about = "cuda", {"kind": torch.cuda.get_device_name(), "platform": "gpu"}
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for rival in (RIVALS[row] for row in RIVALS if row in arguments.rows):  # INT8 last: torchao alters the compiler
        if reason := unavailable(rival, device):
            missing[rival.name] = reason
            print(f"{rival.name}: not measured: {reason}", flush=True)
        for model in [] if reason else arguments.models:
            rows.append(measure(model, rival, device, arguments.calls, arguments.mode))
            print(table(rows, {}).splitlines()[-1], flush=True)
        more = {"argv": argv, "device": about, "versions": versions, "not_measured": missing}
        result = record.describe(program="benchmarks.rivals", rows=rows, **more)
        record.save(arguments.out, result, table(rows, missing))
    return rows


if __name__ == "__main__":
    main()
