"""Devices that need not be here: a TPU slice, hosts of GPUs, or this machine's CPU.

`make("v5e:16x16")` gives devices that `mesh.make_mesh` takes and the target's own compiler compiles for, with
no chip in sight: libtpu and the CUDA plugin hold the compilers (`pip install -e '.[plan]'`). Where that
package is missing, the same number of CPU devices stands in, and the plan says so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from bigmodel.config import Config, InputError
from bigmodel.machines import chips
from bigmodel.machines.chips import Chip

GRAMMAR = (
    "a TPU slice such as v5e:16x16, v5p:4x4x8 or 2*v6e:16x16 (two slices), NVIDIA hosts x GPUs such as "
    "h100:8x8, or cpu, cpu:8"
)
HOST_CHIPS = 4  # of a TPU host in a slice of several


@dataclass(frozen=True)
class Target:
    """A cluster to plan for."""

    spec: str
    chip: Chip
    devices: tuple[Any, ...]
    shape: tuple[int, ...]  # of a slice's torus, or (hosts, GPUs a host)
    slices: int
    compiler: str  # "libtpu", "cuda", "cpu": the target's own; "analytic": CPU devices stand in

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.per_chip

    def coordinates(self, device: Any) -> tuple[int, ...]:
        """Where a device is in its slice's torus (a GPU: host, place in it); then its slice."""
        if self.compiler == "libtpu":
            return (*device.coords[: len(self.shape)], getattr(device, "slice_index", None) or 0)
        index = self.devices.index(device)
        inside = index % (len(self.devices) // self.slices)
        place = _unravel(inside // self.chip.per_chip, self.shape)
        return (*place, index * self.slices // len(self.devices))


def here(devices: Sequence[Any]) -> Target:
    """The target that this job's own devices are."""
    chip = chips.chip(devices[0])
    if not chip.flops:
        return Target(chip.name, chip, tuple(devices), (len(devices),), 1, "cpu")
    hosts = len({d.process_index for d in devices})
    slices = len({getattr(d, "slice_index", None) for d in devices})
    if chip.platform == "tpu":
        shape = tuple(max(d.coords[k] for d in devices) + 1 for k in range(chip.dimensions))
        return Target(
            f"{chip.name}:{'x'.join(map(str, shape))}", chip, tuple(devices), shape, slices, "libtpu"
        )
    return Target(
        f"{chip.name}:{hosts}x{len(devices) // hosts}",
        chip,
        tuple(devices),
        (hosts, len(devices) // hosts),
        1,
        "cuda",
    )


def of(config: Config, spec: str) -> Target:
    """The target that a config is planned for; "": this job's own devices.

    Raises:
        InputError: as `make`, or its chips have no matrix units for `compute_dtype`.
    """
    if spec:
        return make(spec, config.compute_dtype)
    aim = here(jax.devices())
    chips.check_dtype(aim.chip, config.compute_dtype)
    return aim


def make(spec: str, dtype: str = "float32") -> Target:
    """Text such as `v5e:16x16` -> the target. To be called before JAX has counted its devices.

    Args:
        dtype: what is to be computed in; refused before a compiler is loaded.

    Raises:
        InputError: no such chip or topology; the message gives the nearest that exists, or what to install.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9\-]+)(?::(\d+(?:x\d+)*))?", spec.strip())
    if not found:
        raise InputError(f"--target={spec!r} is not a target; give {GRAMMAR}")
    slices, name = int(found.group(1) or 1), found.group(2)
    shape = tuple(int(n) for n in (found.group(3) or "1").split("x"))
    if slices < 1 or min(shape) < 1:
        raise InputError(f"--target={spec!r} has no devices; give {GRAMMAR}")
    if name == "cpu":
        return _cpu(spec, slices, shape)
    chip = chips.BY_NAME.get(name)
    if chip is None:
        known = ", ".join(["cpu", *chips.BY_NAME])
        raise InputError(f"--target={spec!r}: chip {name!r} is unknown; choose one of {known}")
    chips.check_dtype(chip, dtype)
    return _tpu(spec, chip, slices, shape) if chip.platform == "tpu" else _gpu(spec, chip, slices, shape)


def installed(package: str) -> bool:
    """True if a compiler's package is installed; nothing of it is loaded."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package's parent
        return False


def _cpu(spec: str, slices: int, shape: tuple[int, ...]) -> Target:
    if slices > 1 or len(shape) > 1:
        raise InputError(f"--target={spec!r}: a CPU target is cpu or cpu:COUNT, e.g. cpu:8")
    devices = tuple(_cpu_devices(math.prod(shape)))
    return Target(spec, chips.chip(devices[0]), devices, shape, 1, "cpu")


def _cpu_devices(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has counted its devices already; they may be enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"this process has {len(devices)} CPU devices and the target wants {count}; start afresh with "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return devices[:count]


def _tpu(spec: str, chip: Chip, slices: int, shape: tuple[int, ...]) -> Target:
    if len(shape) != chip.dimensions:
        raise InputError(
            f"--target={spec!r}: a {chip.name} slice has {chip.dimensions} dimensions, e.g. "
            f"{chip.name}:{'x'.join('4' * chip.dimensions)}"
        )
    if max(shape) > chip.slice_side or math.prod(shape) > chip.slice_chips:
        raise InputError(
            f"--target={spec!r}: a {chip.name} slice has at most {chip.slice_chips} chips, "
            f"{chip.slice_side} on a side; "
            f"take several slices, e.g. 2*{chip.name}:{'x'.join(['16'] * chip.dimensions)}"
        )
    if not installed("libtpu"):
        devices = _cpu_devices(slices * math.prod(shape) * chip.per_chip)
        return Target(spec, chip, tuple(devices), shape, slices, "analytic")
    text = "x".join(map(str, shape))
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(shape) < HOST_CHIPS:  # one host with fewer chips than a whole one
        options["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
    if chip.megacore:
        options["chip_config_name"] = "megacore"
    for key, value in _NO_TPU_HERE.items():
        os.environ.setdefault(key, value)
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{text}", **options
        )
    except Exception as error:  # whatever the plugin raises: the topology does not exist
        reason = str(error).split("\n")[0]
        raise InputError(
            f"--target={spec!r}: libtpu knows no such topology ({reason[:200]}); slices are 2x2, 2x4, 4x4, "
            "4x8, 8x8, 8x16, 16x16, or in three dimensions multiples of 2x2x1"
        ) from error
    return Target(spec, chip, tuple(topology.devices), shape, slices, "libtpu")


# libtpu is to compile, not to look for chips: no metadata server, no lock, no complaints about either.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3",
}  # fmt: skip


def _gpu(spec: str, chip: Chip, slices: int, shape: tuple[int, ...]) -> Target:
    hosts, gpus = shape if len(shape) == 2 else (1, shape[-1])
    if len(shape) > 2 or slices > 1 or gpus > 8:
        raise InputError(
            f"--target={spec!r}: GPUs are hosts x GPUs a host, at most 8 of those, e.g. {chip.name}:2x8"
        )
    if not installed("jax_plugins.xla_cuda13"):
        return Target(spec, chip, tuple(_cpu_devices(hosts * gpus)), (hosts, gpus), 1, "analytic")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no GPU, no driver: only the compiler
    try:
        from jax._src import xla_bridge  # the plugin may be there already; asking has no public way

        jax.devices("cpu")  # JAX looks for plugins now, and finds this one unless JAX_PLATFORMS hides it
        if "cuda" not in xla_bridge._topology_factories:
            importlib.import_module("jax_plugins.xla_cuda13").initialize()
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x{hosts}x{gpus}",
            target_config=_gpu_config(chip),
        )
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(
            f"--target={spec!r}: the CUDA compiler does not start ({reason}); "
            "reinstall with pip install -e '.[plan]'"
        ) from error
    return Target(spec, chip, tuple(topology.devices), (hosts, gpus), 1, "cuda")


def _gpu_config(chip: Chip) -> str:
    gpu = chip.cuda
    assert gpu is not None
    major, minor = gpu.capability
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared_bytes} threads_per_core_limit: 2048 core_count: {gpu.cores}
      fpus_per_core: {gpu.fpus}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {chip.memory_bytes_per_s:.0f} l2_cache_size: {gpu.l2_bytes}
      clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory_bytes:.0f}
      shared_memory_per_block_optin: {gpu.shared_optin_bytes}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
    device_description_str: "{chip.kinds[0]}" """


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    out = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        out.append(position)
    return tuple(reversed(out))
