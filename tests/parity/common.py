"""Shared by both sides of the parity tests: NumPy only, so that it imports where torch lives and where JAX lives.

Reference weights and inputs are never stored. Both sides fill them from their names with the same generator, so the
committed files hold only the list of weights (diffusers key -> shape) and the reference outputs.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

COMMITTED = Path(__file__).parent / "references"
REFERENCES = Path(os.environ.get("SIXBIT_REFERENCES", COMMITTED))
MINI_MODEL = Path(__file__).parents[2] / "sixbit_jax" / "assets" / "moving_mnist"


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 values that depend on `name` and `shape` alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 weight for a diffusers or transformers key, scaled so that activations keep their size."""
    x = values(key, shape)
    if len(shape) >= 2:
        return x / np.float32(np.sqrt(np.prod(shape[1:])))
    return (1 + x / 10 if key.endswith("weight") else x / 10).astype(np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {key: weight(key, tuple(shape)) for key, shape in shapes.items()}


def moving_square(frames: int, size: int) -> np.ndarray:
    """A clip [1, frames, size, size, 3] in [-1, 1]: an orange square that crosses a black frame, with soft edges."""
    axis, t = np.arange(size), np.linspace(0, 1, frames)[:, None]
    along, across = (np.clip(size / 8 + 1 - abs(axis - size * path), 0, 1) for path in (0.2 + 0.6 * t, 0.7 - 0.3 * t))
    mask = across[:, :, None, None] * along[:, None, :, None]
    return (2 * mask * np.array([1, 0.5, 0.1]) - 1).astype(np.float32)[None]


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every configuration and weight file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    files = [path for path in files if path.name != "calibration.safetensors"]  # ours; no original reads it
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def save(case: str, *, config: dict, shapes: Mapping[str, tuple[int, ...]], **outputs: np.ndarray) -> None:
    """Writes one reference: `<case>.json` (configuration and weight shapes) and `<case>.npz` (outputs)."""
    REFERENCES.mkdir(parents=True, exist_ok=True)
    header = {"config": config, "shapes": {k: list(v) for k, v in shapes.items()}}
    (REFERENCES / f"{case}.json").write_text(json.dumps(header, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(REFERENCES / f"{case}.npz", **outputs)


def load(case: str) -> tuple[dict, dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """-> (configuration, weight shapes by key, outputs by name)."""
    header = json.loads((REFERENCES / f"{case}.json").read_text())
    with np.load(REFERENCES / f"{case}.npz") as outputs:
        return header["config"], {k: tuple(v) for k, v in header["shapes"].items()}, dict(outputs)


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """||found - wanted|| / ||wanted|| in float64; NaN never passes a comparison with a bound."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise ValueError(f"shapes differ: {found.shape} and {wanted.shape}")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
