"""Energy: the machine's own counters, and assumed watts where there is no counter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from bigmodel.machines import chips

CORE_WATTS = 6.0  # of a busy server core with its memory: an assumption, as nothing else is known of a CPU
RAPL = pathlib.Path("/sys/class/powercap")  # Intel's and AMD's counters of CPU packages, on Linux


def watts(devices: Sequence[jax.Device]) -> tuple[float, str]:
    """Returns (watts of all these devices under load, their source); 0 watts where nothing is known."""
    known = [chips.chip(device) for device in devices]
    if all(chip.watts for chip in known):
        total = sum(chip.watts / chip.per_chip for chip in known)
        return total, f"{known[0].watts:g} W a chip under load, with its share of the host"
    if devices[0].platform == "cpu":
        hosts, cores = len({device.process_index for device in devices}), len(os.sched_getaffinity(0))
        return hosts * cores * CORE_WATTS, f"{CORE_WATTS:g} W x {cores} CPU cores, an assumption"
    return 0.0, f"the power of a {devices[0].device_kind} is not known"


@dataclass
class _Counter:
    """A counter: `read_j` returns joules since a fixed moment and wraps around at `range_j` (0: never)."""

    read_j: Callable[[], float]
    range_j: float = 0.0
    last_j: float = field(init=False)

    def __post_init__(self) -> None:
        self.last_j = self.read_j()

    def since_last_j(self) -> float:
        before, self.last_j = self.last_j, self.read_j()
        return self.last_j - before + (self.range_j if self.last_j < before else 0.0)


class Meter:
    """Counts the joules of this host's `devices` from now on, where they have counters that may be read.

    A GPU's board is counted by NVML (`nvidia-ml-py`, in the extra `cuda`), CPU devices by RAPL, whole
    packages at once, which by default only root may read. A TPU has no counter.
    """

    def __init__(self, devices: Sequence[jax.Device], rapl: pathlib.Path | None = None) -> None:
        self._counters: list[_Counter] = []
        self._total_j, self.source = 0.0, ""
        if devices[0].platform == "gpu":
            self._counters, self.source = _boards(devices), "NVML, the GPUs' boards"
        elif devices[0].platform == "cpu":
            with contextlib.suppress(PermissionError):
                self._counters, self.source = _packages(rapl or RAPL), "RAPL, the whole CPU package"

    def joules(self) -> float | None:
        """Joules since the meter was made; None without a counter. Read it at least every half hour: RAPL's
        registers wrap around."""
        if not self._counters:
            return None
        self._total_j += sum(counter.since_last_j() for counter in self._counters)
        return self._total_j


def _packages(rapl: pathlib.Path) -> list[_Counter]:
    def joules(path: pathlib.Path) -> float:
        return int(path.read_text()) / 1e6

    packages = sorted(path for path in rapl.glob("intel-rapl:*") if path.name.count(":") == 1)
    return [
        _Counter(functools.partial(joules, path / "energy_uj"), joules(path / "max_energy_range_uj"))
        for path in packages
    ]


def _boards(devices: Sequence[jax.Device]) -> list[_Counter]:
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else []

    def counter(device: jax.Device) -> _Counter:
        index = device.local_hardware_id or 0
        name = names[index].strip() if names else str(index)
        by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
        board: Any = by_index(int(name)) if name.isdigit() else by_uuid(name)
        return _Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1e3)

    try:
        pynvml.nvmlInit()
        return [counter(device) for device in devices]
    except pynvml.NVMLError:  # boards before Volta do not count
        return []
