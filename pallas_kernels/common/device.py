"""What the default device is and can do, and the switch that interprets kernels where there is no GPU."""

import contextlib
import contextvars
import re
from collections.abc import Iterator

import jax

_interpret = contextvars.ContextVar("pallas_kernels_interpret", default=False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Inside, Pallas kernels are interpreted, on any device: slow, and for tests.

    An operation reads the switch while it is traced, so a function that the caller jitted and ran before keeps what it
    was traced with.
    """
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreting() -> bool:
    """Whether `interpret` is on. A kernel's host function passes this to its jitted part as a static argument."""
    return _interpret.get()


def default_device() -> jax.Device:
    """The device that uncommitted arrays are put on, and that implementations are chosen for."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def kind() -> str:
    """Name of the default device, such as "NVIDIA H100 80GB HBM3" or "cpu"."""
    return default_device().device_kind


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the default device if it is an NVIDIA GPU, else None."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(default_device(), "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


def core_count() -> int:
    """Multiprocessors of the GPU that code is generated for: the abstract mesh's device, else the default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return default_device().core_count if abstract is None else abstract.num_cores


def refusal(*, at_least: tuple[int, int], below: tuple[int, int] | None = None) -> str | None:
    """Why the default device can't run a kernel for these compute capabilities; None if it can, or interprets it.

    Args:
        at_least: (major, minor) of the oldest NVIDIA GPUs that the kernel runs on.
        below: (major, minor) of the first that it does not run on any more; None if there are none.
    """
    capability = compute_capability()
    if interpreting() or (capability is not None and at_least <= capability and (below is None or capability < below)):
        return None
    wanted = "{}.{} or newer".format(*at_least) if below is None else "{}.{} to below {}.{}".format(*at_least, *below)
    found = "" if capability is None else ", compute capability {}.{}".format(*capability)
    return f"it needs an NVIDIA GPU of compute capability {wanted}; the default device is {kind()!r}{found}"
