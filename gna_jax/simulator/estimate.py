"""What a rule amounts to in a model: counts, closeness, predicted times and the effect on a whole run, in one flat record."""

import dataclasses

from gna_jax.simulator.cost import predict, predict_dense
from gna_jax.simulator.end_to_end import end_to_end_speedup
from gna_jax.simulator.presets import Preset
from gna_jax.simulator.search import closeness
from gna_jax.simulator.simulation import Simulation


@dataclasses.dataclass(frozen=True)
class Setting:
    """What surrounds the attention: device, heads, text tokens, and the run it is part of.

    Attributes:
      device: name of a device that the cost model knows.
      batch, heads, kv_heads, head_dim, dtype: of the call.
      additional_keys: keys outside the layout that every query sees.
      attention_share: share of a dense run's time that is self attention; None where unknown.
      steps, dense_steps: sampling steps of the run, and those that stay dense.
    """

    device: str
    batch: int = 1
    heads: int = 24
    kv_heads: int = 24
    head_dim: int = 128
    dtype: str = "bfloat16"
    additional_keys: int = 0
    attention_share: float | None = None
    steps: int = 1
    dense_steps: int = 0

    @classmethod
    def of(cls, preset: Preset, device: str, additional_keys: int = 0) -> "Setting":
        """A preset's setting on a device."""
        return cls(
            device=device,
            batch=preset.batch,
            heads=preset.heads,
            kv_heads=preset.kv_heads,
            head_dim=preset.head_dim,
            dtype=preset.dtype,
            additional_keys=additional_keys,
            attention_share=preset.attention_share,
            steps=preset.steps or 1,
            dense_steps=preset.dense_steps or 0,
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One rule with its tiles, in numbers. Speedups are over dense attention of the same layout.

    Attributes:
      window_size, stride, dilation, is_causal: the rule.
      q_tile, kv_tile, dynamic: its tiles.
      sparsity, closeness, flop_speedup, total_work_speedup, worst_tile_speedup: exact, as in `Simulation` and `closeness`.
      masked_tile_share, padded_share, load_imbalance: exact.
      seconds, dense_seconds: predicted times of one forward call; no measurement.
      bound: the resource that the prediction says binds.
      end_to_end: Amdahl's estimate for a whole run with the predicted speedup; None without an attention share.
    """

    window_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    dynamic: bool
    sparsity: float
    closeness: float
    flop_speedup: float
    total_work_speedup: float
    worst_tile_speedup: float
    masked_tile_share: float
    padded_share: float
    load_imbalance: float
    seconds: float
    dense_seconds: float
    bound: str
    end_to_end: float | None

    @property
    def predicted_speedup(self) -> float:
        """`dense_seconds / seconds`."""
        return self.dense_seconds / self.seconds


def estimate(simulation: Simulation, setting: Setting) -> Estimate:
    """Predict a simulation's time in a setting, forward.

    Raises:
      ValueError: for a device or dtype that the cost model does not know.
    """
    call = {
        "batch": setting.batch,
        "heads": setting.heads,
        "kv_heads": setting.kv_heads,
        "head_dim": setting.head_dim,
        "dtype": setting.dtype,
        "device": setting.device,
    }
    prediction = predict(simulation, **call)
    dense = predict_dense(simulation.layout, additional_keys=simulation.additional_keys, **call)
    end_to_end = None
    if setting.attention_share is not None:
        end_to_end = end_to_end_speedup(
            setting.attention_share,
            dense.seconds / prediction.seconds,
            steps=setting.steps,
            dense_steps=setting.dense_steps,
        )
    rule = simulation.neighborhood
    return Estimate(
        window_size=rule.window_size,
        stride=rule.stride,
        dilation=rule.dilation,
        is_causal=rule.is_causal,
        q_tile=simulation.tiles.q,
        kv_tile=simulation.tiles.kv or (),
        dynamic=bool(simulation.tiles.dynamic),
        sparsity=simulation.sparsity,
        closeness=closeness(rule, simulation.layout),
        flop_speedup=simulation.flop_speedup,
        total_work_speedup=simulation.total_work_speedup,
        worst_tile_speedup=simulation.worst_tile_speedup,
        masked_tile_share=simulation.masked_tile_share,
        padded_share=simulation.padded_share,
        load_imbalance=simulation.load_imbalance,
        seconds=prediction.seconds,
        dense_seconds=dense.seconds,
        bound=prediction.bound,
        end_to_end=end_to_end,
    )
