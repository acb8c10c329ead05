"""`DeviceSpec`: names, specs, and what a call without a device is compiled for."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from gna_jax import DeviceSpec, gna
from gna_jax.device import KNOWN_DEVICES, _from_kind, resolve_device


@pytest.mark.parametrize("name", sorted(KNOWN_DEVICES))
def test_names_resolve_in_any_case(name):
    assert resolve_device(name) == resolve_device(name.upper()) == KNOWN_DEVICES[name]


def test_specs_pass_through_and_are_static():
    spec = DeviceSpec("my board", "cuda", (9, 0), 10, 1024, 0)
    assert resolve_device(spec) is spec
    assert hash(spec) == hash(DeviceSpec("my board", "cuda", (9, 0), 10, 1024, 0))
    with pytest.raises(AttributeError):
        spec.kind = "other"


def test_default_is_the_default_device():
    assert resolve_device(None) == DeviceSpec(jax.devices()[0].device_kind, "cpu")
    with jax.default_device(jax.devices()[3]):
        assert resolve_device(None).platform == "cpu"
    with jax.default_device("cpu"):
        assert resolve_device(None).platform == "cpu"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_kinds_that_runtimes_report_are_recognised(kind, name):
    spec, known = _from_kind(kind, "gpu", 77), KNOWN_DEVICES[name]
    assert (spec.kind, spec.platform, spec.num_sms) == (kind, "cuda", 77)
    assert (spec.compute_capability, spec.smem_bytes) == (
        known.compute_capability,
        known.smem_bytes,
    )


def test_unknown_kinds_keep_what_is_known():
    assert _from_kind("NVIDIA T4", "gpu", 40, "7.5") == DeviceSpec("NVIDIA T4", "cuda", (7, 5), 40)
    assert _from_kind("TPU v5 lite", "tpu") == DeviceSpec("TPU v5 lite", "tpu")
    assert _from_kind("AMD Instinct MI300X", "rocm").platform == "rocm"


def test_errors():
    with pytest.raises(ValueError, match=r"device must be one of \[.*'h200'.*got device='z9000'"):
        resolve_device("z9000")
    with pytest.raises(TypeError, match="a name, a gna_jax.DeviceSpec or None; got device=7"):
        resolve_device(7)
    x = np.zeros((1, 4, 1, 2), np.float32)
    with pytest.raises(ValueError, match="got device='z9000'"):
        gna(x, x, x, window_size=3, device="z9000")


def test_import_asks_no_device():
    """Backends start at the first call, so that importing is cheap and distributed start-up still possible."""
    code = (
        "import gna_jax, jax, jax._src.xla_bridge as bridge;"
        "assert not bridge.backends_are_initialized(), 'a backend started at import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
