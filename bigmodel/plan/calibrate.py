"""How fast this machine's CPU is: a microbenchmark of under 30 s, kept for the next plan.

It times, as XLA compiles them here: matrix products by shape, layout and dtype; elementwise work by kind of
operation; memory by size of the working set; transposed copies; what a thunk (a kernel's launch) costs; and
collectives between forced CPU devices. Nothing in it knows what a model looks like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# (batch, m, k, n): squares, the tall and skinny ones of dense layers, batches of small ones as attention has
SHAPES = (
    (1, 64, 64, 64), (1, 256, 64, 256), (1, 256, 256, 256), (1, 1024, 64, 1024), (1, 1024, 128, 128),
    (1, 128, 1024, 128), (1, 128, 1024, 512), (1, 1024, 128, 512), (1, 1024, 512, 128), (1, 1024, 384, 384),
    (1, 384, 1024, 384), (1, 384, 1024, 1536), (1, 1024, 384, 1536), (1, 1024, 1536, 384), (1, 512, 512, 512),
    (1, 64, 4096, 256), (1, 64, 256, 4096), (1, 4096, 64, 256), (1, 16384, 64, 64), (1, 64, 16384, 64),
    (1, 16384, 512, 128), (1, 512, 16384, 128), (1, 32768, 9, 64), (1, 9, 32768, 64), (1, 1024, 1024, 1024),
    (16, 64, 32, 64), (16, 64, 64, 32), (16, 64, 32, 256), (16, 64, 256, 32), (16, 256, 64, 32),
    (48, 64, 64, 64), (24, 64, 64, 256), (24, 64, 256, 64), (24, 256, 64, 64),
)  # fmt: skip
# and the narrow ones that a convolution of few channels becomes: forward, by its input, by its kernel
NARROW = (
    ("nn", (1, 131072, 72, 8)), ("nt", (1, 131072, 8, 8)), ("tn", (1, 72, 131072, 8)),
    ("nn", (1, 32768, 144, 16)), ("nt", (1, 32768, 16, 16)), ("tn", (1, 144, 32768, 16)),
    ("nn", (1, 8192, 480, 192)),
)  # fmt: skip
LAYOUTS = ("nn", "nt", "tn")  # which of the two factors is stored transposed
DTYPES = ("float32", "bfloat16")
STREAM_BYTES = tuple(2**p for p in (15, 17, 19, 21, 23, 25, 27))
PASSES = 4  # over everything that is timed; the shortest counts
VERSION = 3  # of what is measured: another one is measured afresh
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Product:
    """A measured matrix product [batch, m, k] x [batch, k, n]."""

    dtype: str
    layout: str
    batch: int
    m: int
    k: int
    n: int
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What was measured. `*_s` are seconds; an element's are one thread's, in cache."""

    key: str
    products: tuple[Product, ...]
    stream: tuple[tuple[float, float], ...]  # (bytes read and written, seconds), both cores
    stream_one: tuple[tuple[float, float], ...]  # likewise, one thread
    reduce: tuple[tuple[float, float], ...]  # (bytes read by a sum over rows, seconds)
    element_s: dict[str, float]  # kind of operation -> seconds for one float32
    transpose_s: float  # an element's strided move, beyond the stream
    thunk_s: float  # launching one kernel
    call_s: float  # launching one program
    collectives: dict[str, tuple[tuple[float, float], ...]]  # kind -> (bytes of the whole array, seconds)
    took_s: float = 0.0


def machine_key() -> str:
    """What a calibration depends on: CPU, cores, jax, devices, and whether malloc keeps its memory."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    devices = jax.local_device_count("cpu")
    machine = f"{model}, {cores()} cores, {devices} devices, malloc {_allocator()}"
    return f"{machine}, jax {jax.__version__}, benchmark {VERSION}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allocator() -> str:
    """`keeps` when freed pages stay with the process (scripts/cli.py), told by page faults."""
    import resource

    import numpy as np

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 24, np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    return "keeps" if faults() < 1024 else "returns"


def known(folder: pathlib.Path) -> Calibration | None:
    """The calibration of this machine that `load` left in `folder`, if any."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return from_json(_path(folder, machine_key()).read_text())
    return None


