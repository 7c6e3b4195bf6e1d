"""Strict mode for every test: no implicit dtype promotion, full-precision float32 products."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_jax():
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        yield
