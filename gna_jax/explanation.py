"""`explain`: what a call would run, with which tiles, and why not the other implementations."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gna_jax import backends
from gna_jax.attention import as_operands, check_tiles, problem_of
from gna_jax.device import DeviceSpec
from gna_jax.neighborhood import Flags, Sizes, by
from gna_jax.problem import Problem
from gna_jax.simulator import Simulation, best_tiles, predict, predict_dense, tile_budget
from gna_jax.simulator.cost import duration
from gna_jax.simulator.counts import attended_pairs
from gna_jax.simulator.devices import is_known
from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `gna` would do with the same arguments. `print` it.

    Attributes:
      implementation: name of the backend that runs.
      tiles: query (and key) tiles it uses; None for the dense reference.
      tiles_from: `"tuned on <date>"` where `gna-jax tune` measured them, else empty.
      reasons: (name, reason) of every implementation that the ladder passed over, in order.
      masked_share: share of the computed query-key pairs that pass through a mask.
      useful_share: share of the computed query-key pairs that attend to each other.
      dense_share: computed pairs over those of dense attention on the layout.
      predicted: predicted seconds of the forward; None where the cost model knows nothing of this implementation here.
      predicted_kernel: on a GPU that the cost model knows, predicted seconds of a GPU kernel with the best tiles, whether or
        not one runs; None elsewhere.
      predicted_dense: predicted seconds of dense attention on the same tokens, by good GPU kernels, or on a CPU by this
        package's own backend; None where nothing is known.
      copies: what the implementation copies before it can read it: padding for dilation or head dims.
      problem: shapes, dtype, geometry and device the answer is for.
    """

    implementation: str
    tiles: Tiles | None
    tiles_from: str
    reasons: tuple[tuple[str, str], ...]
    masked_share: float
    useful_share: float
    dense_share: float
    predicted: float | None
    predicted_kernel: float | None
    predicted_dense: float | None
    copies: tuple[str, ...]
    problem: Problem

    def __str__(self) -> str:
        """A table for people."""
        problem, rule = self.problem, self.problem.neighborhood
        causal = [n for n, flag in enumerate(rule.is_causal) if flag]
        lines = [
            f"{self.implementation} on {problem.device.kind}, {problem.dtype.name}",
            f"  layout    {by(problem.global_layout)} tokens, batch {problem.batch},"
            f" {problem.query_heads} heads ({problem.kv_heads} key/value) x {problem.head_dim}",
            f"  window    {by(rule.window_size)}, stride {by(rule.stride)}, dilation {by(rule.dilation)}"
            + (f", causal axes {causal}" if causal else ""),
            f"  tiles     {_tiles(self.tiles)}"
            + (f" ({self.tiles_from})" if self.tiles_from else ""),
            f"  pairs     {self.dense_share:.2%} of dense attention computed;"
            f" {self.useful_share:.1%} of those are attended, {self.masked_share:.1%} pass a mask",
            f"  forward   {self._times()}",
            *(f"  copy      {copy}" for copy in self.copies),
        ]
        names_of: dict[str, list[str]] = {}
        for name, reason in self.reasons:
            names_of.setdefault(reason, []).append(name)
        lines += [f"  not {', '.join(names)}: {reason}" for reason, names in names_of.items()]
        return "\n".join(lines)

    def _times(self) -> str:
        own = f"{duration(self.predicted or 0)} predicted"
        if self.predicted is None:
            own = f"no prediction for {self.implementation} on this device"
        if self.predicted_dense is None:
            return own
        dense = f"dense attention {duration(self.predicted_dense)}"
        if self.predicted_kernel is None:
            return f"{own}; {dense}"
        return f"{own}; a GPU kernel {duration(self.predicted_kernel)} predicted, {dense}"


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    additional_lengths: Any = None,
    relative_position_bias: Any = None,
    return_lse: bool = False,
    precision: Any = None,
    implementation: str | Sequence[str] | None = None,
    tiles: Tiles | None = None,
    device: str | DeviceSpec | None = None,
) -> Explanation:
    """What `gna` would run with these arguments; computes nothing.

    Arguments as in `gna`; arrays may be `jax.ShapeDtypeStruct`s. Raises what `gna` raises.

    >>> import jax, jax.numpy as jnp, gna_jax
    >>> x = jax.ShapeDtypeStruct((1, 64, 64, 4, 64), jnp.bfloat16)
    >>> gna_jax.explain(x, x, x, window_size=16, stride=16, device="cpu").implementation
    'xla'
    """
    del return_lse  # changes nothing that is explained
    operands = as_operands(
        query,
        key,
        value,
        additional=(additional_keys, additional_values, additional_lengths),
        bias=relative_position_bias,
    )
    problem = problem_of(
        operands,
        window_size=window_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        precision=precision,
        device=device,
    )
    check_tiles(tiles, problem)
    choice = backends.choose(problem, implementation, tiles)
    work = backends.load(choice.name).workload(problem, tiles)
    attended = attended_pairs(problem.neighborhood, problem.global_layout)
    return Explanation(
        implementation=choice.name,
        tiles=work.tiles,
        tiles_from=work.tiles_from,
        reasons=choice.reasons,
        masked_share=work.masked_pairs / work.computed_pairs,
        useful_share=attended / work.computed_pairs,
        dense_share=work.computed_pairs / math.prod(problem.global_layout) ** 2,
        predicted=work.seconds,
        predicted_kernel=_kernel_seconds(problem),
        predicted_dense=_dense_seconds(problem),
        copies=work.copies,
        problem=problem,
    )


def _kernel_seconds(problem: Problem) -> float | None:
    if not _is_modelled_gpu(problem):
        return None
    budget = tile_budget(problem.device)
    tiles = best_tiles(
        problem.neighborhood,
        problem.global_layout,
        budget.q_elements,
        budget.kv_elements,
        budget.dynamic,
        additional_keys=problem.num_additional,
    )
    simulation = Simulation.of(
        problem.neighborhood, problem.global_layout, tiles, problem.num_additional
    )
    return predict(simulation, **_call(problem)).seconds


def _dense_seconds(problem: Problem) -> float | None:
    if problem.device.platform != "cpu" and not _is_modelled_gpu(problem):
        return None
    additional = problem.num_additional
    dense = predict_dense(problem.global_layout, additional_keys=additional, **_call(problem))
    return dense.seconds


def _is_modelled_gpu(problem: Problem) -> bool:
    return is_known(problem.device) and problem.dtype != np.float64


def _call(problem: Problem) -> dict[str, Any]:
    """The cost model's arguments; it knows one head dim, and products cost by the sum of both."""
    return {
        "batch": problem.batch,
        "heads": problem.query_heads,
        "kv_heads": problem.kv_heads,
        "head_dim": (problem.head_dim + problem.value_dim + 1) // 2,
        "dtype": problem.out_dtype.name,
        "device": problem.device,
    }


def _tiles(tiles: Tiles | None) -> str:
    if tiles is None:
        return "none"
    parts = [f"{by(tiles.q)} queries"]
    if tiles.kv is not None:
        parts.append(f"{by(tiles.kv)} keys")
    if tiles.backward_q is not None:
        parts.append(f"backward {by(tiles.backward_q)} queries")
    if tiles.backward_kv is not None:
        parts.append(f"{by(tiles.backward_kv)} keys")
    return ", ".join(parts)
