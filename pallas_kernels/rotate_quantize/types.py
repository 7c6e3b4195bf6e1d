"""What `rotate_quantize` takes and returns beside the arrays."""

import dataclasses
import typing

import jax
import numpy as np
from jaxtyping import Array, Float32


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowStatistics:
    """Statistics of the input before its rotation, after values under 2^-96 became zero.

    The method's outlier ratio max|x| / mean|x| of any set of rows is max(max_abs) / (sum(sum_abs) / number of values).
    A row that holds a NaN or an infinity has no finite statistic.

    Attributes:
        sum_abs: float32 [...], sum of |x| over each row, in any order of summation.
        max_abs: float32 [...], exact.
    """

    sum_abs: Float32[Array | np.ndarray, "*rows"]
    max_abs: Float32[Array | np.ndarray, "*rows"]
