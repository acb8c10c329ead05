"""The GPU kernels' schedules as they are meant to run: clean tiles in the steady state, at head dim 128, 16 bits.

Lengths are those of the budgets in docs/deep-dives: products at the matrix unit's dense rate, softmax by its exponentials. They are
computed, not measured. Rates are the simulator's.
"""

from gna_jax.pictures.timeline import Lane, Span, Timeline, timeline
from gna_jax.simulator.devices import RATES

HOPPER, BLACKWELL = RATES["h200"], RATES["b200"]
HEAD_DIM = 128


def _product(rows: int, columns: int, flops_per_clock: int) -> float:
    """Clocks of a product of `rows` and `columns` over a head dim."""
    return 2 * rows * columns * HEAD_DIM / flops_per_clock


def _lane(name: str, *spans: tuple[float, float, str, str]) -> Lane:
    return Lane(name, tuple(Span(*span) for span in spans))


def hopper_forward() -> Timeline:
    """Two workers of 64 queries take turns at the matrix unit; KV tiles of 128 keys."""
    product = _product(64, 128, HOPPER.mma_16bit)
    softmax = (
        2 * product
    )  # as long as the other worker multiplies; its exponentials alone would take half of it
    turn = 2 * product
    units, workers = [], ([], [])
    for visit in range(2):
        for worker in range(2):
            start = (2 * visit + worker) * turn
            letter = "AB"[worker]
            tile = f"({visit})"
            units.append((start, product, f"{letter}: P V {tile}", "product"))
            units.append((start + product, product, f"{letter}: Q K ({visit + 1})", "product"))
            workers[worker].append((start + turn, softmax, f"P ({visit + 1})", "softmax"))
    loads = [
        (n * 2 * turn + shift, turn * 0.9, f"{what} ({n + 2})", "copy")
        for n in range(2)
        for what, shift in (("K", 0.0), ("V", turn))
    ]
    return timeline(
        [
            _lane("matrix unit", *units),
            _lane("worker A", *workers[0]),
            _lane("worker B", *workers[1]),
            _lane("producer", *loads),
        ],
        "Hopper forward: 2 x 64 queries, KV tiles of 128 keys; (n) is the number of the tile",
    )


def hopper_key_gradient() -> Timeline:
    """Both workers multiply and derive on their own; the matrix unit serves them as they come."""
    product = _product(64, 64, HOPPER.mma_16bit)
    units, workers = [], ([], [])
    for step, name in enumerate(("S", "dV", "dP", "dK")):
        for worker in range(2):
            start = (step * 2 + worker) * product
            units.append((start, product, f"{'AB'[worker]}: {name}", "product"))
            if name in ("S", "dP"):
                label = "P" if name == "S" else "dS"
                workers[worker].append((start + product, product, label, "softmax"))
    visit = 8 * product
    loads = [(0.0, 0.9 * visit, "Q, dO, lse, delta of the tile after the next", "copy")]
    return timeline(
        [
            _lane("matrix unit", *units),
            _lane("worker A", *workers[0]),
            _lane("worker B", *workers[1]),
            _lane("producer", *loads),
        ],
        "Hopper dK and dV: 2 x 64 keys, one Q tile of 64 queries; all products are of transposes, with the keys as rows",
    )


def blackwell_forward() -> Timeline:
    """One warp issues the products of both parts; each part's warpgroup computes its softmax meanwhile."""
    product = _product(128, 128, BLACKWELL.mma_16bit)
    softmax = 128 * 128 / BLACKWELL.exponentials
    units, workers = [], ([], [])
    for visit in range(2):
        for worker in range(2):
            start = (2 * visit + worker) * 2 * product
            letter = "AB"[worker]
            units.append((start, product, f"{letter}: P V ({visit})", "product"))
            units.append((start + product, product, f"{letter}: Q K ({visit + 1})", "product"))
            workers[worker].append((start + 2 * product, softmax, f"P ({visit + 1})", "softmax"))
    visit = 4 * product
    loads = [
        (n * visit + shift, 0.45 * visit, f"{what} ({n + 2})", "copy")
        for n in range(2)
        for what, shift in (("K", 0.0), ("V", 0.5 * visit))
    ]
    return timeline(
        [
            _lane("matrix warp", *units),
            _lane("softmax A", *workers[0]),
            _lane("softmax B", *workers[1]),
            _lane("copy warp", *loads),
        ],
        "Blackwell forward: 2 x 128 queries, KV tiles of 128 keys; (n) is the number of the tile",
    )


def cutlass_blackwell_forward() -> Timeline:
    """One warp issues all products; two warpgroups have a softmax each, a third rescales the output of both."""
    product = _product(128, 128, BLACKWELL.mma_16bit)
    softmax = 128 * 128 / BLACKWELL.exponentials
    rescaling = 128 * HEAD_DIM / 128  # its multiplications alone, 128 per clock
    copy = 128 * HEAD_DIM * 2 / 64  # at 64 bytes per clock
    units, workers, corrections, loads = [], ([], []), [], []
    for visit in (1, 2):
        start = (visit - 1) * 4 * product
        names = (f"A: Q K ({visit})", f"B: P V ({visit - 1})")
        names += (f"B: Q K ({visit})", f"A: P V ({visit})")
        units += [(start + n * product, product, name, "product") for n, name in enumerate(names)]
        for worker, scores in enumerate((start + product, start + 3 * product)):
            workers[worker].append((scores, softmax, f"P ({visit})", "softmax"))
            # Once the row's largest score is known.
            corrections.append((scores + rescaling, rescaling, "AB"[worker], "rescaling"))
        # A stage is free when both parts have multiplied with what it holds.
        loads.append((start + 2 * product, copy, f"K ({visit + 1})", "copy"))
        loads.append((start + 3 * product, copy, f"V ({visit + 1})", "copy"))
    return timeline(
        [
            _lane("matrix warp", *units),
            _lane("softmax A", *workers[0]),
            _lane("softmax B", *workers[1]),
            _lane("correction", *corrections),
            _lane("load warp", *loads),
        ],
        "CUTLASS forward on Blackwell: 2 x 128 queries, KV tiles of 128 keys; (n) is the number of the visit",
    )


def blackwell_key_gradient() -> Timeline:
    """Two warpgroups share every tile, half of its columns each, one step behind the matrix unit."""
    product = _product(128, 128, BLACKWELL.mma_16bit)
    units, workers = [], []
    for visit in range(2):
        start = visit * 4 * product
        names = (
            f"dV += P dO ({visit})",
            f"S ({visit + 1})",
            f"dK += dS Q ({visit})",
            f"dP ({visit + 1})",
        )
        units += [(start + n * product, product, name, "product") for n, name in enumerate(names)]
        workers.append((start, 2 * product, f"dS ({visit})", "softmax"))
        workers.append((start + 2 * product, 2 * product, f"P ({visit + 1})", "softmax"))
    visit = 4 * product
    loads = [(n * visit, 0.9 * visit, f"Q, dO, lse, delta ({n + 2})", "copy") for n in range(2)]
    return timeline(
        [
            _lane("matrix warp", *units),
            _lane("2 workers", *workers),
            _lane("copy warp", *loads),
        ],
        "Blackwell dK and dV: 128 keys, Q tiles of 128 queries; all products are of transposes, with the keys as rows",
    )
