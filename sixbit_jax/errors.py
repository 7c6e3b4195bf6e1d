"""What a user can get wrong. The commands show these in one line; anything else is a bug and keeps its traceback."""


class SixbitError(Exception):
    """Base of every error that describes the user's input or run, and not a mistake in this package."""


class ArgumentError(SixbitError, ValueError):
    """An argument that cannot be served. Its message names the argument, the value, and what is possible."""


class NonFiniteLatentsError(SixbitError, FloatingPointError):
    """Latents became NaN or Inf while sampling."""


class SixbitWarning(UserWarning):
    """Base of what is worth knowing about a run that goes on. The commands show these in one line."""


class TruncatedPromptWarning(SixbitWarning):
    """A prompt has more tokens than the model takes."""


class CalibrationWarning(SixbitWarning):
    """A run's settings are not those that its calibration was measured with, so targets are met roughly."""
