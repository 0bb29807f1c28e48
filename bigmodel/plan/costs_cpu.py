"""Seconds of instructions on this machine's CPU: `schedule.Costs` from a `Calibration`.

A matrix product takes what a product of the nearest measured shapes took; a loop over elements the larger of
its arithmetic and its memory traffic; each on all cores and on one, as kernels (thunks) that do not wait for
each other share them (`cpu_schedule.py`). Forced CPU devices share the cores too.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from bigmodel.plan import calibrate
from bigmodel.plan.calibrate import Calibration, Product
from bigmodel.plan.hlo import Instruction, Module
from bigmodel.plan.schedule import Transfer

# Which measured kind an operation inside a loop is; what is not named costs an addition.
KINDS = {
    "divide": "divide", "sqrt": "sqrt", "rsqrt": "sqrt", "cbrt": "power", "exponential": "exponential",
    "exponential-minus-one": "exponential", "log": "log", "log-plus-one": "log", "tanh": "tanh",
    "logistic": "exponential", "cosine": "cosine", "sine": "cosine", "tan": "cosine", "erf": "tanh",
    "power": "power", "remainder": "divide", "atan2": "power",
}  # fmt: skip
FREE = (
    "parameter",
    "constant",
    "broadcast",
    "bitcast",
    "iota",
    "tuple",
    "get-tuple-element",
    "slice",
    "reshape",
)
# Of the memory's traffic, what a kernel makes that writes where it has read; others fetch what they overwrite
IN_PLACE = 2 / 3
NEAREST = 4  # measured products that a product's speed is interpolated from


@dataclass(frozen=True)
class Seconds:
    """Seconds of a kernel: alone on all cores, on one core, and of its traffic at the memory's full
    bandwidth, which concurrent kernels share."""

    alone: float
    one_core: float
    memory: float = 0.0

    def on(self, share: float, cores: float) -> float:
        """On `share` of the cores, between the two by powers; less than one: in turns with others."""
        if share <= 1:
            return self.one_core / share
        return self.one_core * (self.alone / self.one_core) ** (math.log(share) / math.log(cores))


class CpuCosts:
    """Costs of one of `devices` forced CPU devices that share the cores."""

    def __init__(self, calibration: Calibration, devices: int = 1) -> None:
        self.c, self.devices, self.cores = calibration, devices, calibrate.cores()
        self.share = self.cores / devices  # of the cores, what one device has

    def compute_s(self, module: Module, computation: str, i: Instruction, kind: str, flops: float) -> float:
        return self.seconds(module, computation, i, kind).alone

    def seconds(self, module: Module, computation: str, i: Instruction, kind: str) -> Seconds:
        """Seconds of an instruction that is neither loop nor call, on the device's share of the cores."""
        if i.opcode == "custom-call" and not i.bytes:
            return Seconds(0.0, 0.0)
        moved = module.touched_bytes(computation, i) * (IN_PLACE if kind == "optimizer" else 1)
        all_cores, one = self._kernel(module, computation, i, moved)
        kernel = Seconds(self.c.thunk_s + all_cores, self.c.thunk_s + one)
        memory = self.devices * moved / self._bandwidth(moved)
        alone = kernel.on(self.share, self.cores)
        if self.share > 1:
            return Seconds(alone, kernel.one_core, memory)
        alone = max(alone, memory)  # every device is at it
        return Seconds(alone, alone, memory)

    def _kernel(self, module: Module, computation: str, i: Instruction, moved: float) -> tuple[float, float]:
        """-> seconds on every core, on one."""
        products = [self.product_s(*p) for p in _products(module, computation, i)]
        if products:
            return sum(p[0] for p in products), sum(p[1] for p in products)
        if i.opcode == "sort":
            n = _elements(i)
            return (n * math.log2(n + 1) * self.c.element_s["log"],) * 2
        if "__ynn" in i.text:
            return _interpolate(self.c.reduce, moved), _interpolate(self.c.reduce_one, moved)
        arithmetic = self._arithmetic_s(module, i)
        one, threads = max(_interpolate(self.c.stream_one, moved), arithmetic), self._threads(i)
        if threads == 1:
            return one, one
        return min(max(_interpolate(self.c.stream, moved), arithmetic / threads), one), one

    def _bandwidth(self, size: float) -> float:
        """Bytes a second of all cores: the most of any measured set of this size or larger."""
        rates = [b / s for b, s in self.c.stream if b >= size and s > 0]
        return max(rates, default=self.c.stream[-1][0] / self.c.stream[-1][1])

    def transfer_s(self, transfer: Transfer) -> float:
        """Measured over all devices; a smaller group moves its share."""
        kind = transfer.kind.removeprefix("ragged-")
        rows = self.c.collectives.get(kind) or self.c.collectives.get("all-gather")
        return _interpolate(rows, transfer.bytes) if rows else 0.0

    def stream(self, transfer: Transfer) -> str:
        return "memory"

    def _threads(self, i: Instruction) -> int:
        found = i.attribute(r'"outer_dimension_partitions":\[([^\]]*)\]') or ""
        parts = math.prod(int(n) for n in re.findall(r"\d+", found))
        return min(parts, self.cores)

    def _arithmetic_s(self, module: Module, i: Instruction) -> float:
        """Seconds of one thread: every operation of a loop, on its own elements, no more than are used."""
        if i.opcode != "fusion":
            strided = i.opcode in ("transpose", "copy", "gather", "scatter")
            return _elements(i) * self.c.transpose_s if strided else 0.0
        body = [inner for called in i.called for inner in module.computations.get(called, ())]
        wanted = sum(_elements(inner) for inner in body[-1:])
        if any(inner.opcode in ("reduce", "reduce-window", "scatter") for inner in body):
            wanted = max(_elements(inner) for inner in body)
        total = 0.0
        for inner in body:
            if inner.opcode in FREE:
                continue
            if inner.opcode in ("transpose", "gather", "scatter"):
                total += min(_elements(inner), wanted) * self.c.transpose_s
            elif inner.opcode != "copy":
                each = self.c.element_s[KINDS.get(inner.opcode, "add")]
                total += each * min(_elements(inner), wanted)
        return total

    @functools.cache  # noqa: B019  an instance lives as long as a plan
    def product_s(self, dtype: str, layout: str, batch: int, m: int, k: int, n: int) -> tuple[float, float]:
        """Seconds on every core, on one: from the nearest measured products by the sizes' logarithms; their
        speeds are weighted by distance."""
        points = [p for p in self.c.products if p.dtype == dtype] or list(self.c.products)
        points = [p for p in points if p.layout == layout] or points
        here = _place(batch, m, k, n)
        near = sorted(points, key=lambda p: math.dist(here, _place(p.batch, p.m, p.k, p.n)))[:NEAREST]
        weights = [1 / (math.dist(here, _place(p.batch, p.m, p.k, p.n)) ** 2 + 1e-3) for p in near]

        def seconds(measured: Callable[[Product], float]) -> float:
            logs = [math.log(_flops(p) / measured(p)) for p in near]
            speed = sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights)
            return 2.0 * batch * m * k * n / math.exp(speed)

        return seconds(lambda p: p.seconds), seconds(lambda p: p.one_core_s)


