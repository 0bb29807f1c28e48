"""Chips: everything that is known of one in a row, each figure with its source.

A chip that is not listed has no peak, and so no MFU: a wrong default would be worse than none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax

from bigmodel.config import InputError

GIB = 2**30


@dataclass(frozen=True)
class Cuda:
    """A GPU as XLA's CUDA compiler must know it: NVIDIA's datasheets, CUDA programming guide (table 27)."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock_ghz: float
    shared_bytes: int  # of a core
    shared_optin_bytes: int  # of a block, at most
    memory_bytes: float
    l2_bytes: int
    fpus: int  # of a core


@dataclass(frozen=True)
class Chip:
    """One JAX device's share of a chip. A figure that is not known is 0 or None, and what follows from it is
    not computed.

    `flops` is dense peak FLOP/s by compute dtype; float32 is what XLA's default precision runs it as
    (TF32 on NVIDIA's, bfloat16 passes on Google's). `link_bytes_per_s` is one way and sustained: of one of a
    TPU's links to a neighbor, or of all of a GPU's NVLinks together. `network_bytes_per_s` is one device's
    share of what leaves its slice (TPU) or host (GPU).
    """

    name: str
    platform: str  # tpu | gpu | cpu
    kinds: tuple[str, ...]  # jax.Device.device_kind
    flops: dict[str, float]
    memory_bytes: float = 0.0
    reserved_bytes: float = 0.0  # of the memory, what the runtime keeps for itself
    memory_bytes_per_s: float = 0.0
    source: str = ""
    per_chip: int = 1  # JAX devices in a chip
    float8: bool = False  # has matrix units for it
    link_bytes_per_s: float = 0.0
    network_bytes_per_s: float = 0.0
    watts: float = 0.0  # of a chip's board under load, with its share of the host
    dollars_per_hour: float | None = None  # a chip's on-demand list price
    clock_hz: float = 0.0  # of the cycles that a TPU's compiler counts
    cores: int = 1  # of a TPU device; its compiler counts an elementwise operation's cycles for one
    dimensions: int = 0  # of a TPU's torus
    slice_side: int = 0  # chips on a side of a TPU slice, at most
    slice_chips: int = 0  # chips of a TPU slice, at most
    megacore: bool = False  # libtpu must be told to make one device of both cores
    cuda: Cuda | None = None


# Google publishes no power for v5 and later: those are assumptions, v4's (170 W mean, Jouppi et al. 2023,
# table 4) scaled by peak FLOP/s to the power 0.5, and a fifth for the host. NVIDIA's are the boards' limits
# and 15 % for the host. Prices are list prices per chip-hour on demand, and change: `--assume` sets them.
def _tpu(
    name: str, *kinds: str, bf16: float, gib: float, gb_per_s: float, link: float, watts: float,
    price: float | None, ghz: float, dimensions: int, cores: int = 1, per_chip: int = 1,
    megacore: bool = False, float8: bool = False,
) -> Chip:  # fmt: skip
    peak = bf16 * 1e12 / per_chip
    side, most = (16, 256) if dimensions == 2 else (48, 9216)
    return Chip(
        name, "tpu", kinds, {"bfloat16": peak, "float32": peak},
        memory_bytes=gib * GIB / per_chip, reserved_bytes=0.25 * GIB,
        memory_bytes_per_s=gb_per_s * 1e9 / per_chip, source=f"cloud.google.com/tpu/docs/{name}",
        per_chip=per_chip, float8=float8, link_bytes_per_s=link * 1e9, network_bytes_per_s=6.25e9 / per_chip,
        watts=watts, dollars_per_hour=price, clock_hz=ghz * 1e9, cores=cores, dimensions=dimensions,
        slice_side=side, slice_chips=most, megacore=megacore,
    )  # fmt: skip


def _gpu(
    name: str, kind: str, *, tf32: float, bf16: float, gb: float, gb_per_s: float, nvlink: float,
    network: float, watts: float, price: float | None, source: str, cuda: Cuda,
) -> Chip:  # fmt: skip
    return Chip(
        name, "gpu", (kind,), {"float32": tf32 * 1e12, "bfloat16": bf16 * 1e12, "float16": bf16 * 1e12},
        memory_bytes=gb * 1e9, reserved_bytes=1.5e9, memory_bytes_per_s=gb_per_s * 1e9,
        source=f"NVIDIA {source}", float8=cuda.capability >= (8, 9), link_bytes_per_s=nvlink * 1e9,
        network_bytes_per_s=network * 1e9, watts=watts * 1.15, dollars_per_hour=price, cuda=cuda,
    )  # fmt: skip


