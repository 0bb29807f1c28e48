"""Runs a compiled CPU program as XLA's thread pool would: kernels (thunks) that do not wait for each other
share the cores and the memory's bandwidth.

XLA:CPU starts a kernel when its operands are there (xla/backends/cpu/runtime/thunk_executor.cc). A worker
takes what is ready, first come, first served. It runs a kernel of one thread itself, and one of YNNPACK with
helpers; others it hands to the pool, which takes them one after another, and goes on. What such a kernel
makes ready becomes a new worker's. More than eight kernels that wait in one worker's queue are divided
between two. A sequence of up to eight runs in its own order. A loop's rounds follow one another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bigmodel.plan.costs_cpu import CpuCosts, Seconds
from bigmodel.plan.hlo import Instruction, Module
from bigmodel.plan.schedule import SILENT, Event, Schedule, kind_of, transfer_of

SEQUENTIAL = 8  # the longest sequence that runs in its own order
QUEUE = 8  # the most that waits for one worker while another could take half
WORKERS = 4  # the most on one sequence


@dataclass
class _Thunk:
    """A kernel, a collective, or a loop or branch with all that is in it."""

    seconds: Seconds
    blocks: bool  # its worker
    waits: frozenset[int]  # for which thunks of its sequence
    events: tuple[Event, ...]  # as if it had begun at 0 and run alone
    left: float = 1.0  # of its work
    lane: int | None = None  # of the picture, once it has begun
    start_s: float = 0.0
    end_s: float = 0.0
    share_s: float = 0.0  # of the time that passed while it ran, its part

    def placed(self) -> Iterable[Event]:
        """Its events at their times, with the seconds that each adds to the step."""
        stretched = (self.end_s - self.start_s) / self.seconds.alone
        share = self.share_s / self.seconds.alone
        for event in self.events:
            yield replace(
                event,
                start_s=self.start_s + event.start_s * stretched,
                duration_s=event.duration_s * stretched,
                exposed_s=event.exposed_s * share,
                stream=f"{event.stream} {self.lane + 1}" if self.lane else event.stream,
            )


def run(module: Module, costs: CpuCosts) -> Schedule:
    """One step on one device. `events` hold a loop's body once, with `times`.

    Raises:
        ValueError: a loop's length cannot be read.
    """
    seconds, events = _run(module, module.entry, costs, 1)
    return Schedule(seconds.alone, events)


def _run(module: Module, computation: str, costs: CpuCosts, times: int) -> tuple[Seconds, tuple[Event, ...]]:
    thunks = _thunks(module, computation, costs, times)
    if costs.share <= 1 or len(thunks) <= SEQUENTIAL:
        total_s = _in_order(thunks)
    else:
        total_s = _Pool(thunks, costs.share).run()
    one_core = sum(thunk.seconds.one_core for thunk in thunks)
    memory = sum(thunk.seconds.memory for thunk in thunks)
    events = tuple(event for thunk in thunks for event in thunk.placed())
    return Seconds(total_s, max(one_core, total_s), memory), events


def _thunks(module: Module, computation: str, costs: CpuCosts, times: int) -> list[_Thunk]:
    thunks: list[_Thunk] = []
    made_by: dict[str, frozenset[int]] = {}  # instruction -> the thunks that its value waits for
    for i in module.computations[computation]:
        waits = frozenset(index for operand in i.operands for index in made_by.get(operand, ()))
        seconds, events = _work(module, computation, i, costs, times)
        if seconds.alone > 0:
            threads = seconds.alone < 0.9 * seconds.one_core
            blocks = not threads or "__ynn" in i.text or i.opcode in ("while", "call", "conditional")
            thunks.append(_Thunk(seconds, blocks, waits, events))
            waits = frozenset([len(thunks) - 1])
        made_by[i.name] = waits
    return thunks


def _work(
    module: Module, computation: str, i: Instruction, costs: CpuCosts, times: int
) -> tuple[Seconds, tuple[Event, ...]]:
    """Seconds of an instruction, and its events."""
    if i.opcode in SILENT:
        return Seconds(0.0, 0.0), ()
    if i.opcode == "while":
        count = module.trip_count(i)
        body = i.attribute(r"body=%?([\w.\-]+)") or ""
        once, events = _run(module, body, costs, times * count)
        return Seconds(count * once.alone, count * once.one_core, count * once.memory), events
    if i.opcode in ("call", "conditional"):  # a conditional takes its longest branch
        branches = [_run(module, called, costs, times) for called in i.called]
        return max(branches, key=lambda branch: branch[0].alone, default=(Seconds(0.0, 0.0), ()))
    if moved := transfer_of(module, computation, i):
        took = costs.transfer_s(moved)
        event = Event(
            i.name, moved.kind, "compute", 0.0, took, times, took, 0.0, moved.bytes, moved.group, i.op_name
        )
        return Seconds(took, took), (event,)
    flops = module.instruction_flops(computation, i)
    kind = kind_of(i, flops)
    seconds = costs.seconds(module, computation, i, kind)
    alone = seconds.alone
    event = Event(i.name, kind, "compute", 0.0, alone, times, alone, flops, i.bytes, where=i.op_name)
    return seconds, (event,)


def _in_order(thunks: list[_Thunk]) -> float:
    now_s = 0.0
    for thunk in thunks:
        thunk.start_s, thunk.share_s = now_s, thunk.seconds.alone
        thunk.end_s = now_s = now_s + thunk.seconds.alone
    return now_s


class _Pool:
    """The threads at work on one sequence."""

    def __init__(self, thunks: list[_Thunk], cores: float) -> None:
        self.thunks, self.cores, self.now_s = thunks, cores, 0.0
        self.waiting = [len(thunk.waits) for thunk in thunks]
        self.after: list[list[int]] = [[] for _ in thunks]
        for index, thunk in enumerate(thunks):
            for before in thunk.waits:
                self.after[before].append(index)
        self.blocking: dict[int, deque[int]] = {}  # thunk -> the queue of the worker that runs it
        self.handed: list[int] = []  # thunks that the pool has

    def run(self) -> float:
        """-> seconds until all are done."""
        workers = [deque(index for index, count in enumerate(self.waiting) if not count)]
        while True:
            while workers:
                self._work_on(workers.pop(), workers)
            takes = self._takes()
            if not takes:
                return self.now_s
            passed_s = min(self.thunks[index].left * took for index, took in takes.items())
            self.now_s += passed_s
            for index, took in takes.items():
                thunk = self.thunks[index]
                thunk.share_s += passed_s / len(takes)
                thunk.left -= passed_s / took
                if thunk.left < 1e-9:
                    workers.append(self._finish(index))

    def _work_on(self, queue: deque[int], workers: list[deque[int]]) -> None:
        """A worker goes through its queue up to a kernel that blocks it."""
        while queue:
            index = queue.popleft()
            if len(queue) > QUEUE and len(self.blocking) + len(workers) < WORKERS:
                workers.append(deque(queue.pop() for _ in range(len(queue) // 2)))
                workers[-1].reverse()
            if self.thunks[index].blocks:
                self.blocking[index] = queue
                return
            self.handed.append(index)

    def _finish(self, index: int) -> deque[int]:
        """-> the queue that goes on with what this thunk made ready."""
        self.thunks[index].end_s = self.now_s
        if index in self.blocking:
            queue = self.blocking.pop(index)
        else:
            self.handed.remove(index)
            queue = deque()
        for after in self.after[index]:
            self.waiting[after] -= 1
            if not self.waiting[after]:
                queue.append(after)
        return queue

    def _takes(self) -> dict[int, float]:
        """Thunk -> seconds that all of its work would take at its present share of the cores; others wait.

        The pool takes one kernel after another, with the cores that are free.
        """
        running = list(self.blocking)
        if len(running) + 1 <= self.cores:
            running += self.handed[:1]
        for index in running:
            if self.thunks[index].lane is None:
                taken = {self.thunks[other].lane for other in running}
                self.thunks[index].lane = next(lane for lane in range(len(running)) if lane not in taken)
                self.thunks[index].start_s = self.now_s
        each = self.cores / max(len(running), 1)
        takes = {index: self.thunks[index].seconds.on(each, self.cores) for index in running}
        return self._shared(takes)

    def _shared(self, takes: dict[int, float]) -> dict[int, float]:
        """Shares the memory's bandwidth equally; what one does not use goes to the others."""
        wanted = {index: self.thunks[index].seconds.memory / took for index, took in takes.items()}
        left, slowed = 1.0, dict(takes)
        for done, index in enumerate(sorted(wanted, key=wanted.__getitem__)):
            part = left / (len(wanted) - done)
            if wanted[index] > part:
                slowed[index] = takes[index] * wanted[index] / part
            left -= min(wanted[index], part)
        return slowed
