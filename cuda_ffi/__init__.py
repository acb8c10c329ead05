"""Neighborhood attention kernels in CUDA C++, called through XLA's FFI: where they will live. None is written yet.

Planned here: CUTLASS kernels for Hopper and Blackwell, an opt-in build on top of the pure Python wheel, and the code
that loads the built library and registers its calls with jax. `gna_jax.backends` imports this package only when it
needs it.
"""
