"""What a CogVideoX user could run instead: torch diffusers, eager, compiled, with INT8 or FP8 linears, with caches.

`python -m benchmarks.rivals --models 5b --out benchmarks/results/rivals_<device>.json`

Needs torch and diffusers, which this package does not, and for their rows torchao and cache-dit (DBCache); no JAX.
Random bfloat16 weights of the published configurations, made on the device, with the spread that `benchmarks.stages`
gives ours. What is timed is one guided denoising step: one forward of the transformer on a batch of two (with the
prompt and without), 49 frames of 480 x 720. The scheduler's few elementwise operations on the latents are left out;
beside the transformer they cost nothing.

The first call of a row compiles, from empty caches; after a second one, `--calls` calls are timed, each synchronised,
and their median reported. A cache is given steps of which every third repeats the one before, so that it reuses there;
its figure is the median of the means of three, and what it left out is counted. A row that cannot run here is named
with the reason, and no other takes its place.
"""

import argparse
import collections
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
from diffusers import CogVideoXTransformer3DModel, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record
from benchmarks.video import latent_shape

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
    """One way to run a model.

    Attributes:
        compiled: or eager. With a cache block by block, since which of them run is decided, and counted, between them;
            with torchao's linears too, which torch tunes for minutes even so.
        cudnn: attention by cuDNN, or as torch chooses.
        linears: of the blocks: "bf16", or through torchao "int8" or "fp8", activations included.
        cache: "", of diffusers "first block" (FirstBlockCache) or "attention" (PyramidAttentionBroadcast, every second
            step's attention), or "dbcache" (cache-dit's DBCache, which also decides after the first block).
    """

    name: str
    compiled: bool = True
    cudnn: bool = False
    linears: str = "bf16"
    cache: str = ""


RIVALS = {
    "eager": Rival(name="diffusers bf16, eager", compiled=False),
    "compile": Rival(name="diffusers bf16, torch.compile"),
    "cudnn": Rival(name="diffusers bf16, torch.compile, cuDNN attention", cudnn=True),
    "first_block": Rival(name="diffusers bf16, eager, FirstBlockCache", compiled=False, cache="first block"),
    "broadcast": Rival(name="diffusers bf16, eager, PyramidAttentionBroadcast", compiled=False, cache="attention"),
    "dbcache": Rival(name="diffusers bf16, eager, cache-dit DBCache", compiled=False, cache="dbcache"),
    "dbcache_compile": Rival(
        name="diffusers bf16, torch.compile, cuDNN attention, cache-dit DBCache", cudnn=True, cache="dbcache"
    ),
    "int8": Rival(name="diffusers, torchao INT8, torch.compile, cuDNN attention", cudnn=True, linears="int8"),
    "int8_dbcache": Rival(
        name="diffusers, torchao INT8, torch.compile, cuDNN attention, cache-dit DBCache",
        cudnn=True,
        linears="int8",
        cache="dbcache",
    ),
    "fp8": Rival(name="diffusers, torchao FP8, torch.compile, cuDNN attention", cudnn=True, linears="fp8"),
}
LEFT_OUT = {
    "first block": ("blocks", r"^transformer_blocks\.\d+\.ff$"),
    "attention": ("attentions", r"\.attn1\.to_q$"),
    "dbcache": ("blocks", r"^transformer_blocks\.\d+$"),
}
"""What a cache leaves out, and the modules that then are not called."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One rival's figures.

    Attributes:
        attention: the kinds that ran, by the names of torch's operations in a trace of one call.
        left_out: by a cache, counted.
        calls: that were timed.
        step_ms, compile_s: one guided step, the median; what the first call took longer than that.
        weights_gib: parameters and buffers as they are stored.
        peak_gib: the most that torch's allocator had given out during the timed calls; None without CUDA.
    """

    model: str
    name: str
    attention: str
    left_out: str
    calls: int
    step_ms: float
    compile_s: float
    weights_gib: float
    peak_gib: float | None


def unavailable(rival: Rival, device: str) -> str | None:
    """Why a rival cannot run here; None if it can."""
    for package, needed in (("torchao", rival.linears != "bf16"), ("cache_dit", rival.cache == "dbcache")):
        if needed and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if rival.linears == "fp8" and (device != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        return "FP8 needs a GPU of compute capability 8.9"
    return "cuDNN attention needs CUDA" if rival.cudnn and device != "cuda" else None


@torch.no_grad()
def random_model(config: dict[str, Any], device: str) -> CogVideoXTransformer3DModel:
    """A model in bfloat16 with random weights, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = CogVideoXTransformer3DModel(**config).eval()
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.normal_(1 if re.search(r"norm\w*\.weight$", name) else 0, 0.02)
    return model


def inputs(config: Any, device: str) -> dict[str, Any]:
    """Arguments of one guided forward at the size that the model is for; rotary tables as diffusers' pipeline has."""
    frames, channels, height, width = latent_shape(config)
    video = torch.randn(2, frames, channels, height, width)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim)
    rotary = None
    if config.use_rotary_positional_embeddings:
        grid = (height // config.patch_size, width // config.patch_size)
        crop = get_resize_crop_region_for_grid(grid, grid[1], grid[0])
        rotary = get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames, device=device)
    return {
        "hidden_states": video.to(device, torch.bfloat16),
        "encoder_hidden_states": text.to(device, torch.bfloat16),
        "timestep": torch.full((2,), 999, device=device),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


def quantize(model: torch.nn.Module, linears: str) -> None:
    """torchao's INT8 or FP8, activations included, in the linears that see all tokens: attention's and the
    feed-forward's."""
    from torchao import quantization

    configs = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "fp8": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow()),
    }
    wanted = re.compile(r"\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$").search
    quantization.quantize_(model, configs[linears](), filter_fn=lambda _, name: wanted(name) is not None)


