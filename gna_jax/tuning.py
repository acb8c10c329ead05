"""Tiles measured on this GPU: the cost model's best candidates, timed in turns beside the default.

The forward and the kernel of dK and dV are tuned apart; dQ takes the forward's tiles and has no say. `gna-jax tune` prints what
came of it and writes it where calls find it (`gna_jax.backends.mosaic.tuned`).
"""

import bisect
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from gna_jax import backends
from gna_jax.device import resolve_device
from gna_jax.problem import Problem
from gna_jax.simulator import Simulation, predict
from gna_jax.simulator.cost import FORWARD_PRODUCTS, key_gradient_products
from gna_jax.simulator.counts import attended_pairs
from gna_jax.simulator.devices import device_rates
from gna_jax.simulator.roofline import Direction
from gna_jax.tiling import Tiles

if TYPE_CHECKING:
    from gna_jax.backends.mosaic.tuned import Entry

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

TURN_SECONDS = 0.05
"""A kernel's turn in a round is as many calls as take about this long, or `MOST_CALLS`: starting one call takes microseconds."""
MOST_CALLS = 100

MOST_DIFFERENCE = {"bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference from the default's results, as a share of their largest entry: weights are rounded to 8 or 11 bits, and
differently in other tiles."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Tiles to try.

    Attributes:
      tiles: all four shapes; those of the other direction are the default's.
      predicted_seconds: of the kernel whose tiles they are.
      is_default: whether a call gets them where no table has any.
    """

    tiles: Tiles
    predicted_seconds: float
    is_default: bool

    def pair(self, direction: Direction) -> tuple[Any, Any]:
        """Q and KV tile of a direction."""
        return _pair(self.tiles, direction)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A candidate's times.

    Attributes:
      seconds: of a call, one per round; none where it failed.
      failure: why it has none: an error, or results other than the default's.
    """

    candidate: Candidate
    seconds: tuple[float, ...] = ()
    failure: str = ""

    @property
    def median(self) -> float:
        """Median seconds of a call; infinite without times."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def spread(self) -> float:
        """Seconds between the quartiles of the rounds; 0 with fewer than two."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return third - first


Report = Callable[[str], None]
Measure = Callable[[Problem, Direction, Sequence[Candidate], int, Report], list[Measurement]]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What came of a call's tuning: the measurements of each direction, the default's first."""

    problem: Problem
    forward: tuple[Measurement, ...]
    backward: tuple[Measurement, ...]

    def entry(self, date: str, versions: dict[str, str]) -> "Entry":
        """As it stands in a table."""
        from gna_jax.backends.mosaic.tuned import Entry, Timed

        def timed(direction: Direction) -> Timed:
            measurements = getattr(self, direction)
            best = winner(measurements)
            return Timed(
                *best.candidate.pair(direction),
                seconds=best.median,
                predicted_seconds=best.candidate.predicted_seconds,
                default_seconds=measurements[0].median,
            )

        return Entry(
            timed("forward"),
            timed("backward"),
            batch=self.problem.batch,
            heads=self.problem.query_heads,
            kv_heads=self.problem.kv_heads,
            date=date,
            versions=versions,
        )


def tune(
    problem: Problem,
    *,
    num_candidates: int = 8,
    rounds: int = 5,
    measure: Measure | None = None,
    report: Report = lambda text: None,
) -> Tuning:
    """Measure the best candidates of both directions, and the default, on the default device.

    Args:
      problem: the call, described for the default device.
      num_candidates: candidates per direction, as `candidates`.
      rounds: turns that every candidate gets.
      measure: times candidates; `measure_kernels` where None.
      report: called with what is being done.

    Raises:
      ValueError: for fewer than one candidate or round.
      NotImplementedError: the kernels do not take the call.
      RuntimeError: without a GPU, and where the default's tiles fail.
    """
    if min(num_candidates, rounds) < 1:
        raise ValueError(
            f"tuning needs at least one candidate and one round; got {num_candidates} candidates, {rounds} rounds"
        )
    if measure is None:
        check_gpu()
        measure = measure_kernels
    tried = {d: candidates(problem, d, num_candidates, report) for d in DIRECTIONS}
    done = {d: tuple(measure(problem, d, tried[d], rounds, report)) for d in DIRECTIONS}
    for measurements in done.values():
        winner(measurements)  # a default that failed is an error now rather than in the table
    return Tuning(problem, **done)


def check_gpu() -> None:
    """Raise RuntimeError unless the default device is a real GPU."""
    device = resolve_device(None)
    if device.platform != "cuda" or device.is_interpreted:
        played = " (played by the interpreter)" if device.is_interpreted else ""
        raise RuntimeError(
            f"tuning measures kernels on an NVIDIA GPU; the default device is {device.kind}{played}:"
            " run it where there is one, or list the candidates without one: --dry-run --device h200"
        )


def candidates(
    problem: Problem, direction: Direction, most: int, report: Report = lambda text: None
) -> tuple[Candidate, ...]:
    """The default, then `most` others (fewer where there are no more), by predicted time, fastest first.

    They are dealt out over the sizes of visited tiles, each size giving its fastest in turn, the largest size first: the cost
    model charges nothing for a visit itself, so that by its times alone nearly all would visit the smallest tiles there are.

    Raises:
      NotImplementedError: the kernels do not take the call.
      ValueError: for a device that the cost model does not know.
    """
    backends.choose(problem, "mosaic", None)
    from gna_jax.backends.mosaic.tiles import counted, legal_tiles

    report(f"{direction}: ranking tiles")
    default = counted(problem)
    of_size: dict[int, list[Tiles]] = {}
    for tiles in legal_tiles(problem, direction):
        if _pair(tiles, direction) != _pair(default, direction):
            q, kv = _pair(tiles, direction)
            of_size.setdefault(math.prod(kv if direction == "forward" else q), []).append(tiles)
    fastest = [_fastest(problem, direction, of_size[size], most) for size in sorted(of_size)[::-1]]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*fastest))
    chosen = [candidate for candidate in turns if candidate is not None][:most]
    own = Candidate(default, predicted_seconds(problem, direction, default), is_default=True)
    return own, *sorted(chosen, key=lambda candidate: candidate.predicted_seconds)


def _fastest(
    problem: Problem, direction: Direction, legal: Sequence[Tiles], most: int
) -> list[Candidate]:
    """The `most` with the shortest predicted times, fastest first; among equals the first of `legal`."""
    # No kernel is faster than its products: in the order of those, most tiles need not be predicted.
    bounds = [_seconds_of_products(problem, direction, tiles) for tiles in legal]
    best: list[tuple[float, int]] = []
    for number in sorted(range(len(legal)), key=bounds.__getitem__):
        if len(best) == most and bounds[number] > best[-1][0]:
            break
        bisect.insort(best, (predicted_seconds(problem, direction, legal[number]), number))
        del best[most:]
    return [Candidate(legal[number], seconds, is_default=False) for seconds, number in best]


def _pair(tiles: Tiles, direction: Direction) -> tuple[Any, Any]:
    """Q and KV tile of a direction."""
    if direction == "forward":
        return tiles.q, tiles.kv
    return tiles.backward_q, tiles.backward_kv


def _simulation(problem: Problem, direction: Direction, tiles: Tiles) -> Simulation:
    pair = Tiles(*_pair(tiles, direction), dynamic=True)
    return Simulation.of(problem.neighborhood, problem.global_layout, pair)


def predicted_seconds(problem: Problem, direction: Direction, tiles: Tiles) -> float:
    """What the cost model says of the forward kernel, or of those of dK and dV, with these tiles."""
    from gna_jax.backends.mosaic.head_dims import padded_head_dim

    prediction = predict(
        _simulation(problem, direction, tiles),
        batch=problem.batch,
        heads=problem.query_heads,
        kv_heads=problem.kv_heads,
        head_dim=padded_head_dim(problem),
        dtype=problem.dtype.name,
        device=problem.device,
        direction=direction,
    )
    seconds = prediction.kernel_seconds
    return seconds[0] if direction == "forward" else sum(seconds[1:])


def _seconds_of_products(problem: Problem, direction: Direction, tiles: Tiles) -> float:
    """Less than `predicted_seconds`: the matrix products alone, over all SMs, at the efficiency that it assumes."""
    from gna_jax.backends.mosaic.head_dims import padded_head_dim

    simulation, rates = _simulation(problem, direction, tiles), device_rates(problem.device)
    is_forward, head_dim = direction == "forward", padded_head_dim(problem)
    counts = simulation.forward if is_forward else simulation.backward
    products = FORWARD_PRODUCTS if is_forward else sum(key_gradient_products(head_dim))
    pairs = counts.computed_pairs * problem.batch * problem.query_heads
    flops = 2 * products * pairs * head_dim
    speed = rates.mma_16bit * rates.clock * rates.spec.num_sms * rates.forward_efficiency
    return flops / speed


def winner(measurements: Sequence[Measurement]) -> Measurement:
    """The fastest, if it beats the default by more than either of them spreads; else the default.

    Raises:
      RuntimeError: where the default failed.
    """
    default = next(one for one in measurements if one.candidate.is_default)
    if not default.seconds:
        raise RuntimeError(
            f"the default's tiles failed, so there is nothing to compare with: {default.failure};"
            " see what `gna-jax verify` says"
        )
    best = min(measurements, key=lambda one: one.median)
    gain = default.median - best.median
    return best if gain > max(best.spread, default.spread) else default


def measure_kernels(
    problem: Problem,
    direction: Direction,
    tried: Sequence[Candidate],
    rounds: int,
    report: Report = lambda text: None,
) -> list[Measurement]:
    """Compile every candidate's kernel, compare its results with those of the first, and time them in turns.

    What ends a candidate, an error or other results, becomes its `failure`.
    """
    failures, runs, want = {}, {}, None
    arrays: Any = None
    for number, candidate in enumerate(tried):
        report(f"{direction}: compiling {number + 1} of {len(tried)}")
        try:
            kernel = _kernel(problem, direction, candidate.tiles)
            arrays = _random_arrays(problem, kernel.arguments) if arrays is None else arrays
            run = functools.partial(jax.jit(kernel.call), *arrays)
            got = jax.block_until_ready(run())
            want = got if want is None else want
            apart = map(_difference, jax.tree.leaves(got), jax.tree.leaves(want))
            wrong = [one for one in apart if not one <= MOST_DIFFERENCE[problem.dtype.name]]
            if wrong:  # NaN is wrong as well
                failures[number] = f"its results are not the default's: {wrong[0]:.2g} apart"
            else:
                runs[number] = run
        # Whatever ends a kernel is the answer, and belongs into the report.
        except Exception as error:
            failures[number] = " ".join(f"{type(error).__name__}: {error}".split())
    seconds = dict(zip(runs, time_in_turns(list(runs.values()), rounds, report), strict=True))
    return [
        Measurement(candidate, seconds.get(number, ()), failures.get(number, ""))
        for number, candidate in enumerate(tried)
    ]


def _kernel(problem: Problem, direction: Direction, tiles: Tiles) -> Any:
    """The kernel whose tiles a direction tunes: the forward, or that of dK and dV, which is the last."""
    kernels = backends.load("mosaic").kernels(problem, tiles)
    return kernels[0] if direction == "forward" else kernels[-1]


def _random_arrays(problem: Problem, arguments: Any) -> Any:
    """Standard normal tokens; rows of lse (and delta) as windows of equal scores have, so that weights are weights."""
    tokens = math.prod(problem.global_layout)
    lse = math.log(attended_pairs(problem.neighborhood, problem.global_layout) / tokens)
    leaves, tree = jax.tree.flatten(arguments)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def array(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype == jnp.float32:
            return jnp.full(like.shape, lse, jnp.float32)
        return jax.random.normal(key, like.shape, like.dtype)

    return jax.tree.unflatten(tree, map(array, keys, leaves))


@jax.jit
def _difference(got: jax.Array, want: jax.Array) -> jax.Array:
    """Largest difference over the largest wanted entry."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want))


def time_in_turns(
    runs: Sequence[Callable[[], Any]],
    rounds: int,
    report: Report = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, ...]]:
    """Seconds per call of every compiled run, one per round; the clock stops when the results are there.

    Round after round every run has its turn, and every round starts with another: what the machine does meanwhile meets all.
    """

    def turn(run: Callable[[], Any], calls: int) -> float:
        start = clock()
        results = None
        for _ in range(calls):
            results = run()
        jax.block_until_ready(results)
        return (clock() - start) / calls

    calls = [max(1, min(MOST_CALLS, round(TURN_SECONDS / turn(run, 1)))) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        report(f"timing: round {number + 1} of {rounds}")
        for place in range(len(runs)):
            run = (number + place) % len(runs)
            seconds[run].append(turn(runs[run], calls[run]))
    return [tuple(one) for one in seconds]
