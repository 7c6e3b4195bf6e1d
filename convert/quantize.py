"""Linear layers quantised while they are converted: one layer of one parameter in memory at a time."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.engine import Target, build
from convert.errors import CheckpointError
from pallas_kernels.common.formats import BLOCK
from sixbit_jax.qtensor import (
    TEXT_ENCODER_RULES,
    TRANSFORMER_RULES,
    QuantLinear,
    check_rounded,
    quantize_weight,
    quantized_paths,
    replace_linears,
)

RULES = {"transformer": TRANSFORMER_RULES, "text_encoder": TEXT_ENCODER_RULES}
"""Models that can be quantised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTarget:
    """The kernel of a linear layer, to be stored as the three arrays of a `QuantLinear`.

    Attributes:
        dense: the kernel [layers, in, out] or [in, out], as it was planned.
        hadamard: block of the rotation, 0 for none.
        four_over_six: see `rotate_quantize`.
    """

    dense: Target
    hadamard: int
    four_over_six: bool

    @property
    def path(self) -> str:
        """Dotted, of the layer."""
        return self.dense.path.removesuffix(".kernel")

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.dense.size

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is stored, by dotted path."""
        *layers, size, out = self.dense.shape
        return {
            f"{self.path}.codes": jax.ShapeDtypeStruct((*layers, out, size // 2), np.uint8),
            f"{self.path}.scales": jax.ShapeDtypeStruct((*layers, out, size // BLOCK), np.uint8),
            f"{self.path}.tensor_scale": jax.ShapeDtypeStruct(tuple(layers), np.float32),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of `arrays`."""
        return sum(array.size * array.dtype.itemsize for array in self.arrays.values())


def quantize_targets(
    name: str, module: nnx.Module, targets: Sequence[Target], *, hadamard: int | None, four_over_six: bool
) -> tuple[list[Target | QuantizedTarget], dict[str, Any]]:
    """Marks the kernels to quantise.

    Args:
        name: of the model.
        module: its shapes.
        targets: its parameters.
        hadamard: None for the largest block that fits each layer.
        four_over_six: see `rotate_quantize`.

    Returns:
        The targets, and the model's "quantized" entry in the manifest.

    Raises:
        CheckpointError: if the model can't be quantised, or a layer's size does not divide into blocks.
    """
    if name not in RULES:
        raise CheckpointError(f"{name} can't be quantised; {', '.join(RULES)} can")
    try:
        paths = quantized_paths(module, RULES[name])
        replace_linears(module, paths, hadamard=hadamard, four_over_six=four_over_six)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    blocks = {f"{path}.kernel": layer.hadamard for path in paths if (layer := _at(module, path))}
    marked = [
        QuantizedTarget(dense=target, hadamard=blocks[target.path], four_over_six=four_over_six)
        if target.path in blocks
        else target
        for target in targets
    ]
    return marked, {"format": "nvfp4", "hadamard": hadamard, "four_over_six": four_over_six, "linears": paths}


def build_arrays(
    target: Target | QuantizedTarget,
    tensors: Mapping[str, Any],
    progress: Callable[[int], Any] = lambda nbytes: None,
    moments: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Reads, and quantises, what is stored for one parameter, by dotted path.

    Args:
        target: the parameter.
        tensors: by published key.
        moments: of the inputs of stacked linears, to round these for them; as in `quantize_model`.
        progress: is called with the number of bytes that have been made since the last call.

    Raises:
        ConversionError: as `engine.build`.
    """
    if isinstance(target, Target):
        array = build(target, tensors)
        progress(target.nbytes)
        return {target.path: array}
    dense = target.dense
    out = {path: np.empty(array.shape, array.dtype) for path, array in target.arrays.items()}
    stacked = len(dense.shape) == 3
    for layer in range(dense.shape[0]) if stacked else [None]:
        slots = tuple(dataclasses.replace(slot, index=None) for slot in dense.slots if slot.index == layer)
        kernel = build(dataclasses.replace(dense, shape=dense.shape[-2:], slots=slots), tensors)
        moment = moments.get(target.path)
        weight = quantize_weight(
            jnp.asarray(kernel.T),
            hadamard=target.hadamard,
            four_over_six=target.four_over_six,
            moment=moment if moment is None or layer is None else moment[layer],
        )
        if moment is not None:
            check_rounded(weight)
        for path, array in out.items():
            array[... if layer is None else layer] = getattr(weight, path.rpartition(".")[2])
        progress(target.nbytes // (dense.shape[0] if stacked else 1))
    return out


def with_quantized_linears(module: nnx.Module, entry: Mapping[str, Any] | None) -> nnx.Module:
    """A module of shapes, with the layers replaced that a manifest's "quantized" entry names.

    Raises:
        ValueError: if the entry does not fit the module.
    """
    if entry is None:
        return module
    if entry.get("format") != "nvfp4":
        raise ValueError(f"weights quantised to {entry.get('format')!r}; this program reads 'nvfp4'")
    return replace_linears(module, entry["linears"], hadamard=entry["hadamard"], four_over_six=entry["four_over_six"])


def _at(module: nnx.Module, path: str) -> QuantLinear:
    return operator.attrgetter(path)(module)
