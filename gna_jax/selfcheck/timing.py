"""A kernel at sizes that others have published, beside cuDNN's dense attention of the same tokens and the simulator's prediction.

The calls take turns as `gna_jax.tuning.time_in_turns` deals them out. The whole suite, with other peers: `benchmarks/attention.py`.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gna_jax import backends
from gna_jax.attention import gna
from gna_jax.device import resolve_device
from gna_jax.problem import Problem
from gna_jax.selfcheck.machine import interpreted, problem_of
from gna_jax.selfcheck.processes import Send
from gna_jax.simulator import Simulation, predict
from gna_jax.simulator.cost import FORWARD_PRODUCTS, FUSED_BACKWARD_PRODUCTS
from gna_jax.simulator.counts import attended_pairs
from gna_jax.simulator.devices import is_known
from gna_jax.simulator.presets import PRESETS
from gna_jax.tiling import Tiles
from gna_jax.tuning import predicted_seconds, time_in_turns
from gna_jax.verification import Trial, one_line

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
PRODUCTS = {FORWARD: FORWARD_PRODUCTS, BOTH: FORWARD_PRODUCTS + FUSED_BACKWARD_PRODUCTS}
"""Useful matrix products per pair that attends, whatever a kernel computes twice."""
ROUNDS = 5


def published(preset: str, rule: int) -> Trial:
    """A preset's call with one of its rules."""
    one = PRESETS[preset]
    return Trial(
        one.layout,
        **dataclasses.asdict(one.rules[rule].neighborhood),
        dtype=one.dtype,
        batch=one.batch,
        heads=one.heads,
        kv_heads=one.kv_heads,
        head_dim=one.head_dim,
        value_dim=one.head_dim,
    )


SIZES = {
    "hunyuan-s16x8x8": published("hunyuan-91", 6),
    "flux-s16": published("flux-4k", 2),
    "1d-s1": published("1d-32k", 0),
    "hunyuan-s1": published("hunyuan-91", 0),
}
"""What is timed, most important first, by the names that `benchmarks/attention.py` has for it."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """One size in one direction.

    Attributes:
      size: name in `SIZES`.
      direction: of `DIRECTIONS`.
      useful_flops: of the pairs that attend.
      predicted: seconds by the cost model; None where it does not know the device.
      seconds, dense: of a call of the kernel and of cuDNN's, one per round; empty where it was not timed.
      failure, dense_failure: why not.
    """

    size: str
    direction: str
    useful_flops: int
    predicted: float | None
    seconds: tuple[float, ...] = ()
    dense: tuple[float, ...] = ()
    failure: str = ""
    dense_failure: str = ""

    @property
    def useful_tflops(self) -> float | None:
        """Useful flops per second at the median, in 1e12."""
        return self.useful_flops / statistics.median(self.seconds) / 1e12 if self.seconds else None

    @property
    def times_dense(self) -> float | None:
        """Dense attention's median over the kernel's."""
        if not (self.seconds and self.dense):
            return None
        return statistics.median(self.dense) / statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class EmptyCall:
    """Seconds of a call that computes nothing to speak of: times near it are those of starting a call."""

    seconds: float


def measure(send: Send, implementation: str, interpret: str | None) -> None:
    """Send an `EmptyCall`, then a `Timed` per size and direction; interpreted calls are predicted and not timed."""
    with interpreted(interpret):
        device = resolve_device(None)
        if interpret is None:
            one, empty = jnp.zeros(8), jax.jit(lambda x: x + 1.0)
            send(EmptyCall(statistics.median(time_in_turns([_ready(empty, one)], ROUNDS)[0])))
        for size, trial in SIZES.items():
            problem = problem_of(trial, device)
            for direction in DIRECTIONS:
                timed = Timed(
                    size, direction, useful_flops(trial, direction),
                    predicted(problem, implementation, direction),
                )  # fmt: skip
                send(timed if interpret else _measured(timed, trial, implementation))


def _measured(timed: Timed, trial: Trial, implementation: str) -> Timed:
    """The kernel and cuDNN's dense attention, in turns; one that fails leaves the other its time."""
    rule = dataclasses.asdict(trial.neighborhood)
    operands = trial.operands(0)
    query, key, value = operands["query"], operands["key"], operands["value"]
    flat = lambda x: x.reshape(x.shape[0], math.prod(trial.layout), *x.shape[-2:])
    kernel = functools.partial(gna, **rule, implementation=implementation)
    dense = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    runs: dict[str, Callable[[], Any]] = {}
    failures = {"seconds": "", "dense": ""}
    for name, attention, view in (("seconds", kernel, lambda x: x), ("dense", dense, flat)):
        call = _call(attention, timed.direction)
        try:
            runs[name] = _ready(jax.jit(call), *map(view, (query, key, value)))
        except Exception as error:  # whatever ends one is its answer, and belongs into the report
            failures[name] = one_line(error)
    seconds = dict(zip(runs, time_in_turns(list(runs.values()), ROUNDS), strict=True))
    return dataclasses.replace(
        timed, **seconds, failure=failures["seconds"], dense_failure=failures["dense"]
    )


def _call(attention: Callable[..., jax.Array], direction: str) -> Callable[..., Any]:
    """`attention`, or it and its gradients by query, key and value, with out as its own cotangent."""
    if direction == FORWARD:
        return attention

    def both(*arrays: jax.Array) -> Any:
        out, pull_back = jax.vjp(attention, *arrays)
        return out, pull_back(out)

    return both


def _ready(compiled: Callable[..., Any], *arrays: jax.Array) -> Callable[[], Any]:
    """A run that has been compiled, and has run once."""
    run = functools.partial(compiled, *arrays)
    jax.block_until_ready(run())
    return run


def useful_flops(trial: Trial, direction: str) -> int:
    """Of the pairs that attend, and of no other."""
    pairs = attended_pairs(trial.neighborhood, trial.layout) * trial.batch * trial.heads
    return 2 * PRODUCTS[direction] * pairs * trial.head_dim


def predicted(problem: Problem, implementation: str, direction: str) -> float | None:
    """What the cost model says of the implementation's kernels with its own tiles; None for a device or kernels it does not know."""
    work = backends.load(implementation).workload(problem, None)
    tiles = work.tiles
    if work.seconds is None or tiles is None or tiles.kv is None or not is_known(problem.device):
        return None
    forward = predicted_seconds(problem, "forward", tiles)
    if direction == FORWARD:
        return forward
    pair = Tiles(q=tiles.q, kv=tiles.kv, dynamic=tiles.dynamic)
    backward = predict(
        Simulation.of(problem.neighborhood, problem.global_layout, pair),
        batch=problem.batch,
        heads=problem.query_heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        dtype=problem.dtype.name,
        device=problem.device,
        direction="backward",
    )
    # dQ walks as the forward does; dK and dV walk their own tiles.
    own = predicted_seconds(problem, "backward", tiles)
    return forward + backward.seconds - sum(backward.kernel_seconds[1:]) + own
