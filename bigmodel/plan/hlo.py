"""Reads the text of a compiled, scheduled HLO module: computations, instructions, loops and their lengths.

Only what a schedule needs: shapes, operands, called computations, collectives' groups, and the TPU compiler's
own `estimated_cycles`. Instructions may span lines (a Pallas call's metadata does). FLOPs follow XLA's
HloCostAnalysis: a multiply and an add are two; a convolution counts only the taps that fall on the input.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

WHOLE = ("s32", "u32", "s64", "u64", "s16", "u16", "s8", "u8")
BITS = {"pred": 8, "token": 0, "opaque": 0}  # the rest carry their bits in their name: bf16, s4, f8e4m3fn
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # memory space: 0 the device's main memory, 1 a TPU's VMEM, 5 the host's

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype)
        if bits is None:
            bits = int(re.sub(r"^[a-z]+", "", self.dtype).split("e")[0] or 8)
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; `text` has the parts that are not parsed."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # one, or a tuple's leaves
    operands: tuple[str, ...]
    text: str = field(repr=False)  # everything after the operands
    literal: str = ""  # a constant's value, a parameter's number

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.text)
        return found.group(1) if found else None

    @property
    def cycles(self) -> float | None:
        """The TPU compiler's estimate, where it gives one."""
        text = self.attribute(r'"estimated_cycles":"(\d+)"')
        return float(text) if text else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in the text's order."""
        text = self.text.split("backend_config=")[0]
        names = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", text)
        for group in re.findall(r"(?:called_computations|branch_computations)=\{([^}]*)\}", text):
            names += re.findall(r"%?([\w.\-]+)", group)
        return tuple(names)


@dataclass(frozen=True)
class Module:
    """Computations by name, each in the order of its schedule."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]

    @functools.cached_property
    def tables(self) -> dict[str, dict[str, Instruction]]:
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def trip_count(self, loop: Instruction) -> int:
        """Number of rounds of a while loop: XLA's own, or `bound / step` read from its condition and body.

        Raises:
            ValueError: the loop's length is not a constant of the module.
        """
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        condition = loop.attribute(r"condition=%?([\w.\-]+)") or ""
        bounds = [int(i.literal) for i in self._reachable(condition) if _is_whole_constant(i)]
        if not bounds:
            raise ValueError(f"the length of the loop {loop.name} cannot be read from {condition}")
        grows = self._grows(loop.attribute(r"body=%?([\w.\-]+)") or "", self._counter(condition))
        return max(1, -(-max(bounds) // max(grows, 1)))

    def _reachable(self, name: str) -> list[Instruction]:
        found = list(self.computations.get(name, ()))
        return found + [i for j in list(found) for called in j.called for i in self._reachable(called)]

    def _counter(self, condition: str) -> int:
        """Index of the loop's variable that its condition compares: the one integer that it extracts."""
        taken = [
            i for i in self.computations.get(condition, ())
            if i.opcode == "get-tuple-element" and i.shapes[0].dims == () and i.shapes[0].dtype in WHOLE
        ]  # fmt: skip
        return int(taken[0].attribute(r"index=(\d+)") or 0) if len(taken) == 1 else 0

    def _grows(self, body: str, counter: int) -> int:
        """By how much a loop's counter grows in its body: by more than one where the compiler unrolled it."""
        table = self.tables.get(body, {})
        root = next((i for i in reversed(self.computations.get(body, ())) if i.opcode == "tuple"), None)
        at = table.get(root.operands[counter]) if root and counter < len(root.operands) else None
        total = 0
        while at is not None and at.opcode in ("add", "copy", "bitcast", "fusion"):
            operands = [table[o] for o in at.operands if o in table]
            constants = [i for i in operands if _is_whole_constant(i)]
            if at.opcode == "fusion":  # of an addition
                constants = [i for i in self.computations.get(at.called[0], ()) if _is_whole_constant(i)]
            total += int(constants[0].literal) if constants else 0
            at = next((i for i in operands if not _is_whole_constant(i)), None)
        return total

    def flops(self, name: str) -> float:
        """FLOPs of the dots and convolutions in a computation and its callees, each loop counted once."""
        return sum(self.instruction_flops(name, i) for i in self.computations.get(name, ()))

    def instruction_flops(self, computation: str, i: Instruction) -> float:
        table = self.tables[computation]
        if i.opcode == "dot":
            lhs = table[i.operands[0]].shapes[0].dims
            contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
            return (
                2 * math.prod(i.shapes[0].dims) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)
            )
        if i.opcode == "convolution":
            return _convolution_flops(i, table[i.operands[0]].shapes[0], table[i.operands[1]].shapes[0])
        if i.opcode in ("fusion", "call", "async-start"):
            return sum(self.flops(called) for called in i.called)
        return 0.0

    def touched_bytes(self, computation: str, i: Instruction) -> float:
        """Bytes of main memory that an instruction reads and writes; of what it slices, only the slice."""
        if i.opcode != "fusion":
            table = self.tables[computation]
            shapes = [*i.shapes, *(s for o in i.operands if o in table for s in table[o].shapes)]
            return sum(s.bytes for s in shapes if s.space == 0)
        body, table = self.computations[i.called[0]], self.tables[i.called[0]]
        users: dict[str, list[Instruction]] = {}
        for inner in body:
            for operand in inner.operands:
                users.setdefault(operand, []).append(inner)
        total = 0.0
        for inner in body:
            if inner.opcode != "parameter" or any(s.space for s in inner.shapes):
                continue
            by = users.get(inner.name, [])
            if by and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in by):
                total += sum(u.bytes for u in by)
            elif not all(u.opcode == "dynamic-update-slice" and u.operands[0] == inner.name for u in by):
                total += inner.bytes
        root = body[-1]
        for result in [table[o] for o in root.operands] if root.opcode == "tuple" else [root]:
            while result.opcode == "bitcast" and result.operands[0] in table:
                result = table[result.operands[0]]
            if result.opcode == "dynamic-update-slice":
                result = table[result.operands[1]]
            total += sum(s.bytes for s in result.shapes if s.space == 0)
        return total