def _path(folder: pathlib.Path, key: str) -> pathlib.Path:
    return folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load(folder: pathlib.Path, fresh: bool = False) -> Calibration:
    """The calibration of this machine: from `folder`, or measured now (under 30 s) and written there."""
    there = None if fresh else known(folder)
    if there is not None:
        return there
    key = machine_key()
    path = _path(folder, key)
    found = measure(key)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs only time
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(dataclasses.asdict(found)))
        part.replace(path)
    return found


def from_json(text: str) -> Calibration:
    raw = json.loads(text)

    def pairs(rows: Any) -> tuple[tuple[float, float], ...]:
        return tuple((float(a), float(b)) for a, b in rows)

    raw["products"] = tuple(Product(**p) for p in raw["products"])
    for name in ("stream", "stream_one", "reduce"):
        raw[name] = pairs(raw[name])
    raw["collectives"] = {kind: pairs(rows) for kind, rows in raw["collectives"].items()}
    return Calibration(**raw)


# ------------------------------------------------------------------------------------------- the measuring


class _Stopwatch:
    """Times programs in several passes over all of them: what disturbs one pass spares the others."""

    def __init__(self) -> None:
        self._programs: list[tuple[Any, tuple[Any, ...]]] = []
        self._best: list[float] = []
        self._next = 0

    def new_pass(self) -> None:
        """From here on the same programs are timed again, in the same order."""
        self._next = 0

    def seconds(self, function: Callable[..., Any], *args: Any, least_s: float = 0.01) -> float:
        """The shortest run so far: other processes only ever add time."""
        if self._next == len(self._programs):
            program = jax.jit(function).lower(*args).compile()
            jax.block_until_ready(program(*args))
            self._programs.append((program, args))
            self._best.append(float("inf"))
        at, self._next = self._next, self._next + 1
        program, args = self._programs[at]
        jax.block_until_ready(program(*args))
        spent = repeats = 0.0
        while repeats < 4 or (spent < least_s and repeats < 200):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            took = time.perf_counter() - start
            spent, repeats, self._best[at] = spent + took, repeats + 1, min(self._best[at], took)
        return self._best[at]


def _kernel_s(
    clock: _Stopwatch, function: Callable[[jax.Array], jax.Array], x: jax.Array, many: int = 9
) -> float:
    """Seconds that one kernel takes within a program: the slope between many and a few, on arrays of their
    own, as equal or chained ones would become one kernel."""
    few = max(many // 3, 1)

    def each(xs: list[jax.Array]) -> list[jax.Array]:
        return [function(x) for x in xs]

    more, less = (clock.seconds(each, [x + i for i in range(n)]) for n in (many, few))
    return max((more - less) / (many - few), 1e-8)


def measure(key: str = "") -> Calibration:
    """Times everything, on the first CPU device (collectives: on all)."""
    began, clock = time.perf_counter(), _Stopwatch()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for _ in range(PASSES):
            clock.new_pass()
            found = _measure(clock, key)
    return dataclasses.replace(found, took_s=time.perf_counter() - began)


def _measure(clock: _Stopwatch, key: str) -> Calibration:
    call_s = clock.seconds(lambda x: x + 1, jnp.zeros(4))
    return Calibration(
        key=key,
        products=tuple(_products(clock, call_s)),
        stream=tuple((b, _stream(clock, b)) for b in STREAM_BYTES),
        stream_one=tuple((b, _stream(clock, b, parallel=False)) for b in STREAM_BYTES[:-1]),
        reduce=tuple((b, _reduce(clock, b) - call_s) for b in STREAM_BYTES[1::2]),
        element_s=_elements(clock),
        transpose_s=_transpose(clock),
        thunk_s=_kernel_s(clock, lambda x: x + 1, jnp.zeros(64), 60),
        call_s=call_s,
        collectives=_collectives(clock, call_s),
    )


def _products(clock: _Stopwatch, call_s: float) -> list[Product]:
    found = []
    wanted = [("float32", layout, shape) for shape in SHAPES for layout in LAYOUTS]
    wanted += [("float32", *narrow) for narrow in NARROW]
    wanted += [(dtype, LAYOUTS[0], shape) for dtype in DTYPES[1:] for shape in SHAPES[::4]]
    for dtype, layout, (batch, m, k, n) in wanted:
        a = jnp.ones((batch, k, m) if layout[0] == "t" else (batch, m, k), dtype)
        b = jnp.ones((batch, n, k) if layout[1] == "t" else (batch, k, n), dtype)
        if batch == 1:
            a, b = a[0], b[0]
        axes = (a.ndim - (2 if layout[0] == "t" else 1),), (b.ndim - (1 if layout[1] == "t" else 2),)
        batched = ((0,), (0,)) if batch > 1 else ((), ())
        seconds = clock.seconds(lambda a, b, d=(axes, batched): jax.lax.dot_general(a, b, d), a, b)
        found.append(Product(dtype, layout, batch, m, k, n, max(seconds - call_s, 1e-7)))
    return found


_ELEMENTWISE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "add": lambda x: x * 0.999 + 0.001,  # two operations
    "divide": lambda x: 1.5 / (x + 0.25),  # the addition keeps two from becoming none
    "sqrt": lambda x: jnp.sqrt(x),
    "exponential": lambda x: jnp.exp(-x),
    "log": lambda x: jnp.log(x + 1.5),
    "tanh": lambda x: jnp.tanh(x),
    "cosine": lambda x: jnp.cos(x),
    "power": lambda x: jnp.power(x, 1.7),
}


