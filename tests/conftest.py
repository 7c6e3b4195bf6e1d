"""Strict mode for every test: no implicit dtype promotion, full-precision float32 products."""

import signal

import jax
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is where the tests run as a shell's background job, and would be in the processes they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def strict_jax():
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose programs are tiny, and neither timed nor compared with references: compile, not optimise.

    JAX keeps programs without regard to this setting, and other modules compare bits of programs with each other.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