def _flops(p: Product) -> float:
    return 2.0 * p.batch * p.m * p.k * p.n


def _place(batch: int, m: int, k: int, n: int) -> tuple[float, ...]:
    return math.log2(batch) / 2, math.log2(m), math.log2(k), math.log2(n)


def _elements(i: Instruction) -> int:
    return sum(math.prod(shape.dims) for shape in i.shapes)


def _interpolate(rows: tuple[tuple[float, float], ...], size: float) -> float:
    """Seconds at `size` between measured (size, seconds), in logarithms; in proportion beyond them."""
    if size <= 0:
        return 0.0
    if size <= rows[0][0] or len(rows) == 1:
        return max(rows[0][1], 0.0) * size / rows[0][0]
    for (a, s), (b, t) in itertools.pairwise(rows):
        if size <= b:
            s, t = max(s, 1e-8), max(t, 1e-8)
            return s * (t / s) ** (math.log(size / a) / math.log(b / a))
    return rows[-1][1] * size / rows[-1][0]


_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "bfloat16"}


def _products(module: Module, computation: str, i: Instruction) -> list[tuple[str, str, int, int, int, int]]:
    """(dtype, layout, batch, m, k, n) of every matrix product in an instruction; convolutions as im2col's."""
    if i.opcode == "fusion":
        return [
            p for called in i.called for inner in module.computations[called]
            for p in _products(module, called, inner)
        ]  # fmt: skip
    if i.opcode not in ("dot", "convolution"):
        return []
    lhs, rhs = (module.tables[computation][o].shapes[0] for o in i.operands[:2])
    dtype, out = _DTYPES.get(lhs.dtype, "float32"), math.prod(i.shapes[0].dims)
    if i.opcode == "convolution":
        features = i.shapes[0].dims[-1]
        taps = module.instruction_flops(computation, i) / 2 / max(out, 1)
        return [(dtype, "nn", 1, out // features, max(round(taps), 1), features)]

    def dims(name: str) -> tuple[int, ...]:
        found = i.attribute(name + r"=\{([\d,]*)\}") or ""
        return tuple(int(d) for d in found.split(",") if d)

    left, right, shared = dims("lhs_contracting_dims"), dims("rhs_contracting_dims"), dims("lhs_batch_dims")
    batch = math.prod([lhs.dims[d] for d in shared])
    k = math.prod([lhs.dims[d] for d in left])
    m = math.prod(lhs.dims) // max(batch * k, 1)
    n = math.prod(rhs.dims) // max(batch * k, 1)
    layout = ("n" if left and left[-1] == len(lhs.dims) - 1 else "t") + (
        "t" if right and right[-1] == len(rhs.dims) - 1 else "n"
    )
    return [(dtype, "nt" if layout == "tt" else layout, batch, m, k, n)]
