"""Where the time of a transformer block goes, kernel by kernel, in the compiled sampling loop.

`python -m benchmarks.blocks --models 5b --out benchmarks/results/blocks_<device>.json`

The loop runs under JAX's profiler with a model of the published width and `--layers` blocks; each kernel's time goes to
the part of the block whose named scope its operation has. A floor is the time of the bytes that a part must move, at
the speed of a copy, or of its operations, at that of XLA's bfloat16 matmul, both measured in the same run; INT8
multiplies at twice that. A quarter of the blocks is skipped, one by one, so that the cache is in use.
"""

import argparse
import collections
import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from benchmarks import record
from benchmarks.end_to_end import Prescribed
from benchmarks.stages import random_model, sampling_arguments
from benchmarks.video import latent_shape
from pallas_kernels.common import timer
from pallas_kernels.workloads import BYTES, normal
from sixbit_jax.config import TransformerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES
from sixbit_jax.models.split import Split
from sixbit_jax.precision import ConstantRouter, PrecisionPolicy
from sixbit_jax.precision.accounting import site_weights, summary
from sixbit_jax.qtensor import quantize_model
from sixbit_jax.sampling import sampler

CONFIGS = {
    "tiny": TransformerConfig.from_dict(
        TransformerConfig.cogvideox_2b().to_dict()
        | {
            "num_attention_heads": 2,
            "sample_frames": 9,
            "sample_height": 8,
            "sample_width": 8,
            "max_text_seq_length": 16,
            "text_embed_dim": 32,
            "time_embed_dim": 64,
        }
    ),
    "2b": TransformerConfig.cogvideox_2b(),
    "5b": TransformerConfig.cogvideox_5b(),
}
PARTS = ("reuse", "cache", "attention", "norm_rotary", "modulation", "quantize", "norm", "cast", *SITES)
"""Named scopes; an operation belongs to the first of these that it lies in."""
OTHER, OUTSIDE = "other", "outside the blocks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One part of a block under one way to run it.

    Attributes:
        ms: of one block; of the whole step for what is outside the blocks.
        floor_ms: None where there is none.
    """

    model: str
    configuration: str
    part: str
    ms: float
    floor_ms: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured on the device: bytes and bfloat16 operations a millisecond."""

    bytes: float
    operations: float


def ceilings(size: int) -> Ceilings:
    """A copy of 2 * size^2 bytes, and a product of matrices [size, size]."""

    def ms(function, operands: int, estimate_ms: float) -> float:
        sets = [tuple(normal(jax.random.key(i + 2 * s), size, size) for i in range(operands)) for s in range(2)]
        return timer.measure(timer.compile(function, sets, estimate_ms=estimate_ms), sets).median_ms

    copy = ms(lambda x: -x, 1, 4 * size**2 / 3e9)
    product = ms(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16), 2, 2 * size**3 / 6e11)
    return Ceilings(bytes=4 * size**2 / copy, operations=2 * size**3 / product)


def floors(config: TransformerConfig, ceiling: Ceilings, *, quantized: bool, cache: str) -> dict[str, float]:
    """Least ms of each part of a block, a guided step of one video."""
    d = config.inner_dim
    frames, _, height, width = latent_shape(config)
    grid = frames * height * width // config.patch_size**2
    rows = 2 * (tokens := config.max_text_seq_length + grid)
    stored = BYTES[cache]
    moved = {"norm_rotary": rows * 2 * d * 4}
    if quantized:
        moved |= {"quantize": rows * (3 * d + 4 * d) * 3, "cast": 12 * d * d * (BYTES["nvfp4"] + BYTES["int8"])}
        moved |= {"cache": rows * d * (4 + 2 * stored), "reuse": rows * d * (4 + stored)}
    else:
        moved |= {"norm": 2 * rows * d * 4}
    widths = {"attn_in": 3 * d * d, "attn_out": d * d, "ff_in": 4 * d * d, "ff_out": 4 * d * d}
    multiplied = {site: 2 * rows * width / (2 if quantized else 1) for site, width in widths.items()}
    multiplied["attention"] = 4 * rows * tokens * d
    found = {part: count / ceiling.bytes for part, count in moved.items()}
    return found | {part: count / ceiling.operations for part, count in multiplied.items()}


