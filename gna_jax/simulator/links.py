"""What carries bytes between GPUs, with sources: per GPU and direction. How long an exchange takes with these: `shards`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Link:
    """One GPU's way to the others.

    Attributes:
      name: for people.
      nominal: the vendor's bandwidth of one GPU in one direction [B/s]; vendors print both directions of NVLink added up.
      sustained: what large transfers reach [B/s].
      latency: of one transfer, however small [s].
      reach: GPUs that it connects; None: as many as there are.
    """

    name: str
    nominal: float
    sustained: float
    latency: float
    reach: int | None = None

    def connects(self, devices: int) -> bool:
        """Whether so many GPUs can all be reached."""
        return self.reach is None or devices <= self.reach

    def seconds(self, transfers: int, nbytes: float) -> float:
        """Of so many transfers, one after the other, that bring a GPU so many bytes together."""
        return transfers * self.latency + nbytes / self.sustained


# nominal: data sheets; NVLink 3, 4 and 5 have 12, 18 and 18 links of 25, 25 and 50 GB/s per direction: 600, 900 and 1800 GB/s
# in all (MLPerf's system descriptions say "18x 4th Gen NVLink, 900GB/s").
# sustained: NCCL's own model, src/graph/topo.h: 20.0, 20.6 and 40.1 GB/s per NVLink of sm_80, sm_90 and sm_100, and 12 GB/s of a
# network's 100 Gb/s. Users see 380 GB/s from GPU to GPU of an H100 (NVIDIA/nccl issue 1264). ncclSend and ncclRecv alone, with
# their default number of channels, have been seen at 180 GB/s (NVIDIA/nccl-tests issue 268): the number here is the link's.
# latency: NCCL's own model, src/graph/tuning.cc, ring with the Simple protocol: 8.4 us to start, and 3.4 us for a step over NVLink,
# 14 us over a network. NVIDIA/nccl-tests issue 331 has 9.9 us for 8 bytes between two A100s.
# Every two GPUs are taken to reach full speed at once: NVSwitch, or a fat tree with one network card per GPU (DGX SuperPOD).
_NVLINK_SECONDS = 11.8e-6
_NETWORK_SECONDS = 22.4e-6
_NETWORK_SHARE = 12 / 12.5
NVLINK_3 = Link("NVLink 3", 300e9, 12 * 20.0e9, _NVLINK_SECONDS, reach=8)
NVLINK_4 = Link(
    "NVLink 4", 450e9, 18 * 20.6e9, _NVLINK_SECONDS, reach=8
)  # HGX; larger switched systems are rare
NVLINK_5 = Link("NVLink 5", 900e9, 18 * 40.1e9, _NVLINK_SECONDS, reach=72)  # 8 in HGX, 72 in NVL72
HDR = Link("HDR 200 Gb/s", 25e9, 25e9 * _NETWORK_SHARE, _NETWORK_SECONDS)
NDR = Link("NDR 400 Gb/s", 50e9, 50e9 * _NETWORK_SHARE, _NETWORK_SECONDS)
XDR = Link("XDR 800 Gb/s", 100e9, 100e9 * _NETWORK_SHARE, _NETWORK_SECONDS)

LINKS = {
    "a100": (NVLINK_3, HDR),
    "h100": (NVLINK_4, NDR),
    "h200": (NVLINK_4, NDR),
    "b200": (NVLINK_5, NDR, XDR),  # ConnectX-7 in DGX B200, ConnectX-8 beside it
    "l40": (HDR,),  # no NVLink; its PCIe 4 x16 of 32 GB/s would not feed a faster card
}
"""By the names of `devices.RATES`: NVLink where there is any, then InfiniBand with one card per GPU."""


def links_of(device: str) -> tuple[Link, ...]:
    """The links of a device by its name.

    Raises:
      ValueError: for a device without any here, as the CPU.
    """
    if device.lower() not in LINKS:
        raise ValueError(
            f"shards are planned for the devices {sorted(LINKS)}; got device={device!r}"
        )
    return LINKS[device.lower()]
