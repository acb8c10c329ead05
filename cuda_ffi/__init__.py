"""The CUDA kernels of neighborhood attention, called through XLA's FFI: their sources, their build, and the built library.

C++ lives in `include` (geometry), `kernels` and `handlers`; Python finds and loads what was built (`library`) and builds it (`build`).
`gna_jax.backends.cutlass` imports this package when it is asked for, and nothing else does.
"""
