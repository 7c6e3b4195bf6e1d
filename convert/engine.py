"""Applies a rule table: published tensors in, our parameters out, one parameter at a time; and backwards.

Nothing is read until the whole table has been checked against the headers, so that a bad checkpoint is reported
completely, and before any work is done.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from convert.errors import CheckpointError, ConversionError, Problem
from convert.rules import Rule, Shape, ours_shape, published_shape, to_ours, to_published

FLOATS = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16))


def checked_dtype(dtype: Any) -> np.dtype | None:
    """`dtype` as a NumPy dtype; None stays None.

    Raises:
        CheckpointError: if it is not float32, bfloat16 or float16.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in FLOATS:
        raise CheckpointError(f"dtype {dtype!r}: one of {', '.join(d.name for d in FLOATS)} is needed")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """The piece of a parameter that one published tensor fills.

    Attributes:
        key: the published name.
        layout: see `Rule`.
        index: position in the stacked axis; None for a parameter that is not stacked.
        part: `(j, n)`, see `Rule`; `(0, 1)` for all of the last axis.
        shape: of the piece, in our layout.
    """

    key: str
    layout: str
    index: int | None
    part: tuple[int, int]
    shape: Shape

    def of(self, array: np.ndarray) -> np.ndarray:
        """The view of the whole parameter that this slot is."""
        piece = array if self.index is None else array[self.index]
        j, n = self.part
        width = piece.shape[-1] // n if piece.ndim else 0
        return piece[..., j * width : (j + 1) * width] if n > 1 else piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One of our parameters, with the published tensors that make it up.

    Attributes:
        path: dotted.
        shape: of the whole, stacked and fused parameter.
        dtype: to be stored.
        slots: they cover it exactly.
    """

    path: str
    shape: Shape
    dtype: np.dtype
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is stored, by dotted path."""
        return {self.path: jax.ShapeDtypeStruct(self.shape, self.dtype)}

    @property
    def nbytes(self) -> int:
        """Bytes at `dtype`."""
        return self.size * self.dtype.itemsize