_A100 = ((8, 0), 108, 1.41, 167936, 163840)
_H100 = ((9, 0), 132, 1.98, 233472, 232448)
# A TPU link's 45 or 90 GB/s one way is 90 % of the 50 or 100 GB/s that the pages' Gbit/s per chip come to.
ROWS = (
    _tpu("v4", "TPU v4", bf16=275, gib=32, gb_per_s=1228, link=45, watts=200, price=3.22, ghz=1.05,
         dimensions=3, cores=2, megacore=True),
    _tpu("v5e", "TPU v5 lite", bf16=197, gib=16, gb_per_s=819, link=45, watts=180, price=1.20, ghz=1.5,
         dimensions=2),
    _tpu("v5p", "TPU v5", "TPU v5p", bf16=459, gib=95, gb_per_s=2765, link=90, watts=260, price=4.20,
         ghz=1.75, dimensions=3, cores=2),
    _tpu("v6e", "TPU v6 lite", bf16=918, gib=32, gb_per_s=1640, link=90, watts=360, price=2.70, ghz=1.75,
         dimensions=2),
    _tpu("tpu7x", "TPU7x", bf16=2307, gib=192, gb_per_s=7380, link=90, watts=600, price=None, ghz=1.75,
         dimensions=3, per_chip=2, float8=True),
    _gpu("a100-40", "NVIDIA A100-SXM4-40GB", tf32=156, bf16=312, gb=40, gb_per_s=1555, nvlink=300, network=25,
         watts=400, price=2.0, source="A100 datasheet, 2021", cuda=Cuda(*_A100, 40e9, 41943040, 64)),
    _gpu("a100-80", "NVIDIA A100-SXM4-80GB", tf32=156, bf16=312, gb=80, gb_per_s=2039, nvlink=300, network=25,
         watts=400, price=2.5, source="A100 datasheet, 2021", cuda=Cuda(*_A100, 80e9, 41943040, 64)),
    _gpu("h100", "NVIDIA H100 80GB HBM3", tf32=494.7, bf16=989.4, gb=80, gb_per_s=3350, nvlink=450,
         network=50, watts=700, price=3.5, source="H100 datasheet, SXM, dense",
         cuda=Cuda(*_H100, 84942979072, 52428800, 128)),
    _gpu("h200", "NVIDIA H200", tf32=494.7, bf16=989.4, gb=141, gb_per_s=4800, nvlink=450, network=50,
         watts=700, price=4.0, source="H200 datasheet, SXM, dense", cuda=Cuda(*_H100, 141e9, 52428800, 128)),
    _gpu("b200", "NVIDIA B200", tf32=1125, bf16=2250, gb=180, gb_per_s=7700, nvlink=900, network=50,
         watts=1000, price=6.0, source="DGX B200 datasheet, dense, per GPU",
         cuda=Cuda((10, 0), 148, 1.965, 233472, 232448, 180e9, 132644864, 128)),
)  # fmt: skip
CHIPS = {kind: row for row in ROWS for kind in row.kinds}
BY_NAME = {row.name: row for row in ROWS}


def chip(device: jax.Device) -> Chip:
    """The chip behind a device: its row, or one without figures where it is not listed, as a CPU is not."""
    kind = device.device_kind
    return CHIPS.get(kind) or Chip(kind, device.platform, (kind,), {}, float8=_is_ada_or_later(device))


def _is_ada_or_later(device: jax.Device) -> bool:
    """True for NVIDIA's GPUs since compute capability 8.9, which multiply float8."""
    found = re.match(r"[\d.]+", getattr(device, "compute_capability", "0"))
    return found is not None and float(found[0]) >= 8.9


def check_dtype(known: Chip, dtype: str) -> None:
    """Raises InputError where a listed chip multiplies no matrices of this compute dtype."""
    if known.flops and dtype not in known.flops:
        raise InputError(
            f"compute_dtype={dtype}: {known.name} has no matrix units for it, only for "
            f"{', '.join(known.flops)}; set compute_dtype=bfloat16"
        )
