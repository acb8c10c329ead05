"""The reference against the float64 oracle: values, lse, gradients, jvp and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    attend,
    case_of,
    check_array,
    check_close,
    differentiate,
    oracle,
    random_case,
)

from gna_jax.tiling import Tiles


def run(case, dtype):
    arrays, cotangents = case.inputs(dtype), case.cotangents(dtype)
    program = jax.jit(
        lambda a, c: differentiate(
            lambda a: attend(case, a, implementation="reference", tiles=None), a, c
        )
    )
    return program(arrays, cotangents), oracle(case, arrays, cotangents)


@pytest.mark.parametrize("seed", range(300, 308))
def test_random_cases(seed):
    case = random_case(seed)
    with jax.enable_x64(True):
        got, want = run(case, np.float64)
        check_close(got, want, 1e-12, repr(case))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3000, 3200))
def test_many_random_cases(seed):
    case = random_case(seed, max_tokens=400)
    with jax.enable_x64(True):
        got, want = run(case, np.float64)
        check_close(got, want, 1e-12, repr(case))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    case = case_of((5, 6), (3, 4), stride=(2, 1), num_additional=3, lengths=(0, 3), has_bias=True)
    got, want = run(case, dtype)
    assert got.out.dtype == dtype and got.lse.dtype == np.float32
    # One rounding of the result: the arithmetic itself is float32.
    check_close(got, want, 1e-5 if dtype == np.float32 else float(jnp.finfo(dtype).eps), repr(case))


def small_loss(case):
    """A scalar of out and lse that is not linear in them."""

    def loss(arrays):
        out, lse = attend(case, arrays, implementation="reference", tiles=None)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    return loss


def oracle_gradient(case, arrays):
    """Gradient of `small_loss` from the oracle's closed form."""
    zeros = case.cotangents(np.float64)
    values = oracle(case, arrays, zeros)
    return oracle(case, arrays, (np.cos(values.out), 2 * values.lse)).gradients


CASE = case_of(
    (3, 4),
    (2, 3),
    stride=(2, 1),
    batch=1,
    head_dim=2,
    value_dim=2,
    num_additional=2,
    lengths=(1,),
    has_bias=True,
    is_causal=(False, True),
)


def test_jvp():
    """Forward mode agrees with the closed-form gradient in a random direction."""
    with jax.enable_x64(True):
        arrays = CASE.inputs(np.float64)
        lengths = arrays.pop("additional_lengths")
        rng = np.random.default_rng(0)
        direction = {name: rng.standard_normal(x.shape) for name, x in arrays.items()}
        loss = lambda floating: small_loss(CASE)({**floating, "additional_lengths": lengths})
        _, got = jax.jvp(loss, (arrays,), (direction,))
        gradient = oracle_gradient(CASE, {**arrays, "additional_lengths": lengths})
        want = sum(np.vdot(gradient[name], x) for name, x in direction.items())
        check_array(got, want, 1e-12)


@pytest.mark.slow
def test_second_derivatives():
    """Hessian times a direction, over all operands at once, against differences of the closed-form gradient."""
    with jax.enable_x64(True):
        arrays = CASE.inputs(np.float64)
        lengths = {"additional_lengths": arrays.pop("additional_lengths")}
        rng = np.random.default_rng(1)
        direction = {name: rng.standard_normal(x.shape) for name, x in arrays.items()}
        loss = lambda floating: small_loss(CASE)({**floating, **lengths})

        def shifted(step):
            moved = {name: x + step * direction[name] for name, x in arrays.items()}
            return oracle_gradient(CASE, {**moved, **lengths})

        step = 1e-5
        plus, minus = shifted(step), shifted(-step)
        want = {name: (plus[name] - minus[name]) / (2 * step) for name in arrays}
        forward_over_reverse = jax.jvp(jax.grad(loss), (arrays,), (direction,))[1]
        reverse_over_reverse = jax.grad(
            lambda x: sum(jnp.vdot(g, direction[n]) for n, g in jax.grad(loss)(x).items())
        )(arrays)
        for got in (forward_over_reverse, reverse_over_reverse):
            for name, expected in want.items():
                check_array(got[name], expected, 1e-8, name)


@pytest.mark.slow
def test_hessian_of_the_query():
    case = case_of((4,), (3,), batch=1, heads_per_kv=1, head_dim=2, value_dim=1)
    with jax.enable_x64(True):
        arrays = case.inputs(np.float64)
        loss = lambda query: small_loss(case)({**arrays, "query": query})
        hessian = jax.hessian(loss)(arrays["query"]).reshape(8, 8)
        check_array(hessian, np.asarray(hessian).T, 1e-12)
        columns = []
        for unit in np.eye(8).reshape(8, *arrays["query"].shape):
            plus, minus = (
                oracle_gradient(case, {**arrays, "query": arrays["query"] + step * unit})["query"]
                for step in (1e-5, -1e-5)
            )
            columns.append((plus - minus).ravel() / 2e-5)
        check_array(hessian, np.stack(columns), 1e-8)


def test_takes_no_tiles():
    with pytest.raises(NotImplementedError, match="reference is dense and has no tiles"):
        attend(CASE, CASE.inputs(np.float32), implementation="reference", tiles=Tiles((1, 1), None))
