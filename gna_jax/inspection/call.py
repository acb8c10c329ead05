"""A call of `gna` as shapes alone, in JSON's types: it travels to the process that compiles one of its kernels.

Arguments are checked where every call's are (`gna_jax.problem`), kernels and tiles are the mosaic backend's.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from gna_jax import backends
from gna_jax.attention import as_operands, check_tiles, problem_of
from gna_jax.neighborhood import Flags, Sizes
from gna_jax.problem import Problem
from gna_jax.simulator import Simulation, predict
from gna_jax.simulator.devices import is_known
from gna_jax.tiling import Tiles

if TYPE_CHECKING:
    from gna_jax.backends.mosaic.kernels import Kernel


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, window and device of a call.

    Args:
      layout: tokens per axis.
      window_size, stride, dilation, is_causal: as in `gna_jax.gna`.
      batch, heads, kv_heads, head_dim, dtype: of the arrays; `kv_heads` of None equals `heads`.
      device: name of the GPU to compile for, as in `gna_jax.gna`.
      q_tile, kv_tile, backward_q_tile, backward_kv_tile: tiles as in `gna_jax.Tiles`; None leaves them to the backend.
      query_layout, key_layout: tokens per axis of a slab of queries and one of keys of the volume `layout`; either makes the call
        one of `slab_attention`, None is then the whole volume.
    """

    layout: tuple[int, ...]
    window_size: Sizes
    stride: Sizes = 1
    dilation: Sizes = 1
    is_causal: Flags = False
    batch: int = 1
    heads: int = 1
    kv_heads: int | None = None
    head_dim: int = 128
    dtype: str = "bfloat16"
    device: str = "h200"
    q_tile: Sizes | None = None
    kv_tile: Sizes | None = None
    backward_q_tile: Sizes | None = None
    backward_kv_tile: Sizes | None = None
    query_layout: tuple[int, ...] | None = None
    key_layout: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Call":
        """The call whose fields JSON holds: lists become tuples."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)

    def problem(self) -> Problem:
        """The call, checked; raises what `gna` raises."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        is_slab = self.query_layout is not None or self.key_layout is not None
        query, key = (
            jax.ShapeDtypeStruct(
                (self.batch, *(layout or self.layout), heads, self.head_dim), jnp.dtype(self.dtype)
            )
            for layout, heads in ((self.query_layout, self.heads), (self.key_layout, kv_heads))
        )
        origin = jax.ShapeDtypeStruct((len(self.layout),), jnp.int32) if is_slab else None
        return problem_of(
            as_operands(query, key, key, origins=(origin, origin)),
            window_size=self.window_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=None,
            precision=None,
            device=self.device,
            global_layout=self.layout if is_slab else None,
        )

    def tiles(self) -> Tiles | None:
        """The tiles that the call names; None where it names none.

        Raises:
          ValueError: for tiles without `q_tile`, of another rank, or of sizes below 1.
        """
        shapes = self.q_tile, self.kv_tile, self.backward_q_tile, self.backward_kv_tile
        if all(shape is None for shape in shapes):
            return None
        rank = len(self.layout)
        if self.q_tile is None:
            raise ValueError(
                f"tiles need q_tile; got kv_tile={self.kv_tile}, backward_q_tile={self.backward_q_tile},"
                f" backward_kv_tile={self.backward_kv_tile}: name q_tile as well, or leave all to the backend"
            )
        q, *others = ((shape,) * rank if isinstance(shape, int) else shape for shape in shapes)
        return Tiles(q, *others)  # type: ignore[arg-type]

    def kernels(self, direction: str = "both") -> "tuple[Kernel, ...]":
        """The kernels that a GPU would run, forward first; `direction` is `"forward"`, `"backward"` or `"both"`.

        Raises:
          ValueError: for what is never legal.
          NotImplementedError: where the mosaic backend cannot run the call; the reason is the backend's.
        """
        if direction not in ("forward", "backward", "both"):
            raise ValueError(
                f"direction must be forward, backward or both; got direction={direction!r}"
            )
        problem, tiles = self._supported()
        # Only now: the backend loads the kernels.
        from gna_jax.backends import mosaic
        from gna_jax.backends.mosaic.tiles import complete

        kernels = mosaic.kernels(problem, complete(problem, tiles))
        return tuple(one for one in kernels if direction in (one.direction, "both"))

    def copies(self) -> tuple[str, ...]:
        """What `gna` copies before the kernels because they cannot read it as it lies; raises as `kernels`."""
        problem, tiles = self._supported()
        return backends.load("mosaic").workload(problem, tiles).copies

    def _supported(self) -> tuple[Problem, Tiles | None]:
        problem, tiles = self.problem(), self.tiles()
        check_tiles(tiles, problem)
        backends.choose(problem, "mosaic", tiles)
        return problem, tiles


def predicted_seconds(kernel: "Kernel") -> float | None:
    """What the cost model says that the kernel takes with its tiles; None on a device that it does not know."""
    plan, problem = kernel.plan, kernel.plan.problem
    if not is_known(problem.device):
        return None
    simulation = Simulation.of(
        problem.neighborhood,
        problem.global_layout,
        Tiles(q=plan.q_tile, kv=plan.kv_tile, dynamic=True),
    )
    prediction = predict(
        simulation,
        batch=problem.batch,
        heads=problem.query_heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        dtype=problem.dtype.name,
        device=problem.device,
        direction="forward" if kernel.direction == "forward" else "backward",
    )
    backward = "query_gradient", "key_gradient", "value_gradient"
    job = kernel.name.partition("_")[2]
    return prediction.kernel_seconds[0 if job == "forward" else backward.index(job)]
