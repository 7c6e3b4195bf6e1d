"""What a user can get wrong. The commands show these in one line; anything else is a bug and keeps its traceback."""


class SixbitError(Exception):
    """Base of every error that describes the user's input or run, and not a mistake in this package."""


class ArgumentError(SixbitError, ValueError):
    """An argument that cannot be served. Its message names the argument, the value, and what is possible."""


class NonFiniteLatentsError(SixbitError, FloatingPointError):
    """Latents became NaN or Inf while sampling."""


class TruncatedPromptWarning(UserWarning):
    """A prompt has more tokens than the model takes."""
