"""What policies look at. Axes: blocks of the model, groups (videos that are decided on together), sites of a block."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass(kw_only=True)
class Observation:
    """What the last step measured; all of it [blocks, groups].

    Attributes:
        computed: bool; whether the block was computed. Where it was not, the other fields mean nothing.
        volatility: float32; G = |Y - X|_1 / |X|_1 of the block's output and input (2).
        delta_change: float32; |D_new - D_old|_1 / |D_old|_1 of its last two computed deltas D = Y - X (3); infinite
            where there is only one.
    """

    computed: jax.Array
    volatility: jax.Array
    delta_change: jax.Array


def nothing_observed(blocks: int, groups: int) -> Observation:
    """Before the first step."""
    unknown = jnp.full((blocks, groups), jnp.nan, jnp.float32)
    return Observation(
        computed=jnp.zeros((blocks, groups), bool), volatility=unknown, delta_change=jnp.full_like(unknown, jnp.inf)
    )


@struct.dataclass(kw_only=True)
class Progress:
    """Where in the run a decision is made.

    Attributes:
        step: int32 [], counted from 0.
        steps: how many there are.
    """

    step: jax.Array
    steps: int = struct.field(pytree_node=False)
