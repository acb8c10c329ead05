"""Neighborhood attention kernels in Pallas (Mosaic GPU), one module per GPU generation and direction: the Hopper forward.

A kernel receives a validated problem and a tile plan, and neither checks arguments nor chooses an implementation:
`gna_jax.backends` does, and imports this package only when it needs it.
"""
