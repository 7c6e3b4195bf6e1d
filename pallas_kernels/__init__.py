"""Low-bit tensor formats and the GPU operations on them.

One folder per operation. Read `api.py` for what it does, `reference.py` for what its result is, bit for bit, and
`xla.py` for the plain JAX implementation that runs anywhere. `common/` holds the formats.
"""
