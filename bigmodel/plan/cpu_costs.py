"""What instructions take on this machine's CPU: `schedule.Costs` from a `Calibration`.

XLA runs a CPU program's kernels (thunks) nearly one after another. A matrix product takes what a product of
the nearest measured shapes took; a loop over elements the larger of its arithmetic and its memory traffic.
Forced CPU devices share the cores, so one device's work counts as often as there are devices.
"""

from __future__ import annotations

import functools
import itertools
import math
import re

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
NEAREST = 4  # measured products that a product's speed is interpolated from


class CpuCosts:
    """Costs of one of `devices` forced CPU devices that share the cores."""

    def __init__(self, calibration: Calibration, devices: int = 1) -> None:
        self.c, self.devices = calibration, devices
        self.cores = calibrate.cores()

    def compute_s(self, module: Module, computation: str, i: Instruction, kind: str, flops: float) -> float:
        if i.opcode == "custom-call" and not i.bytes:
            return 0.0
        seconds = self.c.thunk_s
        products = list(_products(module, computation, i))
        if products:
            return (seconds + sum(self.product_s(*p) for p in products)) * self.devices
        if i.opcode == "sort":
            n = _elements(i)
            return (seconds + n * math.log2(n + 1) * self.c.element_s["log"]) * self._share(1)
        moved, threads = module.touched_bytes(computation, i), self._threads(i)
        if "__ynn" in i.text:
            seconds += _interpolate(self.c.reduce, moved)
            return seconds * self.devices
        memory = _interpolate(self.c.stream if threads > 1 else self.c.stream_one, moved)
        seconds += max(memory, self._arithmetic_s(module, i) / threads)
        return seconds * self._share(threads)

    def transfer_s(self, transfer: Transfer) -> float:
        """Measured over all devices; a smaller group moves its share."""
        rows = self.c.collectives.get(transfer.kind) or self.c.collectives.get("all-gather")
        return _interpolate(rows, transfer.bytes) if rows else 0.0

    def stream(self, transfer: Transfer) -> str:
        return "memory"

    def _share(self, threads: int) -> float:
        """How much longer work of this many threads takes when every device does it at once."""
        return max(self.devices * threads / self.cores, 1.0)

    def _threads(self, i: Instruction) -> int:
        found = i.attribute(r'"outer_dimension_partitions":\[([^\]]*)\]') or ""
        parts = math.prod(int(n) for n in re.findall(r"\d+", found))
        return min(parts, self.cores)

    def _arithmetic_s(self, module: Module, i: Instruction) -> float:
        """Of one thread: every operation of a loop, on its own elements, no more than are wanted."""
        if i.opcode != "fusion":
            return self._moved_s(i) if i.opcode in ("transpose", "copy", "gather", "scatter") else 0.0
        body = [inner for called in i.called for inner in module.computations.get(called, ())]
        wanted = sum(_elements(inner) for inner in body[-1:])
        if any(inner.opcode in ("reduce", "reduce-window", "scatter") for inner in body):
            wanted = max(_elements(inner) for inner in body)
        total = 0.0
        for inner in body:
            if inner.opcode in FREE:
                continue
            if inner.opcode in ("transpose", "gather", "scatter"):
                total += min(self._moved_s(inner), wanted * self.c.transpose_s * self.cores)
            elif inner.opcode != "copy":
                each = self.c.element_s[KINDS.get(inner.opcode, "add")]
                total += each * min(_elements(inner), wanted)
        return total

    def _moved_s(self, i: Instruction) -> float:
        return _elements(i) * self.c.transpose_s * self.cores  # it was measured on all of them

    @functools.cache  # noqa: B019  an instance lives as long as a plan
    def product_s(self, dtype: str, layout: str, batch: int, m: int, k: int, n: int) -> float:
        """From the nearest measured products by the sizes' logarithms; speeds weighted by distance."""
        points = [p for p in self.c.products if p.dtype == dtype] or list(self.c.products)
        points = [p for p in points if p.layout == layout] or points
        here = _place(batch, m, k, n)
        near = sorted((math.dist(here, _place(p.batch, p.m, p.k, p.n)), p.seconds, p) for p in points)[
            :NEAREST
        ]
        weights = [1 / (distance**2 + 1e-3) for distance, _, _ in near]
        speed = sum(w * math.log(_speed(p)) for w, (_, _, p) in zip(weights, near, strict=True)) / sum(
            weights
        )
        return 2.0 * batch * m * k * n / math.exp(speed)


def _speed(p: Product) -> float:
    return 2.0 * p.batch * p.m * p.k * p.n / p.seconds


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
