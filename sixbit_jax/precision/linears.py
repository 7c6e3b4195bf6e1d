"""A block's linears run as decided: each on the route of its site, 16 bit where a refresh is purified."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.adaln_quantize import adaln_quantize
from pallas_kernels.rotate_quantize import RowStatistics, rotate_quantize
from sixbit_jax.models.layers import LayerNorm
from sixbit_jax.models.linears import SITES, Modulation, PlainLinears, modulated
from sixbit_jax.qtensor import ROUTES, QuantLinear

BITS = (4, 8, 16)
"""Activation bits of each of `qtensor.ROUTES`."""

_plain = PlainLinears()


class RoutedLinears:
    """The linears of one block for one group; a `models.linears.Linears`.

    Ordinary layers of flax are computed as they are. After the block has run, `bits` and `outlier` hold what was taken
    and measured, by site.

    Args:
        choices: the routes that any site may take.
        routes: int32 [sites], indices into `qtensor.ROUTES`, of `choices` alone; not read if there is one choice.
        purify: bool []; whether sites with outliers run in 16 bit. None if none ever does.
        outlier_limit: the ratio max|x| / mean|x| of an activation above which it has outliers.
        carrier: what NVFP4 operands are multiplied in.
    """

    def __init__(
        self,
        choices: tuple[str, ...],
        routes: Int32[Array, " sites"],
        purify: Bool[Array, ""] | None,
        *,
        outlier_limit: float,
        carrier: str,
    ):
        self._choices, self._routes, self._purify = choices, routes, purify
        self._outlier_limit, self._carrier = outlier_limit, carrier
        self.bits: dict[str, jax.Array] = {}
        self.outlier: dict[str, jax.Array] = {}

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        if isinstance(linear, nnx.Linear):
            self._record(site, jnp.asarray(16, jnp.int32), jnp.asarray(jnp.nan, jnp.float32))
            return _plain.normed(site, linear, x, norm, modulation, gelu=gelu)

        def quantize(**options: Any) -> tuple[Any, RowStatistics]:
            return adaln_quantize(
                x,
                norm_scale=norm.scale[...],
                norm_bias=norm.bias[...],
                shift=modulation.shift,
                scale=modulation.scale,
                text_length=modulation.text_length,
                epsilon=norm.epsilon,
                hadamard=linear.hadamard,
                **options,
            )

        activation = {"activation": "gelu_tanh"} if gelu else {}
        return self._run(site, linear, quantize, lambda: modulated(norm, x, modulation), activation)

    def gated(self, site: str, linear: Any, x: jax.Array, residual: jax.Array, modulation: Modulation) -> jax.Array:
        if isinstance(linear, nnx.Linear):
            self._record(site, jnp.asarray(16, jnp.int32), jnp.asarray(jnp.nan, jnp.float32))
            return _plain.gated(site, linear, x, residual, modulation)

        def quantize(format: str, **options: Any) -> tuple[Any, RowStatistics]:
            scale_dims = x.ndim - 1 if format == "nvfp4" else 0
            return rotate_quantize(x, format=format, hadamard=linear.hadamard, scale_dims=scale_dims, **options)

        gate = {"gate": modulation.gate, "residual": residual, "text_length": modulation.text_length}
        return self._run(site, linear, quantize, lambda: x, gate)

    def _run(
        self,
        site: str,
        linear: QuantLinear,
        quantize: Callable[..., tuple[Any, RowStatistics]],
        plain: Callable[[], jax.Array],
        epilogue: dict[str, Any],
    ) -> jax.Array:
        """One site. `quantize` gives its activation quantised, `plain` in 16 bit; each branch holds one route alone."""

        def sixteen() -> jax.Array:
            return linear(plain(), route="16bit", **epilogue)

        def low_bit(name: str) -> Callable[[], tuple[jax.Array, jax.Array, jax.Array]]:
            options = {"carrier": self._carrier} if name == "nvfp4" else {}
            bits = jnp.asarray(BITS[ROUTES.index(name)], jnp.int32)

            def run() -> tuple[jax.Array, jax.Array, jax.Array]:
                with jax.named_scope("quantize"):
                    x, statistics = quantize(format=name, **options)
                ratio = outlier_ratio(statistics, x.shape[-1])
                if self._purify is None:
                    return linear.multiply(x, **epilogue), bits, ratio
                purified = self._purify & (ratio > self._outlier_limit)
                y = jax.lax.cond(purified, sixteen, lambda: linear.multiply(x, **epilogue))
                return y, jnp.where(purified, 16, bits), ratio

            return run

        def full() -> tuple[jax.Array, jax.Array, jax.Array]:
            return sixteen(), jnp.asarray(16, jnp.int32), jnp.asarray(jnp.nan, jnp.float32)

        branches = {"nvfp4": low_bit("nvfp4"), "int8": low_bit("int8"), "16bit": full}
        with jax.named_scope(site):
            if len(self._choices) == 1:
                y, bits, ratio = branches[self._choices[0]]()
            else:
                position = sum(
                    (self._routes[SITES.index(site)] > ROUTES.index(name)).astype(jnp.int32)
                    for name in self._choices[:-1]
                )
                y, bits, ratio = jax.lax.switch(position, [branches[name] for name in self._choices])
        self._record(site, bits, ratio)
        return y

    def _record(self, site: str, bits: jax.Array, ratio: jax.Array) -> None:
        self.bits[site], self.outlier[site] = bits, ratio


def outlier_ratio(statistics: RowStatistics, size: int) -> Float32[Array, ""]:
    """max|x| / mean|x| over all rows of `size` values; 0 for an activation of zeros."""
    mean = statistics.sum_abs.sum() / (statistics.sum_abs.size * size)
    return jnp.where(mean > 0, statistics.max_abs.max() / mean, 0.0)


def stacked(values: dict[str, jax.Array]) -> Float[Array, " sites"] | Int32[Array, " sites"]:
    """By site -> [sites]."""
    return jnp.stack([values[site] for site in SITES])
