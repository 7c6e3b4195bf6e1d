"""What measuring a delta gives."""

import jax
import numpy as np
from flax import struct


@struct.dataclass(kw_only=True)
class DeltaSums:
    """Sums of magnitudes over each row, float32 [batch, tokens].

    Attributes:
        before: of the block's input.
        delta: of the new delta.
        change: of the new delta less the stored one; None if not compared.
        stored: of the stored one; likewise.
    """

    before: jax.Array | np.ndarray
    delta: jax.Array | np.ndarray
    change: jax.Array | np.ndarray | None
    stored: jax.Array | np.ndarray | None
