"""Published models on neighborhood attention, in Flax nnx, with loaders for the weights their authors give away.

Small enough to read: a module per model, a module per table of checkpoint keys. `gna_jax` itself never imports this.
"""
