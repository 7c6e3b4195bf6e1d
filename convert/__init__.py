"""Published checkpoints to ours: rule tables, the engine that applies them, and the command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.command import convert

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    """Loads the engine when it is first asked for, so that a command can say what it takes without loading JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from convert.command import convert

    return convert
