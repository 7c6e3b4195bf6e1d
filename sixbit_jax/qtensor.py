"""Linear layers whose weight is stored in NVFP4, and the rules that put them in the place of ordinary ones."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.common.formats import CARRIERS, CarriedArray, Int8Array, NVFP4Array, hadamard_block
from pallas_kernels.nvfp4_cast import cast
from pallas_kernels.rotate_quantize import rotate_quantize
from pallas_kernels.scaled_matmul import scaled_matmul
from pallas_kernels.weight_only_matmul import weight_only_matmul
from sixbit_jax.rounding import round_to_inputs

FORMATS = ("nvfp4", "keep")
"""What a rule can do with a linear."""

ROUTES = ("nvfp4", "int8", "16bit")
"""How a `QuantLinear` may run. Layers of flax are not routed: they run as they are."""

TRANSFORMER_RULES = (
    (r"blocks\.(attn_in|attn_out|ff_in|ff_out|norm1\.linear|norm2\.linear)", "nvfp4"),
    (r"patch_embed\..*|time_embedding\..*|ofs_embedding\..*|norm_out\.linear|proj_out", "keep"),
)
"""For a CogVideoX transformer: everything in its blocks, and nothing around them (method.md 1)."""

TEXT_ENCODER_RULES = ((r"blocks\.(attn_in|attn_out|ff_in|ff_out)", "nvfp4"),)
"""For T5."""


class Quantized(nnx.Variable):
    """A variable that holds a piece of a stored low-bit tensor; no optimiser should touch it."""


class QuantLinear(nnx.Module):
    """y = x W^T + b with W stored in NVFP4, 4.5 bits a value, in the place of an `nnx.Linear`.

    Args:
        weight: [out, K]; a leading axis [layers, out, K] for stacked layers to be scanned over.
        bias: [out] ([layers, out]) or None.
        dtype: of the result, and of activations on the 16-bit route.
    """

    def __init__(self, weight: NVFP4Array, bias: jax.Array | jax.ShapeDtypeStruct | None, *, dtype: DTypeLike):
        self.codes, self.scales = Quantized(weight.codes), Quantized(weight.scales)
        self.tensor_scale = Quantized(weight.tensor_scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.hadamard, self.dtype = weight.hadamard, jnp.dtype(dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        hadamard: int | None = None,
        four_over_six: bool = False,
        moment: Float32[Array, "*layers groups size size"] | None = None,
    ) -> "QuantLinear":
        """Quantises the kernel of a flax layer.

        Args:
            linear: its kernel is [in, out], or [layers, in, out], which gets one tensor scale a layer; one of shapes
                gives shapes.
            hadamard: as in `rotate_quantize`: None for the largest block that fits.
            four_over_six: likewise.
            moment: of its inputs, to round for them (`rounding.round_to_inputs`); None rounds each weight to the
                nearest.

        Raises:
            ValueError: if `in` is not a multiple of 16, or of the rotation's block; or if the moment is of another
                size, not finite, or given together with `four_over_six`.
        """
        kernel = linear.kernel.get_value()

        def quantize(kernel: Float[Array, "..."], moment: Float32[Array, "..."] | None) -> NVFP4Array:
            if kernel.ndim == 3:
                return jax.lax.map(lambda one: quantize(*one), (kernel, moment))
            return quantize_weight(kernel.T, hadamard=hadamard, four_over_six=four_over_six, moment=moment)

        abstract = isinstance(kernel, jax.ShapeDtypeStruct)
        weight = jax.eval_shape(quantize, kernel, moment) if abstract else quantize(kernel, moment)
        if moment is not None and not abstract:
            check_rounded(weight)
        bias = None if linear.bias is None else linear.bias.get_value()
        return cls(weight, bias, dtype=linear.dtype or kernel.dtype)

    @property
    def weight(self) -> NVFP4Array:
        """The stored weight, [out, K] or [layers, out, K]."""
        return NVFP4Array(
            codes=self.codes[...],
            scales=self.scales[...],
            tensor_scale=self.tensor_scale[...],
            hadamard=self.hadamard,
        )

    def multiply(self, x: Int8Array | CarriedArray, **epilogue: Any) -> Float[Array, "..."]:
        """The product with an activation that is quantised already: [..., K] -> [..., out].

        The weight is cast once to the activation's own type.

        Args:
            x: in the rotation of the weight.
            **epilogue: of `scaled_matmul`, less the bias: activation, gate, residual, text_length.

        Raises:
            ValueError: if x or the epilogue does not fit the weight.
        """
        carrier = {codes: name for name, codes in CARRIERS.items()}.get(x.codes.dtype, "int8")
        with jax.named_scope("cast"):
            weight = cast(self.weight, to=carrier)
        return scaled_matmul(x, weight, bias=self._bias, out_dtype=self.dtype, **epilogue)

    def __call__(
        self, x: Float[Array, "*rows k"], *, route: str = "16bit", carrier: str = "exact", **epilogue: Any
    ) -> Float[Array, "*rows n"]:
        """x -> x W^T + b, then the epilogue of `scaled_matmul` (activation, gate and residual).

        Args:
            x: unrotated activation.
            route: "nvfp4" (4-bit activation, one tensor scale a row), "int8", or "16bit" (weight dequantised).
            carrier: what NVFP4 operands are multiplied in: "exact" or "fp8".
            **epilogue: activation, gate, residual, text_length.

        Returns:
            [..., out], in the layer's dtype.

        Raises:
            ValueError: on an unknown route or carrier.
        """
        if route not in ROUTES:
            raise ValueError(f"unknown route {route!r}; routes are {', '.join(ROUTES)}")
        if route == "16bit":
            return weight_only_matmul(x.astype(self.dtype), self.weight, bias=self._bias, **epilogue)
        if route == "int8":
            return self.multiply(rotate_quantize(x, format="int8", hadamard=self.hadamard)[0], **epilogue)
        quantized, _ = rotate_quantize(
            x, format="nvfp4", hadamard=self.hadamard, carrier=carrier, scale_dims=x.ndim - 1
        )
        return self.multiply(quantized, **epilogue)

    @property
    def _bias(self) -> Float[Array, "..."] | None:
        return None if self.bias is None else self.bias[...]


def quantize_weight(
    weight: Float[Array, "out k"],
    *,
    hadamard: int | None,
    four_over_six: bool,
    moment: Float32[Array, "groups size size"] | None,
) -> NVFP4Array:
    """A weight in NVFP4, each value rounded to the nearest, or all of them for inputs of a second moment.

    Args:
        weight: of one linear.
        hadamard: as in `rotate_quantize`.
        four_over_six: likewise.
        moment: as in `rounding.round_to_inputs`; None rounds to the nearest.

    Raises:
        ValueError: as `QuantLinear.from_linear`.
    """
    if moment is None:
        return rotate_quantize(weight, format="nvfp4", hadamard=hadamard, four_over_six=four_over_six)[0]
    if four_over_six:
        raise ValueError("four_over_six chooses scales for the nearest values; it does not go with a moment")
    groups, size, _ = moment.shape
    if groups * size != weight.shape[1]:
        raise ValueError(f"a moment of {groups} x {size} inputs is not of a weight with {weight.shape[1]}")
    return round_to_inputs(weight, moment, hadamard=hadamard_block(weight.shape[1], hadamard))


def check_rounded(weight: NVFP4Array) -> None:
    """Raises ValueError if a weight that was rounded with a moment is NaN."""
    if not np.isfinite(np.asarray(weight.tensor_scale)).all():
        raise ValueError("the moment of its inputs, or the weight, has NaN or Inf, or the moment no inverse")


def quantize_model[M: nnx.Module](
    model: M,
    rules: Sequence[tuple[str, str]] = TRANSFORMER_RULES,
    *,
    hadamard: int | None = None,
    four_over_six: bool = False,
    moments: Mapping[str, Float32[Array, "*layers groups size size"]] | None = None,
) -> M:
    """Replaces linear layers of an NNX module, in place, by `QuantLinear`.

    Args:
        model: any module; stacked layers [layers, in, out] are quantised layer by layer. One of shapes alone (made
            under `nnx.eval_shape`) gets shapes.
        rules: ordered (regular expression, format) pairs; the first that matches the whole dotted path of an
            `nnx.Linear` decides: "nvfp4", or "keep".
        hadamard: as in `rotate_quantize`: None for the largest block that fits each layer.
        four_over_six: likewise.
        moments: of the inputs of linears, by dotted path (`moments.gather`), to round those for them; the others are
            rounded to the nearest.

    Returns:
        The same module.

    Raises:
        ValueError: listing every rule that matches nothing, every linear that no rule covers, and every linear
            whose size the format or its moment does not fit. The module is then as it was.
    """
    paths = quantized_paths(model, rules)
    return replace_linears(model, paths, hadamard=hadamard, four_over_six=four_over_six, moments=moments or {})


def quantized_paths(model: nnx.Module, rules: Sequence[tuple[str, str]]) -> list[str]:
    """Dotted paths of the linears that `quantize_model` would quantise.

    Args:
        model: any module.
        rules: as there.

    Raises:
        ValueError: as there, but for sizes.
    """
    chosen, used, problems = [], set(), []
    for path in _linears(model):
        rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
        if rule is None:
            problems.append(f"no rule covers {path}")
        elif rule[1] == "nvfp4":
            chosen.append(path)
        used.add(rule)
    problems += [f"rule {rule[0]!r} matches no linear" for rule in rules if rule not in used]
    problems += [f"unknown format {format!r}; formats are nvfp4, keep" for _, format in rules if format not in FORMATS]
    if problems:
        raise ValueError("quantize_model: " + "; ".join(problems))
    return chosen


def replace_linears[M: nnx.Module](
    model: M,
    paths: Sequence[str],
    *,
    hadamard: int | None,
    four_over_six: bool,
    moments: Mapping[str, Float32[Array, "*layers groups size size"]] = MappingProxyType({}),
) -> M:
    """`quantize_model` for the linears at these paths.

    Raises:
        ValueError: listing every path that is no linear's, every linear whose size the format or its moment does not
            fit, and every moment of what is not quantised.
    """
    linears, replaced = _linears(model), {}
    problems = [f"a moment of {path}, which is not quantised" for path in moments if path not in paths]
    for path in paths:
        if path not in linears:
            problems.append(f"there is no linear {path}")
            continue
        try:
            replaced[path] = QuantLinear.from_linear(
                linears[path][1], hadamard=hadamard, four_over_six=four_over_six, moment=moments.get(path)
            )
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError("quantize_model: " + "; ".join(problems))
    for path, layer in replaced.items():
        setattr(linears[path][0], path.rpartition(".")[2], layer)
    return model


def _linears(model: nnx.Module, prefix: str = "") -> dict[str, tuple[nnx.Module, nnx.Linear]]:
    """Dotted path -> (parent, layer) of every `nnx.Linear`."""
    found = {}
    for name, child in vars(model).items():
        if isinstance(child, nnx.Linear):
            found[prefix + name] = (model, child)
        elif isinstance(child, nnx.Module):
            found |= _linears(child, f"{prefix}{name}.")
    return found
