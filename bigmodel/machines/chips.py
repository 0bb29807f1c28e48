"""Chips: peak FLOP/s by dtype, memory and bandwidth, each with its source; and what a CPU reaches, measured.

A chip that is not listed has no peak, and so no MFU: a wrong default would be worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from bigmodel.config import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device's share of a chip. What is not known is None, and what follows from it is not computed.

    `flops` is dense peak FLOP/s by compute dtype; float32 is what XLA's default precision runs it as
    (TF32 on NVIDIA's, bfloat16 passes on Google's). `link_bytes_per_s` is one way and sustained: of one of a
    TPU's links to a neighbour, or of all of a GPU's NVLinks together. `network_bytes_per_s` is one device's
    share of what leaves its slice (TPU) or host (GPU).
    """

    name: str
    platform: str  # tpu | gpu
    flops: dict[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    source: str
    per_chip: int = 1  # JAX devices in a chip
    clock_hz: float = 0.0  # of the cycles that a TPU's compiler counts
    dimensions: int = 0  # of a TPU's torus
    link_bytes_per_s: float = 0.0
    network_bytes_per_s: float = 0.0
    watts: float = 0.0  # of a chip's board under load, with its share of the host: see WATTS
    dollars_per_hour: float | None = None  # a chip's on-demand list price; None: not known


# Google publishes no power for v5 and later: those are assumptions, v4's (170 W mean, Jouppi et al. 2023,
# table 4) scaled by peak FLOP/s to the power 0.5, and a fifth for the host. NVIDIA's are the boards' limits
# and 15 % for the host. Prices are list prices per chip-hour on demand, and change: `--assume` sets them.
def _tpu(
    name: str, bf16: float, gib: float, gb_per_s: float, page: str, *, ghz: float, dimensions: int,
    link: float, watts: float, price: float | None, per_chip: int = 1,
) -> Chip:  # fmt: skip
    peak = bf16 * 1e12 / per_chip
    return Chip(
        name, "tpu", {"bfloat16": peak, "float32": peak}, gib * GIB / per_chip, gb_per_s * 1e9 / per_chip,
        f"cloud.google.com/tpu/docs/{page}", per_chip, ghz * 1e9, dimensions, link * 1e9, 6.25e9 / per_chip,
        watts, price,
    )  # fmt: skip


def _gpu(
    name: str, tf32: float, bf16: float, gb: float, gb_per_s: float, source: str, *, nvlink: float,
    network: float, watts: float, price: float | None,
) -> Chip:  # fmt: skip
    flops = {"float32": tf32 * 1e12, "bfloat16": bf16 * 1e12, "float16": bf16 * 1e12}
    return Chip(
        name, "gpu", flops, gb * 1e9, gb_per_s * 1e9, source, link_bytes_per_s=nvlink * 1e9,
        network_bytes_per_s=network * 1e9, watts=watts * 1.15, dollars_per_hour=price,
    )  # fmt: skip


# A TPU link's 45 or 90 GB/s one way is 90 % of the 50 or 100 GB/s that the pages' Gbit/s per chip come to.
_V4 = _tpu("v4", 275, 32, 1228, "v4", ghz=1.05, dimensions=3, link=45, watts=200, price=3.22)
_V5E = _tpu("v5e", 197, 16, 819, "v5e", ghz=1.5, dimensions=2, link=45, watts=180, price=1.20)
_V5P = _tpu("v5p", 459, 95, 2765, "v5p", ghz=1.75, dimensions=3, link=90, watts=260, price=4.20)
_V6E = _tpu("v6e", 918, 32, 1640, "v6e", ghz=1.75, dimensions=2, link=90, watts=360, price=2.70)
_TPU7X = _tpu(
    "tpu7x", 2307, 192, 7380, "tpu7x", ghz=1.75, dimensions=3, link=90, watts=600, price=None, per_chip=2
)
_A100 = "NVIDIA A100 datasheet, 2021"

CHIPS: dict[str, Chip] = {  # by jax.Device.device_kind
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU7x": _TPU7X,
    "NVIDIA A100-SXM4-40GB": _gpu(
        "a100-40", 156, 312, 40, 1555, _A100, nvlink=300, network=25, watts=400, price=2.0
    ),
    "NVIDIA A100-SXM4-80GB": _gpu(
        "a100-80", 156, 312, 80, 2039, _A100, nvlink=300, network=25, watts=400, price=2.5
    ),
    "NVIDIA H100 80GB HBM3": _gpu(
        "h100", 494.7, 989.4, 80, 3350, "NVIDIA H100 datasheet, SXM, dense",
        nvlink=450, network=50, watts=700, price=3.5,
    ),
    "NVIDIA H200": _gpu(
        "h200", 494.7, 989.4, 141, 4800, "NVIDIA H200 datasheet, SXM, dense",
        nvlink=450, network=50, watts=700, price=4.0,
    ),
    "NVIDIA B200": _gpu(
        "b200", 1125, 2250, 180, 7700, "NVIDIA DGX B200 datasheet, dense, per GPU",
        nvlink=900, network=50, watts=1000, price=6.0,
    ),
}  # fmt: skip
BY_NAME = {known.name: known for known in CHIPS.values()}


def chip(device: jax.Device) -> Chip | None:
    """The chip behind a device, or None when it is not listed."""
    return CHIPS.get(device.device_kind)


def check_dtype(known: Chip | None, dtype: str) -> None:
    """Raises InputError where a listed chip multiplies no matrices of this compute dtype."""
    if known is not None and dtype not in known.flops:
        raise InputError(
            f"compute_dtype={dtype}: {known.name} has no matrix units for it, only for "
            f"{', '.join(known.flops)}; set compute_dtype=bfloat16"
        )


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Peak FLOP/s of one device at a compute dtype, or None when it is not known."""
    known = chip(device)
    return known.flops.get(dtype) if known else None
