"""What instructions and transfers take on a chip that is not here: `schedule.Costs` for TPUs and GPUs.

The constants are efficiencies, one for each kind of work, stated here once. They were set on the four runs of
published TPU step times that `scripts/validate_plan.py` takes; the GPUs' are from the papers named, and were
not calibrated on a GPU.
"""

from __future__ import annotations

import re
from collections import defaultdict

from jax.sharding import Mesh

from bigmodel.machines.chips import Chip
from bigmodel.plan.hlo import Instruction, Module
from bigmodel.plan.schedule import Transfer
from bigmodel.plan.target import Target

# Share of the peak that large matrix products reach. TPU: the systolic arrays run at the peak but for filling
# and draining; the compiler's own cycles for a product with fused reductions count waiting that windows hide.
# GPU: cuBLAS on H100 in bfloat16, 600-750 of 989 TFLOP/s (power-limited).
MATMUL = {"tpu": 0.985, "gpu": 0.7}
# Attention kernels, of the FLOPs in blocks that the mask does not empty. GPU: FlashAttention-3 (Shah et al.
# 2024), figure 5: 0.55-0.65 forward, 0.45-0.55 backward at a length of 2-8k.
ATTENTION = {"tpu": 0.5, "gpu": 0.5}
# Of the memory's bandwidth, where the compiler gives no cycles.
MEMORY = {"tpu": 0.8, "gpu": 0.85}
# A v4 or v5p device is two cores; the compiler counts an elementwise operation's cycles for one.
CORES = defaultdict(lambda: 1, {"v4": 2, "v5p": 2})
NVLINK = 0.8  # of the datasheet's bandwidth, NCCL on large messages
HOST_BYTES_PER_S = 24e9  # a device's share of its host's PCIe, one way: 3/4 of PCIe 4 x16
LAUNCH_S = {"tpu": 1e-6, "gpu": 3e-6}  # what starting any kernel takes
HOP_S = 1e-6  # a step of a ring
# What passes a link of a ring, relative to an all-gather of the same bytes a device.
ROUNDS = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "collective-broadcast": 1.0}
ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")  # these depend on the shape: `ChipCosts._all_to_all_s`


class ChipCosts:
    """Costs on `target`'s chips, its devices in the order of the mesh, at matrix products in `dtype`."""

    def __init__(self, target: Target, mesh: Mesh, dtype: str) -> None:
        assert target.chip is not None
        self.places = [target.coordinates(device) for device in mesh.devices.flat]
        self.target, self.chip = target, target.chip
        self.platform = target.chip.platform
        self.peak = target.chip.flops[dtype]

    def compute_s(self, module: Module, computation: str, i: Instruction, kind: str, flops: float) -> float:
        if kind == "attention":
            flops = attention_flops(module, computation, i)
            return flops / (self.peak * ATTENTION[self.platform]) + LAUNCH_S[self.platform]
        if kind == "matmul":
            flops = flops or gemm_flops(module, computation, i)
            moved = module.touched_bytes(computation, i) / self.chip.memory_bytes_per_s
            if i.cycles is not None and self.chip.clock_hz:  # nested slices read less than they name
                moved = min(moved, i.cycles / self.chip.clock_hz)
            return max(flops / (self.peak * MATMUL[self.platform]), moved) + LAUNCH_S[self.platform]
        if i.cycles is not None and self.chip.clock_hz:
            return i.cycles / self.chip.clock_hz / CORES[self.chip.name]
        if i.opcode == "custom-call" or not i.bytes:
            return 0.0  # a buffer's allocation, a bitcast
        moved = module.touched_bytes(computation, i)
        return moved / (self.chip.memory_bytes_per_s * MEMORY[self.platform]) + LAUNCH_S[self.platform]

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

    def _all_to_all_s(self, moved_bytes: float, places: list[tuple[int, ...]]) -> float:
        """Seconds until every device of a group has given each its part of its `moved_bytes`.

        NVSwitch: every GPU sends at its full rate, as in an all-gather. Torus: half of everything crosses the
        middle of a dimension, so a full ring of n takes n / 4 times an all-gather of the same bytes a device
        (https://jax-ml.github.io/scaling-book/sharding, whose n / 4 less is of the global array).
        """
        _, outside, ways = self._bandwidths(places)
        n, chip = len(places), self.chip
        within = n // ways
        seconds = moved_bytes * (n - within) / n / outside + ways * 10 * HOP_S if ways > 1 else 0.0
        if within == 1:
            return seconds
        if self.platform == "gpu":
            inside = chip.link_bytes_per_s * NVLINK
            return seconds + moved_bytes * (within - 1) / n / inside + within * HOP_S
        slowest = 0.5  # of two cores of one chip
        for dimension, size in enumerate(self.target.shape):
            at = {place[dimension] for place in places}
            if (extent := len(at)) > 1:
                apart = (max(at) - min(at)) // (extent - 1)  # groups between share the links
                closed = extent * apart == size and _wraps(chip, size)
                across = (extent // 2) * (extent - extent // 2) / extent * apart / (2 if closed else 1)
                slowest = max(slowest, across)
        inside = chip.link_bytes_per_s / chip.per_chip
        return seconds + moved_bytes * within / n * slowest / inside + within * HOP_S

    def _bandwidths(self, places: list[tuple[int, ...]]) -> tuple[float, float, int]:
        """-> (bytes/s of one device inside its slice or host, across them, how many of them)."""
        chip = self.chip
        if self.platform == "gpu":
            hosts = len({place[0] for place in places})
            return chip.link_bytes_per_s * NVLINK, chip.network_bytes_per_s * NVLINK, hosts
        slices = len({place[-1] for place in places})
        links = 0
        for dimension, size in enumerate(self.target.shape):
            extent = len({place[dimension] for place in places})
            if extent > 1:  # both ways round, where the ring closes
                links += 2 if extent == size and _wraps(chip, size) else 1
        return max(links, 1) * chip.link_bytes_per_s / chip.per_chip, chip.network_bytes_per_s, slices


def _wraps(chip: Chip, size: int) -> bool:
    """Whether a torus's dimension of this size is closed to a ring."""
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
