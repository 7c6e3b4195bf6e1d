"""Text-to-video diffusion transformers in JAX: converted checkpoints, one compiled sampling program."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sixbit_jax.pipeline import NonFiniteLatentsError, Pipeline, PipelineOutput

__version__ = "0.1.0"

__all__ = ["NonFiniteLatentsError", "Pipeline", "PipelineOutput"]


def __getattr__(name: str) -> Any:
    """Loads the pipeline when it is first asked for, so that importing a configuration does not load the models."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sixbit_jax import pipeline

    return getattr(pipeline, name)
