"""Modules on a mesh of 2 x 2 x 2 devices (data, heads, time) beside the same ones on one device, for the sharding tests."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROUNDING = 2e-5
"""Of float32 sums in another order, relative to an array's largest number."""


def mesh_of(axis_type):
    return jax.make_mesh((2, 2, 2), ("data", "heads", "time"), axis_types=(axis_type,) * 3)


def arrays_of(shapes, seed=0):
    """Normal float32 arrays, one per shape."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def randomized(module, seed=1):
    """Parameters that start as constants (zero kernels, unit scales) become random: else most gradients would be zero."""
    rng = np.random.default_rng(seed)
    for _, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = param[...]
        noise = (0.2 * rng.normal(size=value.shape)).astype(value.dtype)
        param.set_value(value + jax.device_put(noise, value.sharding))
    return module


def assert_close(got, want, name=""):
    """Equal to float32 rounding."""
    bound = ROUNDING * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=name)


def gathered(program):
    """Elements of every result of an all-gather or all-to-all in a compiled program."""
    text = program.as_text()
    found = []
    for name in ("all-gather", "all-to-all"):
        results = re.findall(rf"= (.*?) {name}(?:-start)?\(", text)
        for shapes in results:
            sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
            found += [math.prod(map(int, filter(None, size.split(",")))) for size in sizes]
        assert bool(results) == bool(re.search(rf" {name}(-start)?\(", text))
    return found


def permutes(program):
    """Number of collective permutes in a compiled program."""
    return len(re.findall(r" collective-permute(?:-start)?\(", program.as_text()))


def flat(state):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def train_step(module, optimizer, arguments, options):
    """One step down a loss that weighs all numbers of all outputs differently; the outputs before it."""

    def loss(module, arguments):
        out = module(*arguments, **options)
        total = jnp.zeros((), jnp.float32)
        for n, leaf in enumerate(jax.tree.leaves(out)):
            weights = np.random.default_rng(n).normal(size=leaf.shape).astype(np.float32)
            total += jnp.sum(leaf * jnp.asarray(weights)) + 0.5 * jnp.sum(jnp.square(leaf))
        return total / 100, out

    grads, out = nnx.grad(loss, has_aux=True)(module, arguments)
    optimizer.update(module, grads)
    return out


def trained(module, arguments, options):
    """`(outputs, parameters after one step, their momenta, compiled step)`."""
    optimizer = nnx.Optimizer(module, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    step = nnx.jit(lambda m, o, a: train_step(m, o, a, options))
    program = step.lower(module, optimizer, arguments).compile()
    out = program(module, optimizer, arguments)
    momenta = flat(nnx.state(optimizer, nnx.optimizer.OptState))
    return out, flat(nnx.state(module, nnx.Param)), momenta, program


def placed(arguments, specs, mesh):
    """Arguments on the mesh, sharded as their specs."""
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, arguments, specs)


def check_training_step(
    make, spec, arguments, specs, *, image, axis_type=AUTO, exchanges=True, **options
):
    """`make(spec)` on the mesh trains as `make(None)` on one device, and gathers nothing as large as an image's shard.

    `image`: numbers of one device's part of the narrowest image activation. Returns the compiled step.
    """
    want_out, want_params, want_momenta, _ = trained(randomized(make(None)), arguments, options)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        module = randomized(make(spec))
        before = {name: x.sharding for name, x in flat(nnx.state(module, nnx.Param)).items()}
        arguments = placed(arguments, specs, mesh)
        out, params, momenta, program = trained(module, arguments, options)
    for got, want in zip(jax.tree.leaves(out), jax.tree.leaves(want_out), strict=True):
        assert_close(got, want)
    for got, want in ((params, want_params), (momenta, want_momenta)):
        assert got.keys() == want.keys()
        for name in got:
            assert_close(got[name], want[name], name)
    for name, sharding in before.items():
        assert params[name].sharding.is_equivalent_to(sharding, params[name].ndim), name
    assert any("heads" in sharding.spec for sharding in before.values())
    assert all(size < image for size in gathered(program)), (gathered(program), image)
    assert bool(permutes(program)) == exchanges
    return out, program