def flatten(tree: nnx.State | Mapping) -> dict[tuple[str | int, ...], Any]:
    """Nested dict (or NNX state) -> {path: leaf}."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    out: dict[tuple[str | int, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= {(name, *rest): leaf for rest, leaf in flatten(value).items()}
        else:
            out[(name,)] = value
    return out


def dotted(tree: nnx.State | Mapping) -> dict[str, Any]:
    """Nested dict (or NNX state) -> {dotted path: leaf}."""
    return {".".join(map(str, path)): leaf for path, leaf in flatten(tree).items()}


def nest(arrays: Mapping[str, Any], like: nnx.State | Mapping) -> dict:
    """{dotted path: leaf} -> nested dict with the keys of `like`."""
    out: dict = {}
    for path in flatten(like):
        *parents, name = path
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = arrays[".".join(map(str, path))]
    return out


def slots_of(path: str, shape: Shape, rules: Sequence[Rule]) -> dict[tuple[int | None, tuple[int, int]], Slot]:
    """The slots that `rules` give the parameter `path`, under the names that they are published by.

    Raises:
        ValueError: if the rules do not cover the parameter exactly once, which is a mistake in the table.
    """
    slots: dict[tuple[int | None, tuple[int, int]], Slot] = {}
    for at, rule in enumerate(rules):
        if rule.key_for(path) is None:
            continue
        part = rule.part or (0, 1)
        piece = shape[1:] if rule.index else shape
        if part[1] > 1:
            piece = (*piece[:-1], piece[-1] // part[1])
        for index in range(shape[0]) if rule.index else (None,):
            key = rule.key_for(path, index or 0)
            if (
                key is not None
                and (index, part) not in slots
                and not any(earlier.pattern.fullmatch(key) for earlier in rules[:at])
            ):
                slots[index, part] = Slot(key=key, layout=rule.layout, index=index, part=part, shape=piece)
    stacks, parts = {index is not None for index, _ in slots}, {part for _, part in slots}
    whole = {(j, n) for _, n in parts for j in range(n)}
    rows = shape[0] if True in stacks else 1
    uneven = bool(shape) and shape[-1] % max((n for _, n in parts), default=1) != 0
    if len(stacks) != 1 or parts != whole or len(slots) != rows * len(parts) or uneven:
        raise ValueError(f"the rules do not cover {path} {list(shape)} exactly once")
    return slots


def plan(
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    abstract: nnx.State | Mapping,
    *,
    dtype: Any = None,
    where: Callable[[str], str] = lambda key: "tensors",
) -> tuple[list[Target], list[Problem]]:
    """Checks published tensors against our parameters, both ways, by name and shape.

    Args:
        tensors: published key -> anything with `shape` and `dtype`.
        rules: the table; the first rule that matches a key applies.
        abstract: our parameters, as shapes.
        dtype: what to store; None keeps the published one (the widest, where parts of one parameter differ).
        where: names the file of a published key for error messages.

    Returns:
        The parameters in the order of `abstract`, and everything that is wrong.
    """
    wanted = {path: slots_of(path, tuple(leaf.shape), rules) for path, leaf in dotted(abstract).items()}
    filled: dict[str, dict] = {path: {} for path in wanted}
    problems = []
    for key, tensor in tensors.items():
        found = tuple(tensor.shape)
        unused = Problem(mark="+", where=where(key), key=key, found=found)
        rule, match = next(((r, m) for r in rules if (m := r.pattern.fullmatch(key))), (None, None))
        if rule is None or match is None:
            problems.append(unused)
            continue
        if not rule.target:
            continue
        path = match.expand(rule.target)
        place = (int(match[rule.index]) if rule.index else None, rule.part or (0, 1))
        slot = wanted.get(path, {}).get(place)
        if slot is None or place in filled[path]:
            problems.append(unused)
            continue
        filled[path][place] = dataclasses.replace(slot, key=key, layout=rule.layout)
        if ours_shape(rule.layout, found) != slot.shape:
            shape = published_shape(rule.layout, slot.shape)
            problems.append(Problem(mark="!", where=where(key), key=key, found=found, wanted=shape))
    targets = []
    for path, leaf in dotted(abstract).items():
        for place in wanted[path].keys() - filled[path].keys():
            slot = wanted[path][place]
            shape = published_shape(slot.layout, slot.shape)
            problems.append(Problem(mark="-", where=where(slot.key), key=slot.key, wanted=shape))
        slots = tuple(filled[path][place] for place in wanted[path] if place in filled[path])
        found_dtypes = {np.dtype(tensors[slot.key].dtype) for slot in slots}
        stored = np.dtype(dtype) if dtype is not None else _widest(found_dtypes)
        targets.append(Target(path=path, shape=tuple(leaf.shape), dtype=stored, slots=slots))
    return targets, problems


def _widest(dtypes: set[np.dtype]) -> np.dtype:
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _aligned_empty(target: Target) -> np.ndarray:
    """An array that starts on a 64-byte boundary, which JAX on a CPU takes over without a copy."""
    raw = np.empty(target.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + target.nbytes].view(target.dtype).reshape(target.shape)


def build(target: Target, tensors: Mapping[str, Any]) -> np.ndarray:
    """Reads one parameter, piece by piece, into one new array.

    Raises:
        ConversionError: if a finite value does not fit the dtype to be stored (float16 ends at 65504).
    """
    out = _aligned_empty(target)
    for slot in target.slots:
        source = np.asarray(tensors[slot.key])
        view = slot.of(out)
        with np.errstate(over="ignore"):
            view[...] = to_ours(slot.layout, source)
        narrower = target.dtype == np.float16 != source.dtype
        if narrower and (lost := np.isfinite(source).sum() - np.isfinite(view).sum()):
            problem = Problem(
                mark="!",
                where=target.path,
                key=slot.key,
                found=f"{lost} values beyond 65504",
                wanted="values that float16 can hold; use bfloat16 or float32",
            )
            raise ConversionError("cast", [problem])
    return out


def assemble(
    tensors: Mapping[str, Any], rules: Sequence[Rule], abstract: nnx.State | Mapping, dtype: Any = None
) -> dict:
    """Our parameters, from published tensors.

    Args:
        tensors: published key -> array, or anything with `shape`, `dtype` and `__array__`, read one at a time.
        rules: the table.
        abstract: our parameters, as an NNX state or nested dict of `jax.ShapeDtypeStruct`.
        dtype: of the result; None keeps the published one.

    Returns:
        Nested dict of NumPy arrays with the structure of `abstract`.

    Raises:
        ConversionError: lists every key that is unused, missing, or of a wrong shape.
    """
    targets, problems = plan(tensors, rules, abstract, dtype=dtype)
    if problems:
        raise ConversionError("tensors", problems)
    return nest({target.path: build(target, tensors) for target in targets}, abstract)


def to_diffusers(
    state: nnx.State | Mapping, rules: Sequence[Rule], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, np.ndarray]]:
    """The published tensors of a model, one at a time: `assemble` run backwards.

    Args:
        state: our parameters, as an NNX state or nested dict of arrays.
        rules: the table they came, or would have come, through.
        shapes: published shapes that our layout does not determine ("patch" from a convolution), by published key.

    Yields:
        Published key and array, in the dtype of the parameter.

    Raises:
        ValueError: if the rules do not cover a parameter exactly once.
    """
    for path, leaf in dotted(state).items():
        array = np.asarray(leaf)
        for slot in slots_of(path, array.shape, rules).values():
            piece = to_published(slot.layout, slot.of(array))
            yield slot.key, np.ascontiguousarray(piece).reshape(shapes.get(slot.key, piece.shape))
