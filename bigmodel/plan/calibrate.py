"""Measures the speed of this machine's CPU: a microbenchmark of under 30 s, saved for the next plan.

It times, as XLA compiles them here: matrix products by shape, layout and dtype, on all cores and on one;
elementwise work by kind of operation; memory by size of the working set; transposed copies; what a thunk (a
kernel's launch) costs; collectives between forced CPU devices. Nothing in it knows what a model looks like.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import disk
from bigmodel.config import InputError

# (batch, m, k, n): squares, the tall and skinny ones of dense layers, batches of small ones as attention has;
# a layout's letters say which of the two factors is stored transposed
SHAPES = (
    (1, 64, 64, 64), (1, 256, 64, 256), (1, 256, 256, 256), (1, 1024, 64, 1024), (1, 1024, 128, 128),
    (1, 128, 1024, 128), (1, 128, 1024, 512), (1, 1024, 128, 512), (1, 1024, 512, 128), (1, 1024, 384, 384),
    (1, 384, 1024, 384), (1, 384, 1024, 1536), (1, 1024, 384, 1536), (1, 1024, 1536, 384), (1, 512, 512, 512),
    (1, 64, 4096, 256), (1, 64, 256, 4096), (1, 4096, 64, 256), (1, 16384, 64, 64), (1, 64, 16384, 64),
    (1, 8192, 512, 128), (1, 512, 8192, 128), (1, 32768, 9, 64), (1, 9, 32768, 64), (1, 1024, 1024, 1024),
    (32, 64, 16, 64), (32, 64, 64, 16), (16, 64, 32, 64), (16, 64, 64, 32), (16, 64, 32, 256),
    (16, 64, 256, 32), (16, 256, 64, 32), (48, 64, 64, 64), (24, 64, 64, 256), (24, 64, 256, 64),
    (24, 256, 64, 64),
)  # fmt: skip
# and the narrow ones that a convolution of few channels becomes: forward, by its input, by its kernel
NARROW = (
    ("nn", (1, 131072, 72, 8)), ("nt", (1, 131072, 8, 8)), ("tn", (1, 72, 131072, 8)),
    ("nn", (1, 32768, 144, 16)), ("nt", (1, 32768, 16, 16)), ("tn", (1, 144, 32768, 16)),
    ("nn", (1, 8192, 480, 192)),
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
STREAM_BYTES = tuple(2**p for p in (15, 17, 19, 21, 23, 25, 27))
PASSES = 4  # over everything that is timed; the shortest counts
VERSION = 4  # of what is measured: another one is measured afresh
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
    one_core_s: float


@dataclass(frozen=True)
class Calibration:
    """Measured speeds, one kernel at a time. `*_s` are seconds; per element: of one thread, in cache."""

    key: str
    products: tuple[Product, ...]
    stream: tuple[tuple[float, float], ...]  # (bytes read and written, seconds), all cores
    stream_one: tuple[tuple[float, float], ...]  # likewise, one core
    reduce: tuple[tuple[float, float], ...]  # (bytes read by a sum over rows, seconds), all cores
    reduce_one: tuple[tuple[float, float], ...]  # likewise, one core
    element_s: dict[str, float]  # kind of operation -> seconds for one float32
    transpose_s: float  # an element's strided move by one core
    thunk_s: float  # launching one kernel
    call_s: float  # launching one program
    collectives: dict[str, tuple[tuple[float, float], ...]]  # kind -> (bytes of the full array, seconds)
    took_s: float = 0.0


def machine_key() -> str:
    """Everything that a calibration depends on: CPU, cores, jax, devices, whether malloc keeps memory."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    devices = jax.local_device_count("cpu")
    machine = f"{model}, {cores()} cores, {devices} devices, malloc {_allocator()}"
    return f"{machine}, jax {jax.__version__}, benchmark {VERSION}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allocator() -> str:
    """`keeps` when freed pages stay with the process (scripts/cli.py), told by page faults."""
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 24, np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    return "keeps" if faults() < 1024 else "returns"


