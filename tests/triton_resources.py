"""The table of docs/deep-dives/triton.md: `python tests/triton_resources.py`, a few minutes, in an environment with Triton.

Default tiles in bfloat16, compiled for GPUs that need not be there. What must hold of them is said in `triton_resources_test.py`.
"""

import jax.numpy as jnp
from triton_suite import GPUS, compiled, problem_of

from gna_jax.backends.triton.tiles import complete, settings
from gna_jax.neighborhood import by

SMALL = ((56, 56), {"window_size": 7})
LARGE = ((16, 32, 32), {"window_size": (8, 16, 16)})
ROWS = (
    ("forward", "forward", SMALL, True),
    ("dQ and the bias", "bias_gradient", SMALL, True),
    ("dK, dV", "key_gradient", SMALL, True),
    ("forward", "forward", LARGE, False),
    ("dQ", "query_gradient", LARGE, False),
    ("dK, dV", "key_gradient", LARGE, False),
)
HEAD = """| kernel | problem | head dim | tiles (q, kv) | warps | registers | shared memory, kB |
|---|---|---|---|---|---|---|"""


def row(name, job, rule, has_bias, dim):
    """Registers per thread and shared memory on the GPUs in their order."""
    problem = problem_of(*rule, dim, jnp.bfloat16, has_bias=has_bias)
    tiles = complete(problem, None, job)
    is_transposed = job == "key_gradient"
    shapes = (tiles.backward_q, tiles.backward_kv) if is_transposed else (tiles.q, tiles.kv)
    window = by(problem.neighborhood.window_size)
    problem_name = f"{by(rule[0])}, w {window}" + ", bias" * has_bias
    got = [compiled(job, problem, capability) for capability in GPUS]
    assert not any(one.spilled for one in got), (name, dim)
    cells = (
        name,
        problem_name,
        str(dim),
        ", ".join(by(shape) for shape in shapes),
        str(settings(problem, job).num_warps),
        " ".join(str(one.registers) for one in got),
        " ".join(f"{one.shared_memory / 1000:.0f}" for one in got),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(HEAD)
    for arguments in ROWS:
        for dim in (32, 64, 128, 256):
            print(row(*arguments, dim), flush=True)
