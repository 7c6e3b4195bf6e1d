"""Published checkpoints to ours: rule tables, the engine that applies them, and the command."""

from convert.command import convert

__all__ = ["convert"]
