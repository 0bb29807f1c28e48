"""Chips: peak FLOP/s by dtype, memory and bandwidth, each with its source; and what a CPU reaches, measured.

A chip that is not listed has no peak, and so no MFU: a wrong default would be worse than none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """`flops` is dense peak FLOP/s by compute dtype; float32 is what XLA's default precision runs it as
    (TF32 on NVIDIA's, bfloat16 passes on Google's)."""

    name: str
    flops: dict[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    source: str


def _tpu(name: str, bf16: float, gib: float, gb_per_s: float, page: str) -> Chip:
    flops = {"bfloat16": bf16 * 1e12, "float32": bf16 * 1e12}
    return Chip(name, flops, gib * GIB, gb_per_s * 1e9, f"cloud.google.com/tpu/docs/{page}")


def _gpu(name: str, tf32: float, bf16: float, gb: float, gb_per_s: float, source: str) -> Chip:
    flops = {"float32": tf32 * 1e12, "bfloat16": bf16 * 1e12, "float16": bf16 * 1e12}
    return Chip(name, flops, gb * 1e9, gb_per_s * 1e9, source)


CHIPS: dict[str, Chip] = {  # by jax.Device.device_kind
    "TPU v4": _tpu("v4", 275, 32, 1228, "v4"),
    "TPU v5 lite": _tpu("v5e", 197, 16, 819, "v5e"),
    "TPU v5": _tpu("v5p", 459, 95, 2765, "v5p"),
    "TPU v5p": _tpu("v5p", 459, 95, 2765, "v5p"),
    "TPU v6 lite": _tpu("v6e", 918, 32, 1640, "v6e"),
    "TPU7x": _tpu("tpu7x", 2307, 192, 7380, "tpu7x"),
    "NVIDIA A100-SXM4-40GB": _gpu("a100-40", 156, 312, 40, 1555, "NVIDIA A100 datasheet, 2021"),
    "NVIDIA A100-SXM4-80GB": _gpu("a100-80", 156, 312, 80, 2039, "NVIDIA A100 datasheet, 2021"),
    "NVIDIA H100 80GB HBM3": _gpu("h100", 494.7, 989.4, 80, 3350, "NVIDIA H100 datasheet, SXM, dense"),
    "NVIDIA H200": _gpu("h200", 494.7, 989.4, 141, 4800, "NVIDIA H200 datasheet, SXM, dense"),
    "NVIDIA B200": _gpu("b200", 1125, 2250, 180, 7700, "NVIDIA DGX B200 datasheet, dense, per GPU"),
}


def chip(device: jax.Device) -> Chip | None:
    """The chip behind a device, or None when it is not listed."""
    return CHIPS.get(device.device_kind)


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Peak FLOP/s of one device at a compute dtype, or None when it is not known."""
    known = chip(device)
    return known.flops.get(dtype) if known else None


def matmul_flops(dtype: str, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s that the default device reaches on `size`^3 matrix products; the best of repeats, not a peak."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    product(a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
