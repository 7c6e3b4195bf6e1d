"""How one published tensor becomes part of one of our parameters: the vocabulary of the rule tables.

A table is a tuple of `Rule`, of which the first that matches a key applies. Every published key must be matched by some
rule, every slot of every parameter must be filled by exactly one key, and every rule can be run backwards, so that one
table serves reading and export.
"""

import dataclasses
import functools
import math
import re

import numpy as np

Shape = tuple[int, ...]

LAYOUTS = ("same", "linear", "conv", "patch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a table.

    Attributes:
        source: regular expression that must match the whole published key. Text outside named groups must be literal
            (dots escaped), and every named group must be used in `target` or be `index`: this is what makes a rule
            invertible. Rules with an empty target are free of both conditions.
        target: our dotted parameter path, expanded as `re.Match.expand` does it. Empty: the key is known, and
            deliberately unused.
        layout: what happens to the axes: "same"; "linear" ([out, in] -> [in, out]);
            "conv" ([O, I, *k] -> [*k, I, O]); "patch" ([O, C, p, p] -> [C*p*p, O], or [O, I] -> [I, O]).
        index: the group that holds the position in the leading, stacked axis of the parameter.
        part: `(j, n)`: the tensor is the j-th of n equal parts of the last axis (fused query, key, value).
    """

    source: str
    target: str
    layout: str = "same"
    index: str | None = None
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"rule {self.source!r}: layout {self.layout!r} is not one of {LAYOUTS}")
        if self.part is not None and not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"rule {self.source!r}: part {self.part} is not (j, n) with 0 <= j < n")
        groups = set(self.pattern.groupindex)
        if self.index is not None and self.index not in groups:
            raise ValueError(f"rule {self.source!r}: there is no group {self.index!r} to take the index from")
        if not self.target:
            return
        used = {*re.findall(r"\\g<(\w+)>", self.target), *filter(None, [self.index])}
        if used != groups:
            raise ValueError(f"rule {self.source!r}: groups {sorted(groups)}, of which the target uses {sorted(used)}")
        for text in _split(self.source)[0]:
            if re.search(r"(?<!\\)[][.^$*+?{}|()]|\\\w", text):
                raise ValueError(f"rule {self.source!r}: {text!r} is neither literal nor in a named group")

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """`source`, compiled."""
        return re.compile(self.source)

    @functools.cached_property
    def _inverse(self) -> re.Pattern[str]:
        groups = dict(_split(self.source)[1])
        literal, *rest = re.split(r"\\g<(\w+)>", self.target)
        out = re.escape(literal)
        for name, text in zip(rest[::2], rest[1::2], strict=True):
            seen = f"(?P<{name}>" in out
            out += (f"(?P={name})" if seen else f"(?P<{name}>{groups[name]})") + re.escape(text)
        return re.compile(out)

    def key_for(self, path: str, index: int = 0) -> str | None:
        """The published key that fills a parameter of ours, or None if this rule does not fill it.

        Args:
            path: dotted, of the parameter.
            index: position in its stacked axis.
        """
        if not self.target or not (match := self._inverse.fullmatch(path)):
            return None
        literals, groups = _split(self.source)
        values = [str(index) if name == self.index else match[name] for name, _ in groups]
        texts = [re.sub(r"\\(.)", r"\1", text) for text in literals]
        return "".join(text + value for text, value in zip(texts, [*values, ""], strict=True))


def _split(source: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits a pattern into the texts around its named groups, and the groups as (name, pattern)."""
    texts, groups, rest = [], [], source
    while match := re.search(r"\(\?P<(\w+)>", rest):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(rest[end], 0)
            end += 2 if rest[end] == "\\" else 1
        texts.append(rest[: match.start()])
        groups.append((match[1], rest[match.end() : end - 1]))
        rest = rest[end:]
    return [*texts, rest], groups


def ours_shape(layout: str, shape: Shape) -> Shape:
    """The shape of a published tensor after `to_ours`; the inverse of `published_shape`."""
    if layout == "same" or len(shape) < 2:
        return shape
    if layout == "patch":
        return (math.prod(shape[1:]), shape[0])
    return (*shape[2:], shape[1], shape[0])


def published_shape(layout: str, shape: Shape) -> Shape:
    """The shape of one of our (unstacked, unfused) tensors in the published layout; "patch" is given as [O, C*p*p]."""
    if layout == "same" or len(shape) < 2:
        return shape
    return (shape[-1], shape[-2], *shape[:-2])


def to_ours(layout: str, array: np.ndarray) -> np.ndarray:
    """A published tensor with its axes in our order, as a view wherever that is possible."""
    if layout == "same" or array.ndim < 2:
        return array
    if layout == "patch":
        return array.reshape(array.shape[0], -1).T
    return np.moveaxis(array, (1, 0), (-2, -1))


def to_published(layout: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`, except that "patch" comes back as [O, C*p*p]."""
    if layout == "same" or array.ndim < 2:
        return array
    return np.moveaxis(array, (-2, -1), (1, 0))
