"""NVFP4 weights under published names into and out of a model of ours, whose layers are stacked and fused.

`convert.interchange` reads and writes the files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.engine import Slot, assemble, dotted, nest, slots_of, to_diffusers
from convert.errors import ConversionError, Problem
from convert.interchange import CONVENTIONS
from convert.rules import Rule, Shape
from pallas_kernels.common.formats import NVFP4Array
from sixbit_jax.qtensor import QuantLinear


def published(
    module: nnx.Module, rules: Sequence[Rule], shapes: Mapping[str, Shape] | None = None
) -> tuple[dict[str, NVFP4Array], dict[str, np.ndarray]]:
    """A model of ours as `write` takes it: stacked layers and fused query, key and value taken apart.

    Args:
        module: with `QuantLinear` layers.
        rules: the table between our names and the published ones, as `convert.rules_transformer.RULES`.
        shapes: as in `convert.engine.to_diffusers`.

    Returns:
        The weights of its `QuantLinear` layers by published name, and every other parameter by published name.
    """
    layers = {path: layer for path, layer in _layers(module).items() if isinstance(layer, QuantLinear)}
    arrays = {}
    for path, layer in layers.items():
        weight = jax.tree.map(np.asarray, layer.weight)
        for slot in _slots(path, layer, rules):
            arrays[slot.key.removesuffix(".weight")] = _piece(weight, slot)
    return arrays, dict(to_diffusers(_rest(module), rules, shapes or {}))


def load_into(
    module: nnx.Module,
    arrays: Mapping[str, NVFP4Array],
    rules: Sequence[Rule],
    others: Mapping[str, np.ndarray] | None = None,
) -> nnx.Module:
    """Puts NVFP4 weights with published names into a model of ours, in place: the inverse of `published`.

    Linear layers that `arrays` names become `QuantLinear`, whatever they were; all others stay what they are. Where
    layers of different tensor scales make up one of ours (query, key and value), it gets one tensor scale a row.

    Args:
        module: any module of ours, its linears quantised or not.
        arrays: as `read` returns them.
        rules: as in `published`.
        others: as `read` returns them, to fill every other parameter, in the dtype of that parameter; scales of
            activations are passed over. None leaves those parameters alone.

    Returns:
        The same module.

    Raises:
        ConversionError: lists every weight that is missing of a layer of which another is there, not used, or of a
            wrong shape; or the same of `others`. The module is then as it was.
    """
    problems, weights, used = [], {}, set()
    for path, layer in _layers(module).items():
        slots = [slot for slot in _slots(path, layer, rules) if slot.layout == "linear"]
        named = {slot.key.removesuffix(".weight"): slot for slot in slots}
        if not (held := named.keys() & arrays.keys()):
            continue
        used |= held
        wrong = []
        for name, slot in named.items():
            shape = (slot.shape[1], slot.shape[0])
            if name not in held:
                wrong.append(Problem(mark="-", where=path, key=name, wanted=shape))
            elif arrays[name].shape != shape:
                wrong.append(Problem(mark="!", where=path, key=name, found=arrays[name].shape, wanted=shape))
        problems += wrong
        if not wrong:
            weights[path] = _assembled(arrays, named)
    problems += [Problem(mark="+", where="arrays", key=name, found=arrays[name].shape) for name in arrays.keys() - used]
    if problems:
        raise ConversionError("load_into", problems)
    filled = {}
    if others is not None:
        unused = tuple(convention.activation for convention in CONVENTIONS.values())
        kept = {key: value for key, value in others.items() if key.rpartition(".")[2] not in unused}
        rest = {path: leaf for path, leaf in _rest(module).items() if path.removesuffix(".kernel") not in weights}
        filled = {path: jnp.asarray(x, rest[path].dtype) for path, x in assemble(kept, rules, rest).items()}
    for path, weight in weights.items():
        parent, _, name = path.rpartition(".")
        layer = getattr(owner := _at(module, parent), name)
        bias = None if layer.bias is None else layer.bias.get_value()
        dtype = layer.dtype or layer.kernel.get_value().dtype
        setattr(owner, name, QuantLinear(jax.tree.map(jnp.asarray, weight), bias, dtype=dtype))
    state = nnx.state(module)
    nnx.replace_by_pure_dict(state, nest(dotted(state) | filled, state))
    nnx.update(module, state)
    return module


def _at(module: nnx.Module, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def _layers(module: nnx.Module) -> dict[str, nnx.Linear | QuantLinear]:
    """Dotted path -> layer."""
    return {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, nnx.Linear | QuantLinear)
    }


def _rest(module: nnx.Module) -> dict[str, Any]:
    """Every parameter that is not part of an NVFP4 weight, by dotted path."""
    quantized = {path for path, layer in _layers(module).items() if isinstance(layer, QuantLinear)}
    parts = tuple(field.name for field in dataclasses.fields(NVFP4Array))
    return {
        path: leaf
        for path, leaf in dotted(nnx.state(module)).items()
        if path.rpartition(".")[0] not in quantized or path.rpartition(".")[2] not in parts
    }


def _slots(path: str, layer: nnx.Linear | QuantLinear, rules: Sequence[Rule]) -> list[Slot]:
    """The published weights that make up a layer; their shapes are [K, N]."""
    if isinstance(layer, QuantLinear):
        *layers, out, half = layer.codes.get_value().shape  # may be a shape alone
        shape = (*layers, 2 * half, out)
    else:
        shape = layer.kernel.get_value().shape
    return list(slots_of(f"{path}.kernel", shape, rules).values())


def _piece(weight: NVFP4Array, slot: Slot) -> NVFP4Array:
    """The part of a weight [N, K] or [layers, N, K] that one published weight is."""
    layer = ... if slot.index is None else slot.index
    codes, scales, scale = (field[layer] for field in (weight.codes, weight.scales, weight.tensor_scale))
    j, n = slot.part
    rows = slice(j * (len(codes) // n), (j + 1) * (len(codes) // n))
    if scale.ndim and (scale[rows] == scale[rows][0]).all():
        scale = scale[rows][0]
    elif scale.ndim:
        scale = scale[rows]
    return NVFP4Array(codes=codes[rows], scales=scales[rows], tensor_scale=np.asarray(scale), hadamard=weight.hadamard)


def _assembled(arrays: Mapping[str, NVFP4Array], slots: Mapping[str, Slot]) -> NVFP4Array:
    """The inverse of `_piece`, from all pieces."""
    layers: dict[int | None, list[NVFP4Array]] = {}
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].index or 0, item[1].part)):
        layers.setdefault(slot.index, []).append(arrays[name])
    apart = any(len({float(piece.tensor_scale) for piece in pieces}) > 1 for pieces in layers.values())

    def scale(pieces: list[NVFP4Array]) -> np.ndarray:
        rows = np.concatenate([np.broadcast_to(piece.tensor_scale, len(piece.codes)) for piece in pieces])
        return rows if apart else np.asarray(rows[0])

    fused = [
        NVFP4Array(
            codes=np.concatenate([piece.codes for piece in pieces]),
            scales=np.concatenate([piece.scales for piece in pieces]),
            tensor_scale=scale(pieces),
        )
        for pieces in layers.values()
    ]
    return fused[0] if None in layers else jax.tree.map(lambda *x: np.stack(x), *fused)
