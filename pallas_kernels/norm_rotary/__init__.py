"""Layer norm of queries and keys, and rotary positions, in one pass over the projected rows."""

from pallas_kernels.norm_rotary.api import norm_rotary

__all__ = ["norm_rotary"]
