"""What calibration found out about a model, the file it is kept in, and how a file is told to be of another model."""

import dataclasses
import functools
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import sixbit_jax
from convert.errors import CheckpointError
from pallas_kernels.common.formats import NVFP4Array
from pallas_kernels.common.xla import dequantize
from sixbit_jax.config import TransformerConfig
from sixbit_jax.errors import ArgumentError, CalibrationWarning
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES
from sixbit_jax.models.split import Split
from sixbit_jax.precision.measuring import LOW_BIT, Measured
from sixbit_jax.qtensor import QuantLinear
from sixbit_jax.video import check_writable, replacing

logger = logging.getLogger(__name__)
FORMAT = 1
"""Version of the file's format. Files of another one are refused."""
FILE_NAME = "calibration.safetensors"
"""In a model's folder, where `Pipeline.from_pretrained` looks."""
MARK = "sixbit_jax calibration"
SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 16
SAMPLE_TOLERANCE = 0.05
"""Relative L2 distance up to which weights count as the same. Codes may differ a little between devices and dtypes that
made them; scales by the other rule (`four_over_six`) put the mini model at 0.11, other weights at about 1.4."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """What tells one quantised model from another.

    Attributes:
        transformer: its configuration, as published.
        hadamard: site -> block of the rotation.
        weights: float16 [layers, sites, rows, columns], some of the stored weights, dequantised, spread over each.
    """

    transformer: Mapping[str, Any]
    hadamard: Mapping[str, int]
    weights: np.ndarray

    @classmethod
    def of(cls, transformer: Split[CogVideoXTransformer3DModel]) -> "Fingerprint":
        """Of a model with quantised linears.

        Raises:
            ArgumentError: if they are not.
        """
        model = transformer.merge()
        layers = {site: getattr(model.blocks, site) for site in SITES}
        if not all(isinstance(layer, QuantLinear) for layer in layers.values()):
            raise ArgumentError("the model's linears are not quantised: give a quantization to from_pretrained")
        return cls(
            transformer=model.config.to_dict(),
            hadamard={site: layer.hadamard for site, layer in layers.items()},
            weights=np.stack([_sampled(layer.weight) for layer in layers.values()], axis=1),
        )

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs between this model, which a file was made for, and another; empty if they are the same."""
        found = [
            f"{name} is {value!r} there and {other.transformer.get(name)!r} here"
            for name, value in self.transformer.items()
            if value != other.transformer.get(name)
        ]
        found += [
            f"the rotation of {site} is {size} there and {other.hadamard.get(site)} here"
            for site, size in self.hadamard.items()
            if size != other.hadamard.get(site)
        ]
        if not found:
            mine, theirs = self.weights.astype(np.float64), other.weights.astype(np.float64)
            same = mine.shape == theirs.shape
            distance = np.linalg.norm(mine - theirs) / np.linalg.norm(mine) if same else np.inf
            if not distance <= SAMPLE_TOLERANCE:
                found.append(f"the quantised weights differ by {distance:.0%} of their size")
        return found


