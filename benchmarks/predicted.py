"""What the simulator's cost model says gna takes: printed beside every measurement, so that its error is seen."""

import jax
import jax.numpy as jnp
from cases import CASES
from worker import FORWARD

import gna_jax
from gna_jax.simulator.query_box_cost import choose_tiles, predicted_time

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def predicted_seconds(case: str, dtype: str, direction: str) -> float:
    """Predicted seconds of one call of gna's xla backend on a CPU."""
    one = CASES[case]
    tokens = jax.ShapeDtypeStruct((1, *one.layout, one.heads, one.dim), DTYPES[dtype])
    told = gna_jax.explain(tokens, tokens, tokens, window_size=one.window, device="cpu")
    passes = (False,) if direction == FORWARD else (False, True)
    problem = told.problem
    times = (predicted_time(problem, choose_tiles(problem, back), back) for back in passes)
    return sum(time.total for time in times) * 1e-9
