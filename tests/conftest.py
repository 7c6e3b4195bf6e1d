"""Strict mode for every test: no implicit dtype promotion, full-precision float32 products."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_jax():
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose programs are tiny, and neither timed nor compared with references: compile, not optimise."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
