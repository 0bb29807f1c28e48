"""Walks a scheduled HLO module as the chip would, and finds the transfers that compute hides.

The compute stream takes instructions in the compiler's order. Collectives and copies between memories run
at the same time on streams of their own, from their start to their done; a done that comes too early is
exposed time. A loop's body is walked twice (the second time in its steady state) and multiplied by its
length, so the cost of a plan does not grow with depth. `Costs` prices each instruction.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Protocol

from bigmodel.plan import hlo
from bigmodel.plan.hlo import Instruction, Module

COMPUTE = ("matmul", "attention", "memory", "optimizer")
SILENT = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "opt-barrier", "add-dependency", "domain",
    "rng-get-and-update-state", "async-update",
)  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """A collective, or a copy between memories: what `Costs.transfer_s` prices."""

    kind: str  # a name of hlo.COLLECTIVES, or `copy` (HBM and VMEM) or `offload` (device and host)
    bytes: float  # of the result, on one device: the gathered, or the reduced array
    group: tuple[int, ...] = ()  # partition numbers of one of its groups


@dataclass(frozen=True)
class Event:
    name: str
    kind: str  # of COMPUTE, of hlo.COLLECTIVES, `copy` or `offload`
    stream: str
    start_s: float
    duration_s: float
    times: int = 1  # how often in a step
    exposed_s: float = 0.0  # of one time: what it adds to the step; of what runs at once, each has a part
    flops: float = 0.0
    bytes: float = 0.0
    group: tuple[int, ...] = ()
    where: str = ""  # the traced program's name for it


@dataclass(frozen=True)
class Schedule:
    """One step on one device. `events` hold a loop's body once, with `times`."""

    total_s: float
    events: tuple[Event, ...]

    def breakdown(self) -> dict[str, float]:
        """Seconds a step by kind of compute, and `communication` that nothing hides; they add to total_s."""
        out: defaultdict[str, float] = defaultdict(float)
        for e in self.events:
            out[e.kind if e.kind in COMPUTE else "communication"] += e.times * e.exposed_s
        return dict(out)


class Costs(Protocol):
    """Seconds that hardware takes for instructions and transfers."""

    def compute_s(
        self, module: Module, computation: str, i: Instruction, kind: str, flops: float
    ) -> float: ...

    def transfer_s(self, transfer: Transfer) -> float: ...

    def stream(self, transfer: Transfer) -> str:
        """Transfers of one stream wait for each other."""
        ...


@dataclass
class _Clock:
    """The time on the compute stream, the time at which each other stream is free, and the events so far."""

    now_s: float = 0.0
    free_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    events: list[Event] = field(default_factory=list)


def walk(module: Module, costs: Costs) -> Schedule:
    """Raises ValueError for a loop whose length cannot be read."""
    clock = _Clock()
    _walk(module, module.entry, costs, clock, 1)
    return Schedule(clock.now_s, tuple(clock.events))


def _walk(module: Module, computation: str, costs: Costs, clock: _Clock, times: int) -> None:
    under_way: dict[str, frozenset[tuple[float, int]]] = {}  # instruction -> (finish, index of the event)
    for i in module.computations[computation]:
        carried = frozenset(w for operand in i.operands for w in under_way.get(operand, ()))
        if i.opcode in SILENT:
            if carried:
                under_way[i.name] = carried
        elif i.opcode == "while":
            _loop(module, i, costs, clock, times)
        elif i.opcode == "conditional":
            _longest(module, i, costs, clock, times)
        elif i.opcode == "call":
            for called in i.called:
                _walk(module, called, costs, clock, times)
        elif _ends(module, i):
            _wait(clock, carried)
        elif transfer := transfer_of(module, computation, i):
            started = _start(costs, clock, i, transfer, times)
            if _is_async(module, i):
                under_way[i.name] = frozenset([started])
            else:
                _wait(clock, {started})
        else:
            _compute(module, computation, i, costs, clock, times)
            if carried and i.opcode == "fusion":  # an async collective that this fusion helps along
                under_way[i.name] = carried


