"""What a tile size is chosen by."""

import math
from typing import Any

from pallas_kernels.common.epilogue import Epilogue
from pallas_kernels.common.formats import CarriedArray, Int8Array


def case(a: Int8Array | CarriedArray, b: Int8Array | CarriedArray, epilogue: Epilogue) -> dict[str, Any]:
    """What the heuristics take, and tuned configurations are kept by."""
    n, k = b.shape
    return {
        "rows": math.prod(a.shape[:-1]),
        "n": n,
        "k": k,
        "itemsize": a.codes.dtype.itemsize,
        "gated": epilogue.gate is not None,
    }
