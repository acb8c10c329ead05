"""The analytical simulator: what a window costs in tiles and time, before anything runs. The public names."""

from gna_jax.simulator.budgets import TileBudget as TileBudget
from gna_jax.simulator.budgets import tile_budget as tile_budget
from gna_jax.simulator.cost import Prediction as Prediction
from gna_jax.simulator.cost import predict as predict
from gna_jax.simulator.cost import predict_dense as predict_dense
from gna_jax.simulator.end_to_end import end_to_end_speedup as end_to_end_speedup
from gna_jax.simulator.presets import PRESETS as PRESETS
from gna_jax.simulator.presets import Preset as Preset
from gna_jax.simulator.search import Candidate as Candidate
from gna_jax.simulator.search import SearchResult as SearchResult
from gna_jax.simulator.search import closeness as closeness
from gna_jax.simulator.search import recommend as recommend
from gna_jax.simulator.search import search as search
from gna_jax.simulator.simulation import Simulation as Simulation
from gna_jax.simulator.simulation import simulate as simulate
from gna_jax.simulator.tile_shapes import best_tiles as best_tiles

__all__ = [
    "PRESETS",
    "Candidate",
    "Prediction",
    "Preset",
    "SearchResult",
    "Simulation",
    "TileBudget",
    "best_tiles",
    "closeness",
    "end_to_end_speedup",
    "predict",
    "predict_dense",
    "recommend",
    "search",
    "simulate",
    "tile_budget",
]
