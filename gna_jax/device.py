"""What a device is, as far as choosing an implementation and its tiles goes.

`DeviceSpec` is static and hashable: part of a call's compile-time side. Nothing here touches a device at import;
the default device is asked only when a call names none. No tile or cost decisions live here.
"""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """Facts of one device kind.

    Attributes:
      kind: as in `jax.Device.device_kind`, e.g. `"NVIDIA H200"`.
      platform: `"cpu"`, `"tpu"` or `"cuda"` (`"rocm"` for AMD).
      compute_capability: CUDA's, e.g. `(9, 0)`; None elsewhere.
      num_sms: streaming multiprocessors; 0 where unknown or meaningless.
      smem_bytes: shared memory one thread block may opt in to; 0 where meaningless.
      tmem_columns: columns of tensor memory per SM (512 on data-center Blackwell, else 0).
      is_interpreted: whether JAX's interpreter plays this GPU on a CPU (`gna_jax.interpret_gpu`).
    """

    kind: str
    platform: str
    compute_capability: tuple[int, int] | None = None
    num_sms: int = 0
    smem_bytes: int = 0
    tmem_columns: int = 0
    is_interpreted: bool = False


_KIB = 1024
# Shared memory per block (opt-in): CUDA C++ programming guide, table "Technical Specifications per Compute Capability".
# SM counts: the vendor's product data sheets (SXM parts).
KNOWN_DEVICES = {
    "cpu": DeviceSpec("cpu", "cpu"),
    "tpu": DeviceSpec("tpu", "tpu"),
    "a100": DeviceSpec("NVIDIA A100", "cuda", (8, 0), 108, 163 * _KIB),
    "l40": DeviceSpec("NVIDIA L40", "cuda", (8, 9), 142, 99 * _KIB),
    "h100": DeviceSpec("NVIDIA H100", "cuda", (9, 0), 132, 227 * _KIB),
    "h200": DeviceSpec("NVIDIA H200", "cuda", (9, 0), 132, 227 * _KIB),
    "b200": DeviceSpec("NVIDIA B200", "cuda", (10, 0), 148, 227 * _KIB, 512),
}
"""Devices that `device="name"` knows."""


def resolve_device(device: str | DeviceSpec | None) -> DeviceSpec:
    """The `DeviceSpec` of a name, of a spec, or (None) of the abstract mesh's device, else of the default device.

    Raises:
      ValueError: for a name that `KNOWN_DEVICES` does not hold.
      TypeError: for anything else.
    """
    if isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str):
        if device.lower() not in KNOWN_DEVICES:
            raise ValueError(
                f"device must be one of {sorted(KNOWN_DEVICES)} or a gna_jax.DeviceSpec; got device={device!r}"
            )
        return KNOWN_DEVICES[device.lower()]
    if device is not None:
        raise TypeError(
            f"device must be a name, a gna_jax.DeviceSpec or None; got device={device!r}"
        )
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return _from_kind(abstract.device_kind, abstract.platform or "gpu", abstract.num_cores or 0)
    default = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return _from_kind(
        default.device_kind,
        default.platform,
        getattr(default, "core_count", 0) or 0,
        getattr(default, "compute_capability", None),
    )


def _from_kind(
    kind: str, platform: str, num_cores: int = 0, capability: str | None = None
) -> DeviceSpec:
    """The known device whose name is a word of `kind`, with the counts the runtime reports; else what is known."""
    platform = "cuda" if platform == "gpu" else platform
    for name in re.findall(r"[a-z]+[0-9]+", kind.lower()):
        if name in KNOWN_DEVICES:
            known = KNOWN_DEVICES[name]
            return dataclasses.replace(
                known,
                kind=kind,
                num_sms=num_cores or known.num_sms,
                # A GPU on the platform of CPUs: `gna_jax.interpret_gpu` describes it so.
                is_interpreted=(platform, known.platform) == ("cpu", "cuda"),
            )
    if platform == "cuda" and capability:
        major, _, minor = str(capability).partition(".")
        version = int(major), int(minor or 0)
        like = next((d for d in KNOWN_DEVICES.values() if d.compute_capability == version), None)
        # Limits of a thread block are the compute capability's, those of the whole GPU are its own.
        smem, tmem = (like.smem_bytes, like.tmem_columns) if like else (0, 0)
        return DeviceSpec(kind, platform, version, num_cores, smem, tmem)
    return DeviceSpec(kind, platform)
