"""Neighborhood attention kernels in Pallas: where they will live. None is written yet.

Planned here: forward and backward kernels in Mosaic GPU, one module per GPU generation (Hopper, then Blackwell). A
kernel receives a validated problem and a tile plan, and neither checks arguments nor chooses an implementation:
`gna_jax.backends` does, and imports this package only when it needs it.
"""
