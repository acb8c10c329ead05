"""Flax modules over the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1): they train as with the XLA backend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_suite import check_array
from flax import nnx
from triton_calls import LINE, interpreting

from gna_jax.flax import GNAttention
from gna_jax.models.nat_model import NAT
from gna_jax.models.nat_presets import NATConfig

pytestmark = pytest.mark.triton

FLOAT32 = 1e-5
BIAS = "relative_position_bias"
DINAT = NATConfig(
    dim=16, depths=(2,), num_heads=(1,), mlp_ratio=2.0, window_size=3, dilations=((1, 2),)
)


def step(model, optimizer, inputs, loss):
    """One step of training, jitted: the loss, and all parameters after it by path, as numpy arrays."""

    @nnx.jit
    def train(model, optimizer, inputs):
        value, gradient = nnx.value_and_grad(lambda model: loss(model(inputs)))(model)
        optimizer.update(model, gradient)
        return value

    value = train(model, optimizer, inputs)
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return np.asarray(value), {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}


def check_trains(make, inputs, loss):
    """A module made for "xla" and one made for "triton" are equal after a step, and its bias has moved."""

    def trained(implementation):
        model = make(implementation)
        optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
        return step(model, optimizer, inputs, loss)

    want_loss, want = trained("xla")
    with interpreting():
        got_loss, got = trained("triton")
    check_array(got_loss, want_loss, FLOAT32, "loss")
    assert got.keys() == want.keys()
    for name, array in got.items():
        check_array(array, want[name], FLOAT32, name)
    tables = [array for name, array in got.items() if BIAS in name]
    assert tables and all(table.any() for table in tables), "they start at zero"


def test_dinat_trains():
    """Overlapping patches, two layers of 6 x 6 tokens with dilations 1 and 2, and their biases."""
    images = np.random.default_rng(0).standard_normal((1, 24, 24, 3), np.float32)

    def make(implementation):
        initial = nnx.initializers.lecun_normal()
        options = {"precision": "highest", "remat": True, "implementation": implementation}
        return NAT(DINAT, num_classes=5, kernel_init=initial, **options, rngs=nnx.Rngs(0))

    loss = lambda logits: -jnp.mean(jax.nn.log_softmax(logits)[:, 0])
    check_trains(make, jnp.asarray(images), loss)


def test_gn_attention_trains():
    """Grouped heads, causal windows, a bias and normalized queries and keys."""
    tokens = np.random.default_rng(1).standard_normal((2, 20, 32), np.float32)

    def make(implementation):
        return GNAttention(
            2,
            32,
            window_size=(5,),
            num_kv_heads=1,
            is_causal=True,
            relative_position_bias=True,
            normalize_qk=True,
            precision="highest",
            tiles=LINE if implementation == "triton" else None,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )

    check_trains(make, jnp.asarray(tokens), lambda out: jnp.mean((out - 1) ** 2))
