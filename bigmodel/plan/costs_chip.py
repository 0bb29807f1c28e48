"""Seconds of instructions and transfers on a chip that is not here: `schedule.Costs` for TPUs and GPUs.

The constants are efficiencies, one for each kind of work, stated here once. They were set on the four runs of
published TPU step times that `scripts/validate_plan.py` takes; the GPUs' are from the papers named, and were
not calibrated on a GPU.
"""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass

from jax.sharding import Mesh

from bigmodel.machines.chips import Chip
from bigmodel.plan.hlo import Instruction, Module
from bigmodel.plan.schedule import Transfer
from bigmodel.plan.target import Target


@dataclass(frozen=True)
class Efficiency:
    """Shares of a datasheet's figures that kernels reach, and the time that starting one takes."""

    matmul: float  # of the peak: large matrix products
    attention: float  # of the peak: attention kernels, in blocks that the mask does not empty
    memory: float  # of the memory's bandwidth, where the compiler gives no cycles
    launch_s: float


NVLINK = 0.8  # of the datasheet's bandwidth, NCCL on large messages
HOST_BYTES_PER_S = 24e9  # a device's share of its host's PCIe, one way: 3/4 of PCIe 4 x16
HOP_S = 1e-6  # a step of a ring
# What passes a link of a ring, relative to an all-gather of the same bytes a device.
ROUNDS = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "collective-broadcast": 1.0}
Places = list[tuple[int, ...]]  # coordinates of a group's devices
ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")  # these depend on the shape: `ChipCosts._all_to_all_s`


class ChipCosts(abc.ABC):
    """Costs on `target`'s chips, its devices in the order of the mesh, at matrix products in `dtype`."""

    EFFICIENCY: Efficiency

    def __init__(self, target: Target, mesh: Mesh, dtype: str) -> None:
        self.places = [target.coordinates(device) for device in mesh.devices.flat]
        self.target, self.chip = target, target.chip
        self.peak = target.chip.flops[dtype]

    def compute_s(self, module: Module, computation: str, i: Instruction, kind: str, flops: float) -> float:
        if kind == "attention":
            flops = attention_flops(module, computation, i)
            return flops / (self.peak * self.EFFICIENCY.attention) + self.EFFICIENCY.launch_s
        if kind == "matmul":
            flops = flops or gemm_flops(module, computation, i)
            moved = module.touched_bytes(computation, i) / self.chip.memory_bytes_per_s
            if i.cycles is not None and self.chip.clock_hz:  # nested slices read less than they name
                moved = min(moved, i.cycles / self.chip.clock_hz)
            return max(flops / (self.peak * self.EFFICIENCY.matmul), moved) + self.EFFICIENCY.launch_s
        if i.cycles is not None and self.chip.clock_hz:
            return i.cycles / self.chip.clock_hz / self.chip.cores
        if i.opcode == "custom-call" or not i.bytes:
            return 0.0  # a buffer's allocation, a bitcast
        moved = module.touched_bytes(computation, i)
        return moved / (self.chip.memory_bytes_per_s * self.EFFICIENCY.memory) + self.EFFICIENCY.launch_s

    def stream(self, transfer: Transfer) -> str:
        """Dimensions of a torus have links of their own; a permute to the next and one to the last, too."""
        if transfer.kind in ("copy", "offload"):
            return transfer.kind
        if transfer.kind == "collective-permute" and len(transfer.group) == 2:
            return "next" if transfer.group[1] > transfer.group[0] else "last"
        return "network"

    def transfer_s(self, transfer: Transfer) -> float:
        if transfer.kind == "copy":
            return transfer.bytes / self.chip.memory_bytes_per_s
        if transfer.kind == "offload":
            return transfer.bytes / HOST_BYTES_PER_S
        group = transfer.group or tuple(range(len(self.places)))
        places = [self.places[index] for index in group]
        inside, outside, ways = self._bandwidths(places)
        n = len(group)
        if transfer.kind == "collective-permute":
            return transfer.bytes / (outside if ways == n else inside) + HOP_S
        if transfer.kind in ALL_TO_ALL:
            return self._all_to_all_s(transfer.bytes, places)
        rounds, within = ROUNDS[transfer.kind], n // ways
        seconds = (
            rounds * transfer.bytes * (within - 1) / within / inside + within * HOP_S if within > 1 else 0
        )
        if ways > 1:  # every device takes its own part across
            seconds += rounds * transfer.bytes / within * (ways - 1) / ways / outside + ways * 10 * HOP_S
        return seconds

    def _all_to_all_s(self, moved_bytes: float, places: Places) -> float:
        """Seconds until every device of a group has given each its part of its `moved_bytes`."""
        _, outside, ways = self._bandwidths(places)
        n = len(places)
        within = n // ways
        seconds = moved_bytes * (n - within) / n / outside + ways * 10 * HOP_S if ways > 1 else 0.0
        if within == 1:
            return seconds
        return seconds + self._all_to_all_inside_s(moved_bytes, places, within) + within * HOP_S

    @abc.abstractmethod
    def _all_to_all_inside_s(self, moved_bytes: float, places: Places, within: int) -> float:
        """Seconds of the part of an all-to-all that stays in a slice or host, `within` devices of each."""

    @abc.abstractmethod
    def _bandwidths(self, places: Places) -> tuple[float, float, int]:
        """-> (bytes/s of one device inside its slice or host, across them, how many of them)."""