def profile(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """One call -> (ms of each HLO operation, its result)."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = jax.block_until_ready(run())
        (path,) = Path(folder).glob("**/*.xplane.pb")
        data = ProfileData.from_file(str(path))
    spent: dict[str, float] = collections.defaultdict(float)
    on_gpu = jax.default_backend() == "gpu"
    for plane in data.planes:
        if plane.name.startswith("/device:GPU") != on_gpu:
            continue
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = next((value for name, value in event.stats if name == "hlo_op"), None)
                # A loop or a branch is the sum of what runs in it.
                if operation is not None and not re.match(r"(while|conditional|call)\b", operation):
                    spent[operation] += event.duration_ns / 1e6
    return spent, result


def scopes(compiled: jax.stages.Compiled) -> dict[str, str]:
    """HLO operation -> the path of named scopes it came from."""
    found = re.findall(
        r'^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', compiled.as_text() or "", re.M
    )
    return dict(found)


def part_of(path: str) -> str:
    """The part of a block that an operation belongs to."""
    segments = path.split("/")
    found = next((part for part in PARTS if part in segments), None)
    return found or (OTHER if segments.count("while") > 1 else OUTSIDE)


def measure(model: str, name: str, transformer: Split, policy: PrecisionPolicy | None, steps: int) -> list[Row]:
    """The rows of one way to run a model, without floors; prints the longest operations."""
    config = transformer.merge().config
    arguments = sampling_arguments(transformer, steps)
    compiled = sampler.sample.lower(*arguments, policy=policy).compile()
    spent, (_, trace) = profile(functools.partial(compiled, *arguments, policy=policy))
    paths = scopes(compiled)
    skipped = 0.0 if policy is None else summary(trace.precision.bits, site_weights(config)).skip_share
    total: dict[str, float] = collections.defaultdict(float)
    for operation, ms in sorted(spent.items(), key=lambda item: -item[1]):
        part = part_of(paths.get(operation, "while/while"))
        total[part] += ms
        if ms > 0.01 * sum(spent.values()):
            print(f"{model} {name}: {ms:9.3f} ms {part:16s} {operation:40s} {paths.get(operation, '')[-60:]}")
    blocks = steps * config.num_layers
    calls = {"reuse": blocks * skipped, OUTSIDE: steps}
    return [
        Row(model=model, configuration=name, part=part, ms=ms / calls.get(part, blocks * (1 - skipped)), floor_ms=None)
        for part, ms in total.items()
    ]


def rows(model: str, layers: int, steps: int) -> list[Row]:
    """bfloat16, and INT8 with a delta cache in NVFP4."""
    config = dataclasses.replace(CONFIGS[model], num_layers=layers)
    ceiling = ceilings(256 if model == "tiny" else 8192)
    print(f"{ceiling.bytes / 1e9:.2f} TB/s, {ceiling.operations / 1e9:.0f} TFLOP/s")
    transformer = random_model(CogVideoXTransformer3DModel, config)
    found = []
    for name, policy in {
        "bf16": None,
        "INT8": PrecisionPolicy(
            router=ConstantRouter(route="int8"),
            skipper=Prescribed(share=0.25, whole_steps=False),
            cache_format="nvfp4",
        ),
    }.items():
        if policy is not None:
            transformer = Split.of(quantize_model(transformer.merge()))
        floor = floors(config, ceiling, quantized=policy is not None, cache="nvfp4")
        parts = measure(model, name, transformer, policy, steps)
        found += [dataclasses.replace(row, floor_ms=floor.get(row.part)) for row in parts]
    return found


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = ["| model | configuration | part | ms | floor | of its floor |", "|---|---|---|---|---|---|"]
    for r in rows:
        floor = ("", "") if r.floor_ms is None else (f"{r.floor_ms:.3f}", f"{r.floor_ms / r.ms:.0%}")
        lines.append(f"| {r.model} | {r.configuration} | {r.part} | {r.ms:.3f} | {floor[0]} | {floor[1]} |")
    for model, configuration in dict.fromkeys((r.model, r.configuration) for r in rows):
        mine = [r for r in rows if (r.model, r.configuration) == (model, configuration)]
        block = sum(r.ms for r in mine if r.part not in (OUTSIDE, "reuse"))
        floor = sum(r.floor_ms or 0.0 for r in mine if r.part != "reuse")
        lines.append(
            f"| {model} | {configuration} | **a computed block** | {block:.3f} | {floor:.3f} | {floor / block:.0%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=["tiny"])
    parser.add_argument(
        "--layers", type=int, default=4, help="blocks of the model; a block's time does not depend on it"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    # Kernels that are launched as one graph have no names.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    found = [row for model in arguments.models for row in rows(model, arguments.layers, arguments.steps)]
    text = table(found)
    print(text)
    record.save(arguments.out, record.describe(program="benchmarks.blocks", argv=argv, rows=found), text)
    return found


if __name__ == "__main__":
    main()
