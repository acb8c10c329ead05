"""The stamp that `gna-jax verify` and `gna-jax selfcheck` write where every result was right: the default takes the kernel from then on."""

import datetime
import pathlib
import sys
from collections.abc import Sequence

import jax

import gna_jax
from gna_jax.backends.verified import write_stamp
from gna_jax.device import DeviceSpec
from gna_jax.verification import Outcome


def record_success(
    implementation: str, device: DeviceSpec, outcomes: Sequence[Outcome], seed: int = 0
) -> pathlib.Path:
    """Write it: what was compared, where, with which versions, and the largest errors.

    Returns:
      Its path.

    Raises:
      ValueError: where an outcome is not right, or there is none.
      OSError: where it cannot be written.
    """
    if not outcomes or not all(outcome.is_right for outcome in outcomes):
        raise ValueError(
            f"a stamp needs results that are all right; got {sum(o.is_right for o in outcomes)} of {len(outcomes)}"
            f" of {implementation}: see what `gna-jax verify` prints"
        )
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.kind,
        "versions": versions(),
        "seed": seed,
        "errors": {f"{o.trial.arithmetic} {o.trial}": o.errors for o in outcomes},
    }
    return write_stamp(implementation, device, stamp)


def versions() -> dict[str, str]:
    """Of what every result depends on."""
    python = sys.version.split()[0]
    return {"gna_jax": gna_jax.__version__, "jax": jax.__version__, "python": python}
