"""Are the annotations true? The package runs once with every annotated function checked as it is called (beartype)."""

import subprocess
import sys

import pytest

PROGRAM = """
import jaxtyping
jaxtyping.install_import_hook(["gna_jax"], "beartype.beartype")
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_disable_most_optimizations", True)
from flax import nnx
import gna_jax, gna_jax.attention, gna_jax.flax

q = jax.random.normal(jax.random.key(0), (2, 9, 8, 4, 16))
k, v, text = q[..., :2, :], q[..., :2, :8], jnp.ones((2, 3, 2, 16))
rule = dict(window_size=(3, 5), stride=2, dilation=(2, 1), is_causal=(True, False))
more = dict(additional_keys=text, additional_values=text[..., :8], additional_lengths=np.asarray([1, 3]))

def loss(q, k, v):
    bias = jnp.zeros((4, 5, 9))
    return jnp.sum(gna_jax.gna(q, k, v, relative_position_bias=bias, **rule, **more))

jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
print(gna_jax.explain(q, k, v, window_size=3))
gna_jax.gna(np.asarray(q), k, v, window_size=np.int32(3), implementation="reference", return_lse=True)
gna_jax.explain(q, k, v, window_size=3, tiles=gna_jax.Tiles((4, 4), None), implementation=["xla"])
gna_jax.na2d(q, q, q, 3, implementation="reference")
slab = gna_jax.attention.slab_attention
out, lse = slab(q[:, 2:5], q, q, jnp.asarray([2, 0]), [0, 0], global_layout=(9, 8), window_size=3)
gna_jax.merge_attentions([out, out], (lse, lse))
layer = gna_jax.flax.GNAttention(4, 32, window_size=3, rngs=nnx.Rngs(0))
print(layer(jnp.ones((1, 8, 8, 32))).shape)
try:
    gna_jax.gna(q, q[:, 0], q, window_size=3)
except jaxtyping.TypeCheckError:
    print("a false annotation is found")
"""


@pytest.mark.slow
def test_annotations_hold_when_checked_at_run_time():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "(1, 8, 8, 32)" in done.stdout and "a false annotation is found" in done.stdout
