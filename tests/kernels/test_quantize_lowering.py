"""The quantising kernels lower for an H100 on a machine without one, also with an older GPU's instructions alone."""

import functools

import jax
import jax.numpy as jnp
import pytest
from h100 import lowered

from pallas_kernels.adaln_quantize import pallas_mosaic_gpu as mosaic_adaln
from pallas_kernels.adaln_quantize import pallas_triton as adaln
from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common.quantize_tile import Instructions
from pallas_kernels.rotate_quantize import pallas_mosaic_gpu as mosaic_rotation
from pallas_kernels.rotate_quantize import pallas_triton as rotation
from pallas_kernels.rotate_quantize.pallas_triton import Output

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
CAPABILITIES = [(9, 0), (8, 0)]
TARGETS = {
    "int8": {"format": "int8", "carrier": None},
    "nvfp4": {"format": "nvfp4", "carrier": None},
    "exact": {"format": "nvfp4", "carrier": "exact"},
    "fp8": {"format": "nvfp4", "carrier": "fp8"},
}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_rotate_quantize(capability, target):
    options = TARGETS[target]
    call = functools.partial(
        rotation._rotate_quantize,
        tensor_scale=None,
        **options,
        hadamard=128,
        scale_dims=1 if options["format"] == "nvfp4" else 0,
        four_over_six=False,
        config=rotation.heuristic(k=1920, hadamard=128, target=target),
        instructions=Instructions.of(capability),
        interpret=False,
    )
    text = lowered(call, jax.ShapeDtypeStruct((35_552, 1920), jnp.bfloat16))
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("target", ["int8", "exact", "fp8"])
@pytest.mark.parametrize("size", [1920, 3072, 12288])
def test_rotate_quantize_by_mosaic(size, target):
    call = functools.partial(mosaic_rotation.rotate_quantize, **TARGETS[target], hadamard=128)
    assert lowered(call, jax.ShapeDtypeStruct((35_552, size), jnp.bfloat16)).count("@mosaic_gpu") == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("hadamard", [0, 128])
def test_rotate_quantize_with_one_scale_takes_two_kernels(dtype, hadamard):
    """Also where rows and columns leave a tile incomplete, and for the inputs that the other tests don't have."""
    call = functools.partial(
        rotation._rotate_quantize,
        tensor_scale=None,
        format="nvfp4",
        carrier=None,
        hadamard=hadamard,
        scale_dims=0,
        four_over_six=True,
        config=rotation.heuristic(k=640, hadamard=hadamard, target="nvfp4"),
        instructions=Instructions.of((9, 0)),
        interpret=False,
    )
    assert lowered(call, jax.ShapeDtypeStruct((7, 640), dtype)).count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_adaln_quantize(capability, target):
    call = functools.partial(
        adaln._adaln_quantize,
        output=Output(**TARGETS[target], hadamard=128, four_over_six=False),
        config=adaln.heuristic(k=1920, hadamard=128, target=target),
        instructions=Instructions.of(capability),
        interpret=False,
    )
    text = lowered(call, *adaln_operands(1920))
    assert text.count("__gpu$xla.gpu.triton") == 1


def adaln_operands(dim):
    """(x, norm) of CogVideoX."""
    x, vector, modulation = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 17_776, dim), (dim,), (2, 2, dim))
    )
    norm = AdaptiveNorm(
        norm_scale=vector, norm_bias=vector, shift=modulation, scale=modulation, text_length=226, epsilon=1e-5
    )
    return x, norm


@pytest.mark.parametrize("target", ["int8", "exact", "fp8"])
@pytest.mark.parametrize("dim", [1920, 3072])
def test_adaln_quantize_by_mosaic(dim, target):
    call = functools.partial(mosaic_adaln.adaln_quantize, **TARGETS[target], hadamard=128)
    assert lowered(call, *adaln_operands(dim)).count("@mosaic_gpu") == 1
