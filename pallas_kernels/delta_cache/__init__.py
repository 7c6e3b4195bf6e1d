"""What a skipped block reuses: its stored delta, kept in 16, 8 or 4 bits."""

from pallas_kernels.delta_cache.api import DeltaSums, apply_delta, store_delta

__all__ = ["DeltaSums", "apply_delta", "store_delta"]