class GpuCosts(ChipCosts):
    """GPUs of hosts with NVSwitch, through which every GPU sends at its full rate."""

    # cuBLAS on H100 in bfloat16: 600-750 of 989 TFLOP/s (power-limited). FlashAttention-3 (Shah et al. 2024),
    # figure 5: 0.55-0.65 forward, 0.45-0.55 backward at a length of 2-8k.
    EFFICIENCY = Efficiency(matmul=0.7, attention=0.5, memory=0.85, launch_s=3e-6)

    def _all_to_all_inside_s(self, moved_bytes: float, places: Places, within: int) -> float:
        return moved_bytes * (within - 1) / len(places) / (self.chip.link_bytes_per_s * NVLINK)

    def _bandwidths(self, places: Places) -> tuple[float, float, int]:
        hosts = len({place[0] for place in places})
        return self.chip.link_bytes_per_s * NVLINK, self.chip.network_bytes_per_s * NVLINK, hosts


class TpuCosts(ChipCosts):
    """TPUs of a torus, with links to their neighbors."""

    # Systolic arrays run at the peak but for filling and draining; the compiler's own cycles for a product
    # with fused reductions count waiting that windows hide.
    EFFICIENCY = Efficiency(matmul=0.985, attention=0.5, memory=0.8, launch_s=1e-6)

    def _all_to_all_inside_s(self, moved_bytes: float, places: Places, within: int) -> float:
        """Half of everything crosses the middle of a dimension, so a full ring of n takes n / 4 times an
        all-gather of the same bytes a device (https://jax-ml.github.io/scaling-book/sharding, whose n / 4
        less is of the global array)."""
        slowest = 0.5  # of two cores of one chip
        for dimension, size in enumerate(self.target.shape):
            at = {place[dimension] for place in places}
            if (extent := len(at)) > 1:
                apart = (max(at) - min(at)) // (extent - 1)  # groups between share the links
                closed = extent * apart == size and _wraps(self.chip, size)
                across = (extent // 2) * (extent - extent // 2) / extent * apart / (2 if closed else 1)
                slowest = max(slowest, across)
        return moved_bytes * within / len(places) * slowest / self._link_bytes_per_s

    def _bandwidths(self, places: Places) -> tuple[float, float, int]:
        slices = len({place[-1] for place in places})
        links = 0
        for dimension, size in enumerate(self.target.shape):
            extent = len({place[dimension] for place in places})
            if extent > 1:  # both ways round, where the ring closes
                links += 2 if extent == size and _wraps(self.chip, size) else 1
        return max(links, 1) * self._link_bytes_per_s, self.chip.network_bytes_per_s, slices

    @property
    def _link_bytes_per_s(self) -> float:
        return self.chip.link_bytes_per_s / self.chip.per_chip


def _wraps(chip: Chip, size: int) -> bool:
    """True where a torus's dimension of this size is closed to a ring."""
    return size == 16 if chip.dimensions == 2 else size % 4 == 0


def attention_flops(module: Module, computation: str, i: Instruction) -> float:
    """FLOPs of an attention kernel's call, from its operands' shapes, without blocks that the mask empties.
    Splash: 2 products forward, 3 for dq, 4 for dk and dv. cuDNN: 2 forward, 5 backward."""
    table = module.tables[computation]
    arrays = [table[o].shapes[0] for o in i.operands if o in table]
    floats = [s.dims for s in arrays if s.dtype in ("bf16", "f16", "f32")]
    if "fmha" not in i.target:  # Splash over one example leaves B out
        floats = [(1, *dims) if len(dims) == 3 else dims for dims in floats]
    four = [dims for dims in floats if len(dims) == 4]
    if len(four) < 2:
        raise ValueError(f"the attention kernel {i.name} has no queries and keys of four dimensions")
    if "fmha" in i.target:  # [B, L, H, K]
        (b, length, heads, dim), keys = four[0], four[1][1]
        products = 5 if "Backward" in i.target else 2
        share = 0.5 if re.search(r'"mask_type":"[A-Z_]*CAUSAL', i.text) else 1.0
        window = int(i.attribute(r'"sliding_window_length":"?(\d+)') or 0)
        share = min(share, window / keys) if window else share
    else:  # [B, H, L, K]
        (b, heads, length, dim), keys = four[0], four[1][2]
        products = next((n for name, n in (("dkv", 4), ("dq", 3)) if f"_{name}" in i.name), 2)
        masks = [
            s.dims for s in arrays if len(s.dims) == 3 and s.dtype in ("s8", "s32") and s.dims[0] <= heads
        ]
        share = 1.0
        if masks and "sees_all" not in i.op_name:  # a window's grid is as narrow as it, in one direction
            width, blocks = sorted(masks[0][-2:])
            share = sum(min(row + 1, width) for row in range(blocks)) / blocks**2
    return 2.0 * products * b * heads * length * keys * dim * share


def gemm_flops(module: Module, computation: str, i: Instruction) -> float:
    """FLOPs of a library's matrix product, whose contraction the text names as a dot does."""
    table = module.tables[computation]
    contracted = i.attribute(r'"lhs_contracting_dimensions":\["?([\d",]*?)"?\]')
    if contracted is None or i.operands[0] not in table:
        return 0.0
    lhs = table[i.operands[0]].shapes[0].dims
    inner = 1
    for d in re.findall(r"\d+", contracted):
        inner *= lhs[int(d)]
    out = 1
    for d in i.shapes[0].dims:
        out *= d
    return 2.0 * out * inner
