"""The 6Bit method: which precision each linear takes, and which blocks are skipped, decided at every sampling step.

Read in this order: `routers.py` and `skippers.py` decide, from what the last step measured (`types.py`);
`linears.py` runs a block's linears as decided; `delta_cache.py` keeps what skipped blocks reuse; `blocks.py` puts them
around the scan over blocks, of CogVideoX or of any model; `accounting.py` counts bits. Sections refer to the paper,
arXiv 2603.18742.
"""

from sixbit_jax.precision.blocks import PrecisionPolicy, PrecisionState, PrecisionTrace, init_scan, scan_blocks
from sixbit_jax.precision.routers import ConstantRouter, CostAwareRouter, TableRouter, VolatilityRouter, edges
from sixbit_jax.precision.skippers import DeltaSkipper, EveryNth, NeverSkip

__all__ = [
    "ConstantRouter",
    "CostAwareRouter",
    "DeltaSkipper",
    "EveryNth",
    "NeverSkip",
    "PrecisionPolicy",
    "PrecisionState",
    "PrecisionTrace",
    "TableRouter",
    "VolatilityRouter",
    "edges",
    "init_scan",
    "scan_blocks",
]
