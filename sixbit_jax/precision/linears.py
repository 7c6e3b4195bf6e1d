"""A block's linears run as decided: each on the route of its site, 16 bit where a refresh is purified."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.adaln_quantize import adaln_quantize
from pallas_kernels.rotate_quantize import RowStatistics, rotate_quantize
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.layers import LayerNorm
from sixbit_jax.models.linears import Modulation, PlainLinears, modulated
from sixbit_jax.qtensor import ROUTES, QuantLinear

BITS = (4, 8, 16)
"""Activation bits of each of `qtensor.ROUTES`."""

_plain = PlainLinears()


class RoutedLinears:
    """The linears of one block for one group; a `models.linears.Linears`.

    A layer that is no `QuantLinear` is computed as it is, and counts as 16 bit. After the block has run, `taken` has
    what was taken and measured, and `any_quantized` tells whether there was anything to route.

    Args:
        sites: of the block, in the order of `routes`.
        choices: the routes that any site may take.
        routes: int32 [sites], indices into `qtensor.ROUTES`, of `choices` alone; not read if there is one choice.
        purify: bool []; whether sites with outliers run in 16 bit. None if none ever does.
        outlier_limit: the ratio max|x| / mean|x| of an activation above which it has outliers.
        carrier: what NVFP4 operands are multiplied in.
    """

    def __init__(
        self,
        sites: tuple[str, ...],
        choices: tuple[str, ...],
        routes: Int32[Array, " sites"],
        purify: Bool[Array, ""] | None,
        *,
        outlier_limit: float,
        carrier: str,
    ):
        self._sites, self._choices, self._routes, self._purify = sites, choices, routes, purify
        self._outlier_limit, self._carrier = outlier_limit, carrier
        self._bits: dict[str, jax.Array] = {}
        self._outlier: dict[str, jax.Array] = {}
        self.any_quantized = False

    def __call__(self, site: str, linear: Any, x: jax.Array) -> jax.Array:
        if self._runs_as_it_is(site, linear):
            return _plain(site, linear, x)
        return self._run(site, linear, _rotated(linear, x), lambda: x, {})

    def normed(
        self, site: str, linear: Any, x: jax.Array, norm: LayerNorm, modulation: Modulation, *, gelu: bool = False
    ) -> jax.Array:
        if self._runs_as_it_is(site, linear):
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
        if self._runs_as_it_is(site, linear):
            return _plain.gated(site, linear, x, residual, modulation)
        gate = {"gate": modulation.gate, "residual": residual, "text_length": modulation.text_length}
        return self._run(site, linear, _rotated(linear, x), lambda: x, gate)

    def taken(self) -> tuple[Int32[Array, " sites"], Float32[Array, " sites"]]:
        """Activation bits of each site, and max|x| / mean|x| of its activation, NaN in 16 bit.

        Raises:
            ArgumentError: if the block ran no linear at one of its sites.
        """
        return stacked(self._bits, self._sites), stacked(self._outlier, self._sites)

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
        check_site(site, self._sites, self._bits)
        self.any_quantized = True
        with jax.named_scope(site):
            if len(self._choices) == 1:
                y, bits, ratio = branches[self._choices[0]]()
            else:
                position = sum(
                    (self._routes[self._sites.index(site)] > ROUTES.index(name)).astype(jnp.int32)
                    for name in self._choices[:-1]
                )
                y, bits, ratio = jax.lax.switch(position, [branches[name] for name in self._choices])
        self._bits[site], self._outlier[site] = bits, ratio
        return y

    def _runs_as_it_is(self, site: str, linear: Any) -> bool:
        if isinstance(linear, QuantLinear):
            return False
        check_site(site, self._sites, self._bits)
        self._bits[site], self._outlier[site] = jnp.asarray(16, jnp.int32), jnp.asarray(jnp.nan, jnp.float32)
        return True


def _rotated(linear: QuantLinear, x: jax.Array) -> Callable[..., tuple[Any, RowStatistics]]:
    """Quantises an activation as a layer's weight is rotated, NVFP4 with one tensor scale a row."""

    def quantize(format: str, **options: Any) -> tuple[Any, RowStatistics]:
        scale_dims = x.ndim - 1 if format == "nvfp4" else 0
        return rotate_quantize(x, format=format, hadamard=linear.hadamard, scale_dims=scale_dims, **options)

    return quantize


def outlier_ratio(statistics: RowStatistics, size: int) -> Float32[Array, ""]:
    """max|x| / mean|x| over all rows of `size` values; 0 for an activation of zeros."""
    mean = statistics.sum_abs.sum() / (statistics.sum_abs.size * size)
    return jnp.where(mean > 0, statistics.max_abs.max() / mean, 0.0)


def check_site(site: str, sites: tuple[str, ...], seen: dict[str, Any]) -> None:
    """Makes sure that a block may run a linear there.

    Raises:
        ArgumentError: if it is none of the block's sites, or has run before.
    """
    if site not in sites:
        raise ArgumentError(f"a block ran a linear at {site!r}, which is none of its sites: {', '.join(sites)}")
    if site in seen:
        raise ArgumentError(f"a block ran two linears at {site!r}: each needs a site of its own")


def stacked(
    values: dict[str, jax.Array], sites: tuple[str, ...]
) -> Float[Array, "sites ..."] | Int32[Array, "sites ..."]:
    """By site -> [sites, ...].

    Raises:
        ArgumentError: if there is a site without a value.
    """
    if missing := [site for site in sites if site not in values]:
        raise ArgumentError(f"a block ran no linear at {', '.join(missing)}; its sites are {', '.join(sites)}")
    return jnp.stack([values[site] for site in sites])