def _loop(module: Module, i: Instruction, costs: Costs, clock: _Clock, times: int) -> None:
    body = i.attribute(r"body=%?([\w.\-]+)") or ""
    count = module.trip_count(i)
    began, first = clock.now_s, len(clock.events)
    _walk(module, body, costs, clock, times * count)
    if count > 1:
        once, end = clock.now_s, len(clock.events)
        _walk(module, body, costs, clock, times * count)
        steady = clock.now_s - once
        del clock.events[first:end]  # keep the steady iteration, moved to the loop's beginning
        clock.events[first:] = [replace(e, start_s=e.start_s - (once - began)) for e in clock.events[first:]]
        clock.now_s = began + count * steady
        for stream in clock.free_s:
            clock.free_s[stream] = min(clock.free_s[stream], clock.now_s)


def _longest(module: Module, i: Instruction, costs: Costs, clock: _Clock, times: int) -> None:
    """A conditional takes its longest branch."""
    ways = []
    for called in i.called:
        copy = _Clock(clock.now_s, defaultdict(float, clock.free_s))
        _walk(module, called, costs, copy, times)
        ways.append(copy)
    if ways:
        longest = max(ways, key=lambda c: c.now_s)
        clock.now_s, clock.free_s = longest.now_s, longest.free_s
        clock.events += longest.events


def _compute(
    module: Module, computation: str, i: Instruction, costs: Costs, clock: _Clock, times: int
) -> None:
    flops = module.instruction_flops(computation, i)
    kind = kind_of(i, flops)
    seconds = costs.compute_s(module, computation, i, kind, flops)
    if seconds > 0:
        clock.events.append(
            Event(
                i.name,
                kind,
                "compute",
                clock.now_s,
                seconds,
                times,
                seconds,
                flops=flops,
                bytes=i.bytes,
                where=i.op_name,
            )
        )
        clock.now_s += seconds


def kind_of(i: Instruction, flops: float) -> str:
    if i.opcode == "custom-call" and re.search(r"splash|flash|fmha|attention", i.target + i.op_name + i.name):
        return "attention"
    if flops or (i.opcode == "custom-call" and re.search(r"gemm|matmul|conv", i.target)):
        return "matmul"
    return "optimizer" if "optimizer" in i.op_name else "memory"


def _start(costs: Costs, clock: _Clock, i: Instruction, transfer: Transfer, times: int) -> tuple[float, int]:
    """Queues a transfer on its stream; -> (when it ends, the index of its event)."""
    seconds, stream = costs.transfer_s(transfer), costs.stream(transfer)
    begin = max(clock.now_s, clock.free_s[stream])
    clock.free_s[stream] = begin + seconds
    clock.events.append(
        Event(
            i.name, transfer.kind, stream, begin, seconds, times,
            bytes=transfer.bytes, group=transfer.group, where=i.op_name,
        )
    )  # fmt: skip
    return begin + seconds, len(clock.events) - 1


def _wait(clock: _Clock, under_way: Set[tuple[float, int]]) -> None:
    for finish, index in sorted(under_way):
        if finish > clock.now_s:
            event = clock.events[index]
            clock.events[index] = replace(event, exposed_s=event.exposed_s + finish - clock.now_s)
            clock.now_s = finish


# -------------------------------------------------------------------------------- what moves, and to whom


def transfer_of(module: Module, computation: str, i: Instruction) -> Transfer | None:
    """The transfer that an instruction makes or starts, if it is one.

    Raises:
        ValueError: a collective that is not of hlo.COLLECTIVES: better no plan than one that leaves it out.
    """
    if i.opcode in ("copy-start", "slice-start") or (i.opcode == "async-start" and not _inner(module, i)):
        spaces = {shape.space for shape in i.shapes}
        table = module.tables[computation]
        spaces |= {s.space for o in i.operands if o in table for s in table[o].shapes}
        big = [s for s in i.shapes if s.dims]
        moved = min((s.bytes for s in big), default=0.0)
        return Transfer("offload" if 5 in spaces else "copy", moved)
    if i.opcode in ("send", "recv"):
        return _sent(i)
    if base := _collective(i.opcode):
        return _priced(base, i, module.tables[computation])
    if re.search(r"\b(?:replica_groups|source_target_pairs)=", i.text.split("backend_config=")[0]):
        raise ValueError(f"{i.name}: the collective {i.opcode} has no price")
    inner = _inner(module, i)
    if inner and (
        i.opcode != "fusion" or _holds(module, i, "AsyncCollectiveStart") or not _has_math(module, i)
    ):
        name, at = inner
        return _priced(_collective(at.opcode) or "", at, module.tables[name])
    return None


