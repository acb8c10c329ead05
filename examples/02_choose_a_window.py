"""Choose a window before anything runs: what a rule costs in tiles, which stride is worth it, what a whole run gains.

    python examples/02_choose_a_window.py

Two seconds on two CPU cores; no GPU is asked, the numbers are computed. Last line: `whole run: 1.52x faster`
"""

from gna_jax.simulator import (
    end_to_end_speedup,
    predict,
    predict_dense,
    recommend,
    search,
    simulate,
)

LAYOUT = (16, 44, 80)  # Cosmos-Predict1, 5 seconds of 720p
HEADS, DIM = 32, 128

# 1. A rule by hand: a sliding window leaves every tile partly masked, so tiles gain less than FLOPs promise.
sliding = simulate(LAYOUT, window_size=(16, 24, 16), q_tile=(8, 4, 8), kv_tile=(4, 4, 8))
print(f"sliding window: {sliding.sparsity:.1%} of the pairs are left out,")
print(f"  {sliding.flop_speedup:.2f}x fewer FLOPs, {sliding.total_work_speedup:.2f}x fewer tiles")

# 2. The same window with every stride that pays: fastest, and closest to sliding.
for candidate in search(LAYOUT, windows=[(16, 24, 16)], q_tile_elements=256).pareto:
    stride, speedup, kept = candidate.stride, candidate.total_work_speedup, candidate.closeness
    print(f"  stride {stride}: {speedup:.2f}x, {kept:.0%} of the sliding window's pairs are kept")

# 3. Or say only how sparse it shall be.
chosen = recommend(LAYOUT, sparsity=0.85, device="b200")
print(f"for 85 %: window {chosen.window_size}, stride {chosen.stride}")

# 4. In milliseconds on a GPU, by the cost model.
strided = simulate(
    LAYOUT, window_size=(16, 24, 16), stride=(1, 8, 16), q_tile=(8, 4, 8), kv_tile=(4, 4, 8)
)
size = {"heads": HEADS, "head_dim": DIM, "device": "b200"}
dense_time, time = predict_dense(LAYOUT, **size).seconds, predict(strided, **size).seconds
print(f"stride (1, 8, 16) on a B200: {1e3 * time:.1f} ms, dense {1e3 * dense_time:.1f} ms")

# 5. A whole run: attention is 58.7 % of its time, and 12 of 35 steps stay dense.
speedup = end_to_end_speedup(0.587, strided.worst_tile_speedup, steps=35, dense_steps=12)
print(f"whole run: {speedup:.2f}x faster")