def _is_whole_constant(i: Instruction) -> bool:
    return i.opcode == "constant" and i.shapes[0].dims == () and i.literal.lstrip("-").isdigit()


def _convolution_flops(i: Instruction, lhs: Shape, rhs: Shape) -> float:
    labels = i.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
    lhs_labels, rest = labels.split("_", 1)
    rhs_labels, out_labels = rest.split("->")
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", i.attribute(r"window=\{([^}]*)\}") or ""))
    spatial = sorted(c for c in out_labels if c.isdigit())
    sizes = [int(s) for s in window["size"].split("x")] if "size" in window else [1] * len(spatial)

    def per_dim(key: str, default: int) -> list[int]:
        return [int(s) for s in window[key].split("x")] if key in window else [default] * len(sizes)

    stride, base, dilation = per_dim("stride", 1), per_dim("lhs_dilate", 1), per_dim("rhs_dilate", 1)
    pads = [int(p.split("_")[0]) for p in window.get("pad", "").split("x") if p] or [0] * len(sizes)
    taps = 1.0
    for d, label in enumerate(spatial):
        inputs = lhs.dims[lhs_labels.index(label)]
        outputs = i.shapes[0].dims[out_labels.index(label)]
        taps *= _taps(inputs, outputs, Window(sizes[d], stride[d], base[d], dilation[d], pads[d]))
    inputs_per_group = rhs.dims[rhs_labels.index("i")]
    out = i.shapes[0].dims
    return 2 * taps * out[out_labels.index("b")] * out[out_labels.index("f")] * inputs_per_group


class Window(NamedTuple):
    """A convolution's window along one spatial dimension, as XLA writes it."""

    size: int
    stride: int
    base: int  # dilation of the input
    dilation: int
    pad: int


@functools.cache
def _taps(inputs: int, outputs: int, window: Window) -> int:
    """Pairs (output, kernel position) that fall on an input element, along one spatial dimension."""
    size, stride, base, dilation, pad = window
    if size == 1 and pad == 0 and base == 1:
        return outputs
    count = 0
    for k in range(size):
        for o in range(outputs):
            at = o * stride + k * dilation - pad
            count += at >= 0 and at % base == 0 and at // base < inputs
    return count


def parse(text: str) -> Module:
    """The text of a compiled module (`compiled.as_text()`).

    Raises:
        ValueError: the text holds no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry = name = None
    lines: list[list[str]] = []
    for line in text.split("\n"):
        if name is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name, lines = head.group(2), []
                entry = name if head.group(1) else entry
        elif re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            lines.append([line])
        elif line == "}" and (not lines or _balanced(lines[-1])):
            computations[name] = tuple(_instruction(" ".join(parts)) for parts in lines)
            name = None
        elif lines:
            lines[-1].append(line)
    if entry is None:
        raise ValueError("the text is not a compiled HLO module: it has no ENTRY")
    return Module(entry, computations)


def _balanced(parts: list[str]) -> bool:
    return sum(p.count("{") - p.count("}") for p in parts) <= 0


_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")


def _instruction(text: str) -> Instruction:
    name, _, rest = text.strip().removeprefix("ROOT ").partition(" = ")
    cut = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape_text, rest = rest[:cut], rest[cut:].strip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    inside, text = rest[:end], rest[end + 1 :]
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(shape_text):
        space = re.search(r"S\((\d+)\)", layout)
        numbers = tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())
        shapes.append(Shape(dtype, numbers, int(space.group(1)) if space else 0))
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    literal = inside if opcode in ("constant", "parameter") else ""
    return Instruction(name.lstrip("%"), opcode, tuple(shapes), operands, text, literal)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unclosed parenthesis in {text[:80]!r}")
