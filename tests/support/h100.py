"""Lowering for an H100 on a machine without one."""

from collections.abc import Callable

import jax

DEVICE = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")


def lowered(function: Callable, *arguments) -> str:
    """The program of a function of arrays, or of their shapes, as it is given to the compiler for an H100."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=DEVICE)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
