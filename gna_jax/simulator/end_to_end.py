"""What faster attention does to a whole model: Amdahl's law over sampling steps. No counts and no devices here."""


def end_to_end_speedup(
    attention_share: float, attention_speedup: float, *, steps: int = 1, dense_steps: int = 0
) -> float:
    """Speedup of a whole run whose self attention becomes faster in some of its steps.

    `1 / (1 - f + f / attention_speedup)` with `f = attention_share * (steps - dense_steps) / steps`: all steps cost the same.

    Args:
      attention_share: share of the run's time that is self attention while all of it is dense, in [0, 1].
      attention_speedup: how many times faster sparse attention is, above 0.
      steps: sampling steps of the run.
      dense_steps: those of them that keep dense attention.

    >>> round(end_to_end_speedup(0.607, 11.11, steps=50, dense_steps=15), 2)
    1.63

    Raises:
      ValueError: for a value outside its range.
    """
    if not 0 <= attention_share <= 1:
        raise ValueError(
            f"attention_share must lie between 0 and 1; got attention_share={attention_share};"
            " it is the part of the dense run's time that self attention takes"
        )
    if not attention_speedup > 0:
        raise ValueError(
            f"attention_speedup must be above 0; got attention_speedup={attention_speedup};"
            " it is dense time over sparse time"
        )
    if not 0 <= dense_steps <= steps or steps < 1:
        raise ValueError(
            "steps must be at least 1 and dense_steps at most steps;"
            f" got steps={steps}, dense_steps={dense_steps}"
        )
    share = attention_share * (steps - dense_steps) / steps
    return 1 / (1 - share + share / attention_speedup)
