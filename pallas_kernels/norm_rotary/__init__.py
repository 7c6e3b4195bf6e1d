"""Layer norm of queries and keys, and rotary positions, in one pass over the projected rows."""

from pallas_kernels.norm_rotary.api import logit_bound, norm_rotary

__all__ = ["logit_bound", "norm_rotary"]