def enable_cache(model: CogVideoXTransformer3DModel, cache: str) -> collections.Counter[str]:
    """Turns a cache on -> how often each of the modules that it leaves out has been called, kept up to date."""
    if cache == "first block":
        model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    elif cache == "attention":
        every = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
        model.enable_cache(PyramidAttentionBroadcastConfig(**every, current_timestep_callback=lambda: 500))
    else:
        import cache_dit

        cache_dit.set_compile_configs()
        blocks = {"blocks": model.transformer_blocks, "forward_pattern": cache_dit.Pattern_0}
        config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=0, residual_diff_threshold=0.05)
        cache_dit.enable_cache(cache_dit.BlockAdapter(transformer=model, **blocks), cache_config=config)
    called: collections.Counter[str] = collections.Counter()
    for name, module in model.named_modules():
        if re.search(LEFT_OUT[cache][1], name):
            module.register_forward_hook(lambda *_, name=name: called.update([name]))
    return called


def contiguous(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook of the first block, which is given slices: with whole tensors, one compiled program serves all blocks."""
    whole = lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return tuple(map(whole, args)), {name: whole(x) for name, x in kwargs.items()}


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
    if rival.linears != "bf16":
        quantize(transformer, rival.linears)
    first, second = (inputs(transformer.config, device) for _ in range(2))
    cycle = [first, second, second] if rival.cache else [first]
    called = enable_cache(transformer, rival.cache) if rival.cache else collections.Counter()
    forward, compiler = transformer, {"mode": mode, "fullgraph": True}
    if rival.compiled and (rival.cache or rival.linears != "bf16"):
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward, **compiler)
        transformer.transformer_blocks[0].register_forward_pre_hook(contiguous, with_kwargs=True)
    elif rival.compiled:
        forward = torch.compile(transformer, **compiler)
    on_gpu, seconds = device == "cuda", []
    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if rival.cudnn else contextlib.nullcontext(),
        transformer.cache_context("guided") if rival.cache else contextlib.nullcontext(),
    ):
        warm = 2 * len(cycle)
        for call in range(warm + calls * len(cycle)):
            if on_gpu and call == warm:
                torch.cuda.reset_peak_memory_stats()
            if call == warm:
                called.clear()
            start = time.perf_counter()
            forward(**cycle[call % len(cycle)])
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None
        left_out = ""
        if rival.cache:
            share = 1 - sum(called.values()) / (len(transformer.transformer_blocks) * calls * len(cycle))
            left_out = f"{share:.0%} of the {LEFT_OUT[rival.cache][0]}"
        attention = attention_kinds(lambda: forward(**first))
    means = [statistics.mean(seconds[i : i + len(cycle)]) for i in range(warm, len(seconds), len(cycle))]
    step = statistics.median(means)
    weights = sum(stored_bytes(x) for x in (*transformer.parameters(), *transformer.buffers()))
    figures = {"step_ms": round(step * 1000, 2), "compile_s": round(max(0.0, seconds[0] - step), 1)}
    figures |= {"weights_gib": round(weights / 2**30, 3), "peak_gib": peak}
    name = f"{rival.name}, {mode}" if rival.compiled and mode != "default" else rival.name
    return Row(model=model, name=name, attention=attention, left_out=left_out, calls=calls, **figures)


def table(rows: list[Row], missing: dict[str, str]) -> str:
    """A markdown table, and below it what was not measured."""
    head = "| model | configuration | attention | left out | step | weights | peak memory | compilation |"
    lines = [head, "|" + "---|" * 8]
    for r in rows:
        peak = "" if r.peak_gib is None else f"{r.peak_gib:.2f} GiB"
        lines.append(
            f"| {r.model} | {r.name} | {r.attention} | {r.left_out} | {r.step_ms:.1f} ms | {r.weights_gib:.2f} GiB "
            f"| {peak} | {r.compile_s:.0f} s |"
        )
    return "\n".join(lines + [f"\n{name}: not measured: {reason}" for name, reason in missing.items()])


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=["tiny"])
    parser.add_argument("--rows", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each row; of three steps, with a cache")
    parser.add_argument("--mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    torch.compiler.config.force_disable_caches = True
    packages = filter(importlib.util.find_spec, ("torch", "diffusers", "torchao", "cache_dit"))
    versions = {package: importlib.metadata.version(package) for package in packages}
    device, about = "cpu", {"kind": "cpu", "platform": "cpu"}
    if torch.cuda.is_available():
        device, about = "cuda", {"kind": torch.cuda.get_device_name(), "platform": "gpu"}
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    rows: list[Row] = []
    missing: dict[str, str] = {}
    chosen = [rival for row, rival in RIVALS.items() if row in arguments.rows]
    for rival in chosen:  # torchao's and cache-dit's last: they alter the compiler
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
