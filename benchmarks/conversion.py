"""Converting a full-size checkpoint to NVFP4: time, peak memory, bytes at rest, and time to load the result.

`python -m benchmarks.conversion --models 5b --out benchmarks/results/conversion_<machine>.json`

Writes a diffusers folder of the published configuration with random bfloat16 weights in shards of 5 GB, then runs
`python -m convert SRC DST --quantize nvfp4` in a process of its own and reads its peak resident memory from the
operating system; then loads the result twice, and times the second.
"""

import argparse
import dataclasses
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from benchmarks import record
from convert.components import MODELS, abstract_state
from convert.engine import dotted, slots_of
from convert.rules import published_shape
from sixbit_jax import checkpoint
from sixbit_jax.config import T5Config, TransformerConfig

CONFIGS = {
    "tiny": ("transformer", TransformerConfig(num_attention_heads=4, num_layers=2)),
    "2b": ("transformer", TransformerConfig.cogvideox_2b()),
    "5b": ("transformer", TransformerConfig.cogvideox_5b()),
    "t5-xxl": ("text_encoder", T5Config()),
}
SHARD_BYTES = 5 * 10**9
CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        published_gb, converted_gb: bytes on disk / 1e9.
        smaller: the one over the other.
        seconds: of the conversion, imports included.
        peak_gib: peak resident memory of that process.
        load_s: of the converted checkpoint to the default device, files in the page cache.
    """

    model: str
    published_gb: float
    converted_gb: float
    smaller: float
    seconds: float
    peak_gib: float
    load_s: float


def write_random(folder: Path, name: str, config: TransformerConfig | T5Config) -> None:
    """A published component with random weights, streamed to disk."""
    component, rng = MODELS[name], np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(CHUNK, np.float32)).astype(ml_dtypes.bfloat16).tobytes()
    tensors: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for path, leaf in dotted(abstract_state(component, config)).items():
        for slot in slots_of(path, tuple(leaf.shape), component.rules).values():
            shape = published_shape(slot.layout, slot.shape)
            nbytes = 2 * int(np.prod(shape))
            if tensors[-1] and filled + nbytes > SHARD_BYTES:
                tensors.append({})
                filled = 0
            tensors[-1][slot.key] = shape
            filled += nbytes
    (folder / name).mkdir(parents=True)
    values = config.to_dict()
    named = {"_class_name": component.class_name} if component.library == "diffusers" else {"model_type": "t5"}
    (folder / name / "config.json").write_text(json.dumps(named | values))
    weight_map = {}
    for number, shard in enumerate(tensors):
        file = f"{component.stem}-{number + 1:05d}-of-{len(tensors):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header, end = {}, 0
        for key, shape in shard.items():
            start, end = end, end + 2 * int(np.prod(shape))
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(folder / name / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            while end > 0:
                # From another place each time, so that layers differ.
                piece = noise[2 * int(rng.integers(CHUNK // 2)) :][:end]
                out.write(piece)
                end -= len(piece)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / name / f"{component.stem}.safetensors.index.json").write_text(json.dumps(index))


def measure(model: str, scratch: Path) -> Row:
    """Writes, converts and loads one model in `scratch`."""
    name, config = CONFIGS[model]
    source, destination = scratch / f"{model}-published", scratch / f"{model}-nvfp4"
    write_random(source, name, config)
    option = "--quantize" if name == "transformer" else "--quantize-text-encoder"
    command = [sys.executable, "-m", "convert", str(source), str(destination), option, "nvfp4", "--components", name]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    load_s = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        loaded = checkpoint.load(destination)
        jax.block_until_ready(jax.live_arrays())
        load_s = time.perf_counter() - start
        del loaded
    published, converted = (sum(f.stat().st_size for f in d.rglob("*") if f.is_file()) for d in (source, destination))
    return Row(
        model=model,
        published_gb=round(published / 1e9, 3),
        converted_gb=round(converted / 1e9, 3),
        smaller=round(published / converted, 3),
        seconds=round(seconds, 1),
        peak_gib=round(usage.ru_maxrss / 2**20, 2),
        load_s=round(load_s, 2),
    )


def table(rows: list[Row]) -> str:
    """A markdown table."""
    lines = ["| model | published | converted | smaller | conversion | peak memory | load |", "|" + "---|" * 7]
    lines += [
        f"| {r.model} | {r.published_gb:.2f} GB | {r.converted_gb:.2f} GB | {r.smaller:.2f}x | {r.seconds:.0f} s"
        f" | {r.peak_gib:.2f} GiB | {r.load_s:.1f} s |"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=["tiny"])
    parser.add_argument("--scratch", type=Path, help="where the folders are written (and removed); default: temporary")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    arguments = parser.parse_args(argv)
    rows = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            rows.append(measure(model, Path(scratch)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = {"processor": platform.machine(), "cores": os.cpu_count()}
    result = record.describe(program="benchmarks.conversion", argv=argv, rows=rows, machine=machine)
    record.save(arguments.out, result, table(rows))
    return rows


if __name__ == "__main__":
    main()
