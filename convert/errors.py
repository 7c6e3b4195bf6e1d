"""What can be wrong with a checkpoint folder."""

import dataclasses
from collections.abc import Sequence

from convert.rules import Shape
from sixbit_jax.errors import SixbitError


class CheckpointError(SixbitError, ValueError):
    """A folder that is not the checkpoint it was taken for, or a place that cannot be written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a published folder.

    Attributes:
        mark: "-" a tensor is missing, "+" a tensor is not used, "!" a tensor has the wrong shape or dtype,
            "x" a file cannot be used.
        where: the component and file, relative to the folder.
        key: the published tensor name; None for a problem with the file itself.
        found: what is there, if anything.
        wanted: what should be.
    """

    mark: str
    where: str
    key: str | None = None
    found: str | Shape | None = None
    wanted: str | Shape | None = None

    def __str__(self) -> str:
        kind = {"-": "missing   ", "+": "unexpected", "!": "wrong     ", "x": "unreadable"}[self.mark]
        values = [
            f"{name} {_shown(x)}" for name, x in (("found", self.found), ("wanted", self.wanted)) if x is not None
        ]
        subject = self.where if self.key is None else f"{self.key} ({self.where})"
        return f"{self.mark} {kind} {subject}" + (f": {', '.join(values)}" if values else "")


def _shown(value: str | Shape) -> str:
    return value if isinstance(value, str) else str(list(value))


class ConversionError(CheckpointError):
    """A published folder that does not hold exactly the tensors that its configuration asks for.

    Attributes:
        problems: all of them, not only the first.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: ("x!-+".index(p.mark), p.where, p.key or "")))
        count = f"{len(problems)} problem" + "s" * (len(problems) != 1)
        super().__init__("\n  ".join([f"{source}: {count}; nothing was converted", *map(str, self.problems)]))
