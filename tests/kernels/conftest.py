"""Interpreted kernels take seconds a case: `make test` runs one in 32 of their cases, `make test-slow` all."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
EVERY = 32


def pytest_collection_modifyitems(items):
    interpreted = [item for item in items if item.path.parent == HERE and "pallas_" in item.name]
    for number, item in enumerate(interpreted):
        if number % EVERY:
            item.add_marker(pytest.mark.slow)