def known(folder: pathlib.Path) -> Calibration | None:
    """The calibration of this machine that `load` left in `folder`, if any."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return from_json(_path(folder, machine_key()).read_text(encoding="utf-8"))
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
    with contextlib.suppress(InputError):  # a cache that cannot be written costs only time
        disk.write_json(path, dataclasses.asdict(found))
    return found


def from_json(text: str) -> Calibration:
    raw = json.loads(text)

    def pairs(rows: Any) -> tuple[tuple[float, float], ...]:
        return tuple((float(a), float(b)) for a, b in rows)

    raw["products"] = tuple(Product(**p) for p in raw["products"])
    for name in ("stream", "stream_one", "reduce", "reduce_one"):
        raw[name] = pairs(raw[name])
    raw["collectives"] = {kind: pairs(rows) for kind, rows in raw["collectives"].items()}
    return Calibration(**raw)


# ------------------------------------------------------------------------------------------- the measuring


class _Stopwatch:
    """Times programs in several passes over all of them: what disturbs one pass spares the others. The first
    pass only collects them, and they are compiled side by side."""

    def __init__(self) -> None:
        self._lowered: list[tuple[jax.stages.Lowered, tuple[Any, ...]]] = []
        self._programs: list[tuple[jax.stages.Compiled, tuple[Any, ...]]] = []
        self._best: list[list[float]] = []  # of each program on all cores, on one
        self._next = 0

    def new_pass(self) -> None:
        """From here on the same programs are timed again, in the same order."""
        self._next = 0
        if not self._programs:
            with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
                made = pool.map(lambda pair: (pair[0].compile(), pair[1]), self._lowered)
                self._programs = list(made)

    def seconds(self, function: Callable[..., Any], *args: Any) -> float:
        """The shortest run so far: other processes only ever add time."""
        return self._time(function, args, (contextlib.nullcontext,))[0]

    def both(self, function: Callable[..., Any], *args: Any) -> tuple[float, float]:
        """-> seconds on all cores, on one."""
        all_s, one_s = self._time(function, args, (contextlib.nullcontext, _one_core))
        return all_s, max(one_s, all_s) if hasattr(os, "sched_setaffinity") else all_s * cores()

    def _time(self, function: Callable[..., Any], args: tuple[Any, ...], where: Any) -> list[float]:
        if not self._programs:
            self._lowered.append((jax.jit(function).lower(*args), args))
            self._best.append([float("inf")] * len(where))
            return self._best[-1]
        at, self._next = self._next, self._next + 1
        best = self._best[at]
        for index, placed in enumerate(where):
            with placed():
                best[index] = min(best[index], _shortest(*self._programs[at], least_s=0.006 / (index + 1)))
        return best


def _shortest(program: Any, args: tuple[Any, ...], least_s: float) -> float:
    """The shortest of runs that take `least_s` in all, three at least; a first run does not count."""
    jax.block_until_ready(program(*args))
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 3 or (spent < least_s and repeats < 200):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        took = time.perf_counter() - start
        best, spent, repeats = min(best, took), spent + took, repeats + 1
    return best


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Every thread of this process on one core, where the system can do that (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    _keep_to({min(allowed)})
    try:
        yield
    finally:
        _keep_to(allowed)


def _keep_to(allowed: set[int]) -> None:
    for thread in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread.name), allowed)


def _kernel_s(
    clock: _Stopwatch, function: Callable[[jax.Array], jax.Array], x: jax.Array, many: int = 7
) -> tuple[float, float]:
    """Seconds that one kernel takes within a program, on all cores and on one: the slope between many and a
    few, on arrays of their own, as equal or chained ones would become one kernel. XLA runs up to eight one
    after another."""
    few = max(many // 3, 1)

    def each(xs: list[jax.Array]) -> list[jax.Array]:
        return [function(x) for x in xs]

    of_many, of_few = (clock.both(each, [x + i for i in range(n)]) for n in (many, few))
    all_s, one_s = (max((m - f) / (many - few), 1e-8) for m, f in zip(of_many, of_few, strict=True))
    return all_s, max(one_s, all_s)


def measure(key: str = "") -> Calibration:
    """Times everything, on the first CPU device (collectives: on all)."""
    began, clock = time.perf_counter(), _Stopwatch()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _measure(clock, key)
        for _ in range(PASSES):
            clock.new_pass()
            found = _measure(clock, key)
    return dataclasses.replace(found, took_s=time.perf_counter() - began)


def _measure(clock: _Stopwatch, key: str) -> Calibration:
    call_s = clock.seconds(lambda x: x + 1, jnp.zeros(4))
    reduced = [(b, _reduce(clock, b, call_s)) for b in STREAM_BYTES[1::2]]
    streamed = [(b, _stream(clock, b)) for b in STREAM_BYTES]
    return Calibration(
        key=key,
        products=tuple(_products(clock, call_s)),
        stream=tuple((b, all_s) for b, (all_s, _) in streamed),
        stream_one=tuple((b, one_s) for b, (_, one_s) in streamed),
        reduce=tuple((b, all_s) for b, (all_s, _) in reduced),
        reduce_one=tuple((b, one_s) for b, (_, one_s) in reduced),
        element_s=_elements(clock),
        transpose_s=_transpose(clock),
        thunk_s=_kernel_s(clock, lambda x: x + 1, jnp.zeros(64), 60)[0],
        call_s=call_s,
        collectives=_collectives(clock, call_s),
    )


def _products(clock: _Stopwatch, call_s: float) -> list[Product]:
    found = []
    wanted = [("float32", layout, shape) for layout in ("nn", "nt", "tn") for shape in SHAPES]
    wanted += [("float32", *narrow) for narrow in NARROW]
    wanted += [(dtype, "nn", shape) for dtype in DTYPES[1:] for shape in SHAPES[::6]]
    for dtype, layout, (batch, m, k, n) in wanted:
        a = jnp.asarray(np.ones((batch, k, m) if layout[0] == "t" else (batch, m, k), dtype))
        b = jnp.asarray(np.ones((batch, n, k) if layout[1] == "t" else (batch, k, n), dtype))
        if batch == 1:
            a, b = a[0], b[0]
        axes = (a.ndim - (2 if layout[0] == "t" else 1),), (b.ndim - (1 if layout[1] == "t" else 2),)
        batched = ((0,), (0,)) if batch > 1 else ((), ())
        both = clock.both(lambda a, b, d=(axes, batched): jax.lax.dot_general(a, b, d), a, b)
        found.append(Product(dtype, layout, batch, m, k, n, *(max(s - call_s, 1e-7) for s in both)))
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

        long_s, short_s = (clock.seconds(lambda x, c=chain, n=n: c(x, n), x) for n in (long, short))
        found[name] = max((long_s - short_s) / (long - short) / size, 1e-12) / (2 if name == "add" else 1)
    return found


def _stream(clock: _Stopwatch, size: int) -> tuple[float, float]:
    """x + 1 reads `size` / 2 bytes and writes as many; -> seconds on all cores, on one."""
    x = jnp.zeros((16, size // 8 // 16), jnp.float32)
    return _kernel_s(clock, lambda x: x + 1, x, 3 if size >= 2**25 else 7)


def _reduce(clock: _Stopwatch, size: int, call_s: float) -> tuple[float, float]:
    """-> seconds on all cores, on one."""
    both = clock.both(lambda x: x.sum(-1), jnp.zeros((size // 4 // 256, 256), jnp.float32))
    return both[0] - call_s, both[1] - call_s


def _transpose(clock: _Stopwatch) -> float:
    """[B, L, H, K] -> [B, H, L, K]; seconds an element, on one core."""
    x = jnp.zeros((4, 64, 64, 64), jnp.float32)
    return _kernel_s(clock, lambda x: x.swapaxes(1, 2) + 1, x)[1] / x.size


def _collectives(clock: _Stopwatch, call_s: float) -> dict[str, tuple[tuple[float, float], ...]]:
    devices = jax.local_devices(backend="cpu")
    if len(devices) == 1:
        return {}
    mesh = jax.sharding.Mesh(devices, ("d",))
    n, spec = len(devices), jax.sharding.PartitionSpec("d")
    full = jax.sharding.PartitionSpec()
    ring = [(i, (i + 1) % n) for i in range(n)]
    kinds: dict[str, tuple[Callable[[jax.Array], jax.Array], Any, Any]] = {
        "all-reduce": (lambda x: jax.lax.psum(x, "d"), full, full),
        "all-gather": (lambda x: jax.lax.all_gather(x, "d", tiled=True), spec, full),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "d", tiled=True), full, spec),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True), full, spec),
        "collective-permute": (lambda x: jax.lax.ppermute(x, "d", ring), full, full),
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


def matmul_flops(dtype: str, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s that the default device reaches on `size`^3 matrix products; the best of repeats, not a peak."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    product(a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