def _elements(clock: _Stopwatch, size: int = 32768, long: int = 24, short: int = 8) -> dict[str, float]:
    """Seconds of one thread for an element and operation, fused: the slope between chains of two lengths."""
    found = {}
    x = jnp.linspace(0.5, 1.5, size).reshape(1, size)  # one row cannot be cut between threads
    for name, step in _ELEMENTWISE.items():

        def chain(x: jax.Array, n: int, step: Callable[[jax.Array], jax.Array] = step) -> jax.Array:
            for _ in range(n):
                x = step(x)
            return x

        more, less = (clock.seconds(lambda x, c=chain, n=n: c(x, n), x) for n in (long, short))
        found[name] = max((more - less) / (long - short) / size, 1e-12) / (2 if name == "add" else 1)
    return found


def _stream(clock: _Stopwatch, size: int, parallel: bool = True) -> float:
    """x + 1 reads `size` / 2 bytes and writes as many; one row cannot be cut between threads."""
    x = jnp.zeros((16, size // 8 // 16) if parallel else (1, size // 8), jnp.float32)
    return _kernel_s(clock, lambda x: x + 1, x, 3 if size >= 2**25 else 9)


def _reduce(clock: _Stopwatch, size: int) -> float:
    return clock.seconds(lambda x: x.sum(-1), jnp.zeros((size // 4 // 256, 256), jnp.float32))


def _transpose(clock: _Stopwatch) -> float:
    """[B, L, H, K] -> [B, H, L, K]; seconds an element."""
    x = jnp.zeros((4, 64, 64, 64), jnp.float32)
    return _kernel_s(clock, lambda x: x.swapaxes(1, 2) + 1, x) / x.size


def _collectives(clock: _Stopwatch, call_s: float) -> dict[str, tuple[tuple[float, float], ...]]:
    devices = jax.local_devices(backend="cpu")
    if len(devices) == 1:
        return {}
    mesh = jax.sharding.Mesh(devices, ("d",))
    n, spec = len(devices), jax.sharding.PartitionSpec("d")
    whole = jax.sharding.PartitionSpec()
    ring = [(i, (i + 1) % n) for i in range(n)]
    kinds: dict[str, tuple[Callable[[jax.Array], jax.Array], Any, Any]] = {
        "all-reduce": (lambda x: jax.lax.psum(x, "d"), whole, whole),
        "all-gather": (lambda x: jax.lax.all_gather(x, "d", tiled=True), spec, whole),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "d", tiled=True), whole, spec),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True), whole, spec),
        "collective-permute": (lambda x: jax.lax.ppermute(x, "d", ring), whole, whole),
    }
    found = {}
    for kind in COLLECTIVES:
        function, before, after = kinds[kind]
        mapped = jax.shard_map(function, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)
        rows = []
        for size in (2**12, 2**18, 2**22, 2**24):
            x = jax.device_put(jnp.zeros(size // 4, jnp.float32), jax.sharding.NamedSharding(mesh, before))
            rows.append((float(size), max(clock.seconds(mapped, x) - call_s, 1e-7)))
        found[kind] = tuple(rows)
    return found
