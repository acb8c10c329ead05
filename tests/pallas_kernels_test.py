"""Every Pallas kernel on random calls, in JAX's interpreter with race detection, against float64."""

import pytest
from pallas_suite import BFLOAT16, FLOAT16, FORWARD, KEY_GRADIENT, QUERY_GRADIENT, check, draw

pytestmark = pytest.mark.kernel

GENERATIONS = ("hopper", "blackwell")


def dtype_of(seed):
    return (BFLOAT16, FLOAT16)[seed % 2]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_forward(generation, seed):
    check(draw(seed, generation, FORWARD, 300), generation, FORWARD, dtype_of(seed))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_backward(generation, seed):
    """Half of the calls for dQ, half for dK and dV."""
    job = (QUERY_GRADIENT, KEY_GRADIENT)[seed // 9 % 2]
    check(draw(seed, generation, job, 300), generation, job, dtype_of(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 120))
@pytest.mark.parametrize("job", [FORWARD, QUERY_GRADIENT, KEY_GRADIENT])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_many(generation, job, seed):
    check(draw(seed, generation, job, 2000), generation, job, dtype_of(seed))