def _collective(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in hlo.COLLECTIVES else None


def _inner(module: Module, i: Instruction) -> tuple[str, Instruction] | None:
    """The collective inside a fusion or an async wrapper, with the computation that holds it."""
    if i.opcode not in ("fusion", "async-start"):
        return None
    for called in i.called:
        for at in module.computations.get(called, ()):
            if _collective(at.opcode):
                return called, at
            if found := _inner(module, at):
                return found
    return None


def _holds(module: Module, i: Instruction, target: str) -> bool:
    return any(
        at.target == target or (at.opcode == "fusion" and _holds(module, at, target))
        for called in i.called
        for at in module.computations.get(called, ())
    )


def _has_math(module: Module, i: Instruction) -> bool:
    return i.cycles is not None or any(module.flops(called) for called in i.called)


def _ends(module: Module, i: Instruction) -> bool:
    if i.opcode.endswith("-done") or i.opcode == "async-done":
        return True
    return i.opcode == "fusion" and _holds(module, i, "AsyncCollectiveDone")


def _is_async(module: Module, i: Instruction) -> bool:
    return i.opcode.endswith(("-start", "send", "recv")) or _holds(module, i, "AsyncCollectiveStart")


def _priced(kind: str, i: Instruction, table: dict[str, Instruction]) -> Transfer:
    """Bytes of a device's array after (gather) or before (the others) a collective."""
    known = [table[o] for o in i.operands if o in table]
    if kind == "ragged-all-to-all":
        known = known[:1]  # then: where it goes, offsets and sizes
    operands = sum(operand.bytes for operand in known)
    if kind == "all-gather":
        gathered = i.shapes[len(i.operands) :] if i.opcode.endswith("-start") else ()
        size = sum(s.bytes for s in gathered or i.shapes)
    else:
        size = operands or i.bytes
    if kind == "collective-permute":
        return Transfer(kind, operands or i.bytes, _pair(i))
    return Transfer(kind, size, first_group(i))


def _sent(i: Instruction) -> Transfer:
    """A send, or a receive: between devices, of which every program has both, the receive's bytes count."""
    moved = max((s.bytes for s in i.shapes), default=0.0)
    if "is_host_transfer=true" in i.text:
        return Transfer("offload", moved)
    return Transfer("collective-permute", moved if i.opcode == "recv" else 0.0, _pair(i))


def _pair(i: Instruction) -> tuple[int, ...]:
    """(source, target) of a permute's first pair; sent against the ring's order, the target comes first."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", i.attribute(r'source_target_pairs="?\{(.*?\})\}') or "")
    if not pairs:
        return ()
    source, target = int(pairs[0][0]), int(pairs[0][1])
    onwards = len(pairs) == 1 or target == int(pairs[1][0])
    return (min(source, target), max(source, target))[:: 1 if onwards else -1]


def first_group(i: Instruction) -> tuple[int, ...]:
    """Partition numbers of the first of a collective's groups; () when it spans all."""
    text = i.text
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in found.group(1).split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, size = int(found.group(1)), int(found.group(2))
        dims = [int(d) for d in found.group(3).split(",")]
        order = [int(d) for d in found.group(4).split(",")] if found.group(4) else list(range(len(dims)))
        del groups
        return tuple(_unravel(n, dims, order) for n in range(size))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\([^)]*\))? ?\{([^}]*)\}", text):
        sizes = [(name, int(n)) for name, n in re.findall(r"'([^']+)'=(\d+)", found.group(1))]
        chosen = set(re.findall(r"'([^']+)'", found.group(2)))
        group, stride = [0], 1
        for name, n in reversed(sizes):
            if name in chosen:
                group = [g + k * stride for k in range(n) for g in group]
            stride *= n
        return tuple(sorted(group))
    return ()


def _unravel(n: int, dims: list[int], order: list[int]) -> int:
    """Element n of arange(prod(dims)).reshape(dims).transpose(order).ravel()."""
    strides, step = [0] * len(dims), 1
    for d in reversed(range(len(dims))):
        strides[d], step = step, step * dims[d]
    value = 0
    for d in reversed(order):
        n, index = divmod(n, dims[d])
        value += index * strides[d]
    return value
