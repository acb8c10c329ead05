"""`explain`: what a call would run, with which tiles, and why not the other implementations."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gna_jax import backends
from gna_jax.attention import as_operands, check_tiles, problem_of
from gna_jax.device import DeviceSpec
from gna_jax.neighborhood import Flags, Sizes
from gna_jax.problem import Problem
from gna_jax.simulator.counts import attended_pairs
from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `gna` would do with the same arguments. `print` it.

    Attributes:
      implementation: name of the backend that runs.
      tiles: query (and key) tiles it uses; None for the dense reference.
      reasons: (name, reason) of every implementation that the ladder passed over, in order.
      masked_share: share of the computed query-key pairs that pass through a mask.
      useful_share: share of the computed query-key pairs that attend to each other.
      dense_share: computed pairs over those of dense attention on the layout.
      problem: shapes, dtype, geometry and device the answer is for.
    """

    implementation: str
    tiles: Tiles | None
    reasons: tuple[tuple[str, str], ...]
    masked_share: float
    useful_share: float
    dense_share: float
    problem: Problem

    def __str__(self) -> str:
        """A table for people."""
        problem, rule = self.problem, self.problem.neighborhood
        causal = [n for n, flag in enumerate(rule.is_causal) if flag]
        lines = [
            f"{self.implementation} on {problem.device.kind}, {problem.dtype.name}",
            f"  layout    {_by(problem.global_layout)} tokens, batch {problem.batch},"
            f" {problem.query_heads} heads ({problem.kv_heads} key/value) x {problem.head_dim}",
            f"  window    {_by(rule.window_size)}, stride {_by(rule.stride)}, dilation {_by(rule.dilation)}"
            + (f", causal axes {causal}" if causal else ""),
            f"  tiles     {_tiles(self.tiles)}",
            f"  pairs     {self.dense_share:.2%} of dense attention computed;"
            f" {self.useful_share:.1%} of those are attended, {self.masked_share:.1%} pass a mask",
        ]
        lines += [f"  not {name:<9} {reason}" for name, reason in self.reasons]
        return "\n".join(lines)


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
        reasons=choice.reasons,
        masked_share=work.masked_pairs / work.computed_pairs,
        useful_share=attended / work.computed_pairs,
        dense_share=work.computed_pairs / math.prod(problem.global_layout) ** 2,
        problem=problem,
    )


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)


def _tiles(tiles: Tiles | None) -> str:
    if tiles is None:
        return "none"
    parts = [f"{_by(tiles.q)} queries"]
    if tiles.kv is not None:
        parts.append(f"{_by(tiles.kv)} keys")
    if tiles.backward_q is not None:
        parts.append(f"backward {_by(tiles.backward_q)} queries")
    if tiles.backward_kv is not None:
        parts.append(f"{_by(tiles.backward_kv)} keys")
    return ", ".join(parts)
