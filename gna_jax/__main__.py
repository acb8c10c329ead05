"""`python -m gna_jax`: the same as the command `gna-jax`."""

from gna_jax.cli import app

app(prog_name="gna-jax")