def _sampled(weight: NVFP4Array) -> Float[np.ndarray, "layers rows columns"]:
    rows = np.linspace(0, weight.codes.shape[1] - 1, SAMPLED_ROWS).astype(int)
    few = NVFP4Array(
        codes=weight.codes[:, rows],
        scales=weight.scales[:, rows],
        tensor_scale=weight.tensor_scale[:, None],
        hadamard=weight.hadamard,
    )
    values = np.asarray(dequantize(few), np.float16)
    return values[..., np.linspace(0, values.shape[-1] - 1, SAMPLED_COLUMNS).astype(int)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OperatingPoints:
    """What real runs spent and reached, over a grid of skip levels and route levels; float64 [skips, routes].

    Attributes:
        error_threshold, skip_threshold: of the policy; without a delta cache where the latter is 0.
        mean_bits, skip_share: what runs of it spent, mean over the first prompts of the trace.
        psnr: of those runs against the 16-bit route, dB, mean over the prompts.
    """

    error_threshold: np.ndarray
    skip_threshold: np.ndarray
    mean_bits: np.ndarray
    skip_share: np.ndarray
    psnr: np.ndarray

    @classmethod
    def none(cls) -> "OperatingPoints":
        """Nothing was measured."""
        return cls(**{field.name: np.zeros((0, 0)) for field in dataclasses.fields(cls)})

    def between(self, resolution: int = 16) -> dict[str, np.ndarray]:
        """`mean_bits`, `skip_share` and `psnr` on a grid that many times as fine, bilinear between the points."""

        def finer(values: np.ndarray) -> np.ndarray:
            for axis, size in enumerate(values.shape):
                at = np.linspace(0, size - 1, (size - 1) * resolution + 1)
                values = np.apply_along_axis(lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, values)
            return values.ravel()

        return {name: finer(getattr(self, name)) for name in ("mean_bits", "skip_share", "psnr")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What is known of a model's runs.

    Attributes:
        alpha, beta: float32 [blocks, sites], of the predicted NVFP4 error alpha * G + beta (2).
        correlation: float32 [blocks, sites], Pearson's r of that error and the volatility one step before.
        site_correlation: float32 [sites], the same over all blocks together.
        trace: `Measured` in float16, [prompts, steps, blocks, ...].
        points: what real runs spent and reached.
        fingerprint: of the model.
        prompts: that were run.
        settings: of the runs: number of steps, guidance, seed, size, scheduler, dtype, of the operating points.
        version: of the package that measured.
        source: where it was read from, for messages.
    """

    alpha: np.ndarray
    beta: np.ndarray
    correlation: np.ndarray
    site_correlation: np.ndarray
    trace: Measured
    points: OperatingPoints
    fingerprint: Fingerprint
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]
    version: str = sixbit_jax.__version__
    source: str = "this calibration"

    @functools.cached_property
    def transformer_config(self) -> TransformerConfig:
        """Configuration of the model."""
        return TransformerConfig.from_dict(self.fingerprint.transformer)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; it appears only when it is complete.

        Raises:
            OSError: if it cannot be written.
        """
        arrays = {name: getattr(self, name) for name in ("alpha", "beta", "correlation", "site_correlation")}
        arrays |= {f"trace.{field.name}": getattr(self.trace, field.name) for field in dataclasses.fields(Measured)}
        arrays |= {f"points.{f.name}": getattr(self.points, f.name) for f in dataclasses.fields(OperatingPoints)}
        about = {
            "kind": MARK,
            "format": FORMAT,
            "version": self.version,
            "transformer": dict(self.fingerprint.transformer),
            "hadamard": dict(self.fingerprint.hadamard),
            "prompts": list(self.prompts),
            "settings": dict(self.settings),
        }
        arrays["weights"] = self.fingerprint.weights
        check_writable(path)
        with replacing(path) as partial:
            save_file(
                {name: np.ascontiguousarray(v) for name, v in arrays.items()}, partial, {"sixbit": json.dumps(about)}
            )
            partial.chmod(0o644)  # safetensors makes files that only their owner can read

    @classmethod
    def load(cls, path: str | Path, transformer: Split[CogVideoXTransformer3DModel] | None = None) -> "Calibration":
        """Reads a file.

        Args:
            path: the file.
            transformer: with quantised linears; the file must have been made for it. None does not check.

        Raises:
            CheckpointError: if there is none, it is no calibration, of another format version, or for another model:
                says what differs.
        """
        about, arrays = _read(Path(path))
        calibration = cls(
            **{name: arrays[name] for name in ("alpha", "beta", "correlation", "site_correlation")},
            trace=Measured(**{f.name: arrays[f"trace.{f.name}"] for f in dataclasses.fields(Measured)}),
            points=OperatingPoints(**{f.name: arrays[f"points.{f.name}"] for f in dataclasses.fields(OperatingPoints)}),
            fingerprint=Fingerprint(
                transformer=about["transformer"], hadamard=about["hadamard"], weights=arrays["weights"]
            ),
            prompts=tuple(about["prompts"]),
            settings=about["settings"],
            version=about["version"],
            source=str(path),
        )
        if transformer is not None:
            calibration.check(transformer)
        return calibration

    def check(self, transformer: Split[CogVideoXTransformer3DModel]) -> None:
        """Makes sure that it is of this model.

        Args:
            transformer: with quantised linears.

        Raises:
            CheckpointError: if not; says what differs.
        """
        if found := self.fingerprint.differences(Fingerprint.of(transformer)):
            raise CheckpointError(
                f"{self.source}: was made for another model: {'; '.join(found)}. Run `sixbit calibrate` for this one"
            )

    def warn_of_other_runs(self, scheduler: str, size: tuple[int, int, int], *, guided: bool) -> None:
        """Warns if a run differs from those that were measured.

        Args:
            scheduler: its class.
            size: frames, height and width, in pixels.
            guided: by the difference of two prompts.
        """
        measured = {
            "scheduler": self.settings["scheduler"]["_class_name"],
            "num_frames, height, width": tuple(self.settings[name] for name in ("num_frames", "height", "width")),
            "guided": self.settings["guidance_scale"] > 1,
        }
        here = {"scheduler": scheduler, "num_frames, height, width": size, "guided": guided}
        if found := [f"{name} {was}, not {here[name]}" for name, was in measured.items() if was != here[name]]:
            warnings.warn(
                f"{self.source}: was measured with {'; '.join(found)}: targets will be met roughly",
                CalibrationWarning,
                stacklevel=3,
            )

    def __str__(self) -> str:
        steps = self.trace.volatility.shape[1]
        error = np.asarray(self.trace.error, np.float64).mean((0, 1, 2))
        rows = [f"{len(self.prompts)} prompts, {steps} steps; relative error of each route, r of NVFP4's with G before"]
        rows += [
            f"  {site:9s} "
            + "  ".join(f"{route} {error[i, j]:.4f}" for j, route in enumerate(LOW_BIT))
            + f"  r {self.site_correlation[i]:+.2f}, by block {_signed(self.correlation[:, i])}"
            for i, site in enumerate(SITES)
        ]
        return "\n".join(rows)


def find(folder: Path, given: str | Path | Calibration | None, *, required: bool) -> Calibration | None:
    """The calibration given, else the one in the folder of a model, if there is one that can be read.

    Args:
        folder: the model's.
        given: a calibration or its file; None looks in the folder.
        required: not finding one is an error.

    Raises:
        CheckpointError: if one is required, and there is none that can be read.
    """
    if isinstance(given, Calibration):
        return given
    path = folder / FILE_NAME if given is None else given
    if not required and not Path(path).is_file():
        return None
    try:
        return Calibration.load(path)
    except CheckpointError as error:
        if required:
            raise
        logger.warning("not used: %s", error)
        return None


def _signed(values: np.ndarray) -> str:
    return " ".join(f"{value:+.2f}" for value in values)


ABOUT_TYPES = {"version": str, "transformer": dict, "hadamard": dict, "prompts": list, "settings": dict}
ARRAYS = (
    *("alpha", "beta", "correlation", "site_correlation", "weights"),
    *(f"trace.{field.name}" for field in dataclasses.fields(Measured)),
    *(f"points.{field.name}" for field in dataclasses.fields(OperatingPoints)),
)
"""What a file holds."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such calibration file; `sixbit calibrate` makes one")
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get("sixbit", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("kind") != MARK:
        raise CheckpointError(f"{path}: is not a calibration file")
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is a calibration of format {about.get('format')}, written by sixbit_jax {about.get('version')}; "
            f"sixbit_jax {sixbit_jax.__version__} reads format {FORMAT}. Run `sixbit calibrate` again"
        )
    wrong = [name for name, kind in ABOUT_TYPES.items() if not isinstance(about.get(name), kind)]
    wrong += [name for name in ARRAYS if name not in arrays]
    if wrong:
        raise CheckpointError(f"{path}: is damaged: {', '.join(wrong)} missing. Run `sixbit calibrate` again")
    return about, arrays


def fit(volatility: np.ndarray | jax.Array, error: np.ndarray | jax.Array) -> dict[str, np.ndarray]:
    """Least squares of the NVFP4 error at a step on the volatility one step before.

    Args:
        volatility: [prompts, steps, blocks].
        error: [prompts, steps, blocks, sites].

    Returns:
        The fields alpha, beta, correlation and site_correlation of `Calibration`. Where the volatility never changes,
        alpha and r are 0.

    Raises:
        ArgumentError: if there are fewer than two steps.
    """
    if volatility.shape[1] < 2:
        raise ArgumentError("a calibration needs at least 2 steps: the predictor looks one step back")
    x = np.asarray(volatility, np.float64)[:, :-1, :, None]
    y = np.asarray(error, np.float64)[:, 1:]

    def regression(axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dx, dy = x - x.mean(axes, keepdims=True), y - y.mean(axes, keepdims=True)
        products, squares = (dx * dy).mean(axes), (dx * dx).mean(axes)
        spread = np.sqrt(squares * (dy * dy).mean(axes))
        slope = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
        r = np.divide(products, spread, out=np.zeros_like(products), where=spread > 0)
        return slope, y.mean(axes) - slope * x.mean(axes), r

    alpha, beta, correlation = regression((0, 1))
    found = {"alpha": alpha, "beta": beta, "correlation": correlation, "site_correlation": regression((0, 1, 2))[2]}
    return {name: value.astype(np.float32) for name, value in found.items()}
