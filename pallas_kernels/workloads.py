"""The operations that quantise and multiply, on real shapes with random operands: what is tuned, timed and, on a GPU,
tested.

`attention`, `norm_rotary` and `delta_cache` are not among them: `benchmarks.attention` times the first by itself, and
`benchmarks.blocks` all three inside a block.
"""

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.adaln_quantize import shapes as adaln_shapes
from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import BLOCK, CARRIERS, CarriedArray, Int8Array, NVFP4Array, hadamard_block
from pallas_kernels.common.xla import dequantize
from pallas_kernels.nvfp4_cast import reference as cast_reference
from pallas_kernels.nvfp4_cast import shapes as cast_shapes
from pallas_kernels.rotate_quantize import shapes as rotate_shapes
from pallas_kernels.scaled_matmul import shapes as matmul_shapes
from pallas_kernels.weight_only_matmul import shapes as weight_only_shapes

FUNCTIONS = {
    "rotate_quantize": "rotate_quantize",
    "adaln_quantize": "adaln_quantize",
    "nvfp4_cast": "cast",
    "scaled_matmul": "scaled_matmul",
    "weight_only_matmul": "weight_only_matmul",
}
"""Operation (the name of its folder) -> the function of that operation in the module of each implementation."""
BYTES = {"int8": 1.0, "nvfp4": 0.5 + 1 / BLOCK, "exact": 2.0, "fp8": 1.0, "bfloat16": 2.0}
"""Of a value in each type that an operation reads or writes."""
COLD_BYTES = 150e6
"""More than a cache holds."""
_TARGETS = {
    "int8": {"format": "int8"},
    "nvfp4": {"format": "nvfp4"},
    "fp8": {"format": "nvfp4", "carrier": "fp8"},
    "exact": {"format": "nvfp4", "carrier": "exact"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One operation on one shape.

    Attributes:
        operation: a key of `FUNCTIONS`.
        name: of the shape.
        target: type of the result, or of the operands of a matmul.
        make: operands, a tuple of trees of arrays, from a key.
        arguments: operands -> (args, kwargs) of the function of an implementation.
        sizes: whatever the heuristics of the implementations ask for, and what else tells shapes apart.
        bytes: read and written, each operand and result once.
        operations: multiplications and additions of a matmul; 0 where memory is the limit.
        tolerance: largest relative L2 error against the `xla` implementation, of dequantised results.
    """

    operation: str
    name: str
    target: str
    make: Callable[[Array], tuple]
    arguments: Callable[..., tuple[tuple, dict]]
    sizes: Mapping[str, Any]
    bytes: float
    operations: float = 0.0
    tolerance: float

    def module(self, implementation: str) -> ModuleType:
        """The module of an implementation."""
        return importlib.import_module(f"pallas_kernels.{self.operation}.{implementation}")

    def function(self, implementation: str, **options) -> Callable:
        """The operation as a function of the operands of `make`; `options` are of that implementation, as `config`."""
        run = getattr(self.module(implementation), FUNCTIONS[self.operation])

        def call(*operands):
            args, kwargs = self.arguments(*operands)
            return run(*args, **kwargs, **options)

        return call

    def refusal(self, implementation: str) -> str | None:
        """Why an implementation can't do this on the default device, if so."""
        if implementation == "xla":
            return None
        reasons = []

        def ask(key):
            args, kwargs = self.arguments(*self.make(key))
            reasons.append(self.module(implementation).refusal(*args, **kwargs))

        jax.eval_shape(ask, jax.random.key(0))
        return reasons[0]

    def case(self, implementation: str) -> dict:
        """What the implementation's `heuristic` and `candidates` take."""
        wanted = inspect.signature(self.module(implementation).heuristic).parameters.values()
        return {each.name: self.sizes[each.name] for each in wanted if each.default is each.empty}

    @property
    def estimate_ms(self) -> float:
        """About the least that a call takes on a large GPU."""
        return estimate_ms(self.bytes, self.operations)


def estimate_ms(bytes: float, operations: float) -> float:
    """About the least time on a large GPU of what moves so many bytes and does so many multiplications and sums."""
    return max(bytes / 3e9, operations / 1e12, 2e-3)


def operand_sets(make: Callable[[Array], tuple], bytes: float) -> list[tuple]:
    """Operands of different keys, so many that together they are more than a cache holds.

    Args:
        make: operands from a key.
        bytes: that a call moves.
    """
    return [jax.jit(make)(key) for key in jax.random.split(jax.random.key(0), count_sets(bytes))]


def count_sets(bytes: float) -> int:
    """How many sets `operand_sets` makes."""
    return max(1, min(16, math.ceil(COLD_BYTES / bytes)))


def implementations(operation: str) -> list[str]:
    """Names of the implementations of an operation, in order of preference."""
    return list(importlib.import_module(f"pallas_kernels.{operation}.api").IMPLEMENTATIONS)


def everything(*, tiny: bool = False) -> Iterator[Workload]:
    """All workloads, on the shapes of the models; or a few on shapes for a CPU."""
    for shape in rotate_shapes.SMALL[1:2] if tiny else rotate_shapes.FULL:
        for target in _TARGETS:
            yield rotate_quantize(shape, target)
    for shape in adaln_shapes.SMALL[1:2] if tiny else adaln_shapes.FULL:
        for target in _TARGETS:
            yield adaln_quantize(shape, target)
    for shape in cast_shapes.SMALL[1:2] if tiny else cast_shapes.FULL:
        for target in cast_reference.TARGETS:
            yield nvfp4_cast(shape, target)
    for shape in matmul_shapes.SMALL[:2] if tiny else matmul_shapes.FULL:
        for target in ("int8", *CARRIERS):
            yield scaled_matmul(shape, target)
    for shape in weight_only_shapes.SMALL[1:2] if tiny else weight_only_shapes.FULL:
        yield weight_only_matmul(shape)


def rotate_quantize(shape: rotate_shapes.Shape, target: str) -> Workload:
    """x [rows, K] in bfloat16, quantised row by row."""
    hadamard = hadamard_block(shape.size)
    per_row = {} if target == "int8" else {"scale_dims": 1}
    return Workload(
        operation="rotate_quantize",
        name=f"{shape.name} {shape.rows}x{shape.size}",
        target=target,
        make=lambda key: (normal(key, shape.rows, shape.size),),
        arguments=lambda x: ((x,), {**_TARGETS[target], **per_row, "hadamard": hadamard}),
        sizes={"rows": shape.rows, "k": shape.size, "hadamard": hadamard, "target": target},
        bytes=shape.rows * shape.size * (2 + BYTES[target]),
        tolerance=0.01,
    )


def adaln_quantize(shape: adaln_shapes.Shape, target: str) -> Workload:
    """x [batch, tokens, dim] in bfloat16, normalised, modulated and quantised."""
    hadamard = hadamard_block(shape.dim)
    rows = shape.batch * shape.tokens

    def make(key):
        keys = jax.random.split(key, 5)
        vectors = [normal(k, shape.dim) for k in keys[1:3]]
        return (
            normal(keys[0], shape.batch, shape.tokens, shape.dim),
            *vectors,
            *(normal(k, shape.batch, 2, shape.dim) for k in keys[3:]),
        )

    def arguments(x, norm_scale, norm_bias, shift, scale):
        vectors = {"norm_scale": norm_scale, "norm_bias": norm_bias, "shift": shift, "scale": scale}
        norm = AdaptiveNorm(**vectors, text_length=shape.text_length, epsilon=1e-5)
        return (x, norm), {"hadamard": hadamard, **_TARGETS[target]}

    return Workload(
        operation="adaln_quantize",
        name=f"{shape.name} {rows}x{shape.dim}",
        target=target,
        make=make,
        arguments=arguments,
        sizes={"rows": rows, "k": shape.dim, "hadamard": hadamard, "target": target},
        bytes=rows * shape.dim * (2 + BYTES[target]),
        tolerance=0.01,
    )


def nvfp4_cast(shape: cast_shapes.Shape, target: str) -> Workload:
    """A stored weight [N, K]."""
    return Workload(
        operation="nvfp4_cast",
        name=f"{shape.name} {shape.n}x{shape.k}",
        target=target,
        make=lambda key: (packed(key, shape.n, shape.k),),
        arguments=lambda weight: ((weight,), {"to": target}),
        sizes={"to": target, "n": shape.n, "k": shape.k},
        bytes=shape.n * shape.k * (BYTES["nvfp4"] + BYTES[target]),
        # XLA's division is not correctly rounded on every device, and one INT8 code in some hundreds differs by one.
        tolerance=3e-3,
    )


def scaled_matmul(shape: matmul_shapes.Shape, target: str) -> Workload:
    """Activation [batch, tokens, K] and weight [N, K] of codes, with the epilogue of that linear."""
    rows = shape.batch * shape.tokens

    def make(key):
        keys = jax.random.split(key, 5)
        a = codes(keys[0], (shape.batch, shape.tokens, shape.k), target)
        b = codes(keys[1], (shape.n, shape.k), target)
        parts = {"bias": normal(keys[2], shape.n)}
        if shape.gated:
            parts["gate"] = normal(keys[3], shape.batch, 2, shape.n)
            parts["residual"] = normal(keys[4], shape.batch, shape.tokens, shape.n)
        return a, b, parts

    def arguments(a, b, parts):
        epilogue = Epilogue(**parts, activation=shape.activation, text_length=shape.text_length if shape.gated else 0)
        return (a, b), {"epilogue": epilogue, "out_dtype": jnp.dtype(jnp.bfloat16)}

    itemsize = int(BYTES[target])
    return Workload(
        operation="scaled_matmul",
        name=f"{shape.name} {rows}x{shape.n}x{shape.k}",
        target=target,
        make=make,
        arguments=arguments,
        sizes={
            "rows": rows,
            "n": shape.n,
            "k": shape.k,
            "itemsize": itemsize,
            "gated": shape.gated,
        },
        bytes=(rows + shape.n) * shape.k * itemsize + rows * shape.n * (4 if shape.gated else 2),
        operations=2 * rows * shape.n * shape.k,
        tolerance=2.0**-7,
    )


def weight_only_matmul(shape: weight_only_shapes.Shape) -> Workload:
    """x [rows, K] in bfloat16 and a stored weight [N, K], with a bias."""

    def make(key):
        keys = jax.random.split(key, 3)
        return normal(keys[0], shape.rows, shape.k), packed(keys[1], shape.n, shape.k), normal(keys[2], shape.n)

    def arguments(x, weight, bias):
        return (x, weight), {"epilogue": Epilogue(bias=bias), "out_dtype": jnp.dtype(jnp.bfloat16)}

    return Workload(
        operation="weight_only_matmul",
        name=f"{shape.name} {shape.rows}x{shape.n}x{shape.k}",
        target="bfloat16",
        make=make,
        arguments=arguments,
        sizes={"rows": shape.rows, "n": shape.n, "k": shape.k},
        bytes=shape.n * shape.k * BYTES["nvfp4"] + 2 * shape.rows * (shape.k + shape.n),
        tolerance=2.0**-7,
    )


def normal(key: Array, *shape: int) -> Array:
    """bfloat16 of a unit normal."""
    return jax.random.normal(key, shape, jnp.bfloat16)


def packed(key: Array, n: int, k: int) -> NVFP4Array:
    """A weight [n, k] of any codes and of block scales from 1/8 to 32, such that its values are about 1/sqrt(k)."""
    keys = jax.random.split(key)
    return NVFP4Array(
        codes=jax.random.bits(keys[0], (n, k // 2), jnp.uint8),
        scales=jax.random.randint(keys[1], (n, k // BLOCK), 0x20, 0x60).astype(jnp.uint8),
        tensor_scale=jnp.float32(1 / (32 * math.sqrt(k))),
        hadamard=hadamard_block(k),
    )


def codes(key: Array, shape: tuple[int, ...], target: str) -> Int8Array | CarriedArray:
    """Codes of normal values, and scales that make a product about one."""
    values = 32 * jax.random.normal(key, shape, jnp.bfloat16)
    scale = jnp.full(shape[:-1], 1 / (32 * math.sqrt(math.sqrt(shape[-1]))), jnp.float32)
    if target == "int8":
        values = jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
        return Int8Array(codes=values, scale=scale, hadamard=hadamard_block(shape[-1]))
    return CarriedArray(codes=values.astype(CARRIERS[target]), scale=scale, hadamard=hadamard_block(shape[-1]))


@jax.jit
def relative_error(found, wanted) -> Array:
    """Relative L2 error of the worst array of two trees, quantised ones dequantised; NaN if anything is."""
    errors = [_error(a, b) for a, b in zip(_leaves(found), _leaves(wanted), strict=True)]
    return functools.reduce(jnp.maximum, errors)


def _leaves(tree) -> list:
    return jax.tree.leaves(tree, is_leaf=_is_quantized)


def _is_quantized(node) -> bool:
    return isinstance(node, NVFP4Array | Int8Array | CarriedArray)


def _error(found, wanted) -> Array:
    found, wanted = (dequantize(a) if _is_quantized(a) else a.astype(jnp.float32) for a in (found, wanted))
    return jnp.sqrt(jnp.square(found - wanted).sum() / jnp.square(wanted).sum())
