"""The device mesh: its axes, where every array of a run lies on it, and joining a multi-host job.

Axis type is `Auto`: models are written as if for one device, and XLA partitions them. Its partitioner
computes other functions, without a word, where it has to guess how weights over fsdp and tensor meet
activations (see `tests/test_partitioner.py`). So layouts are stated: `RULES` say where a weight is stored,
`gather` brings it together over fsdp where it is used, and `models.products.dense` pins the inputs, the
output and the gradients of every product.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigmodel.config import Config, InputError

# Outermost first: neighbors on the last axis are neighbors on the chip network, where tensor needs them.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")

# What a layer calls a dimension of an array -> the mesh axes that split it.
LOGICAL: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # examples; fsdp splits parameters and optimizer state too
    "group": ("data", "fsdp"),  # examples inside an expert layer, where `expert` splits the experts
    "sequence": (),
    "width": ("tensor",),  # of the residual stream
    "heads": ("tensor",),
    "hidden": ("tensor",),  # units between two products
    "vocabulary": ("tensor",),
    "experts": ("expert",),
    "rows": AXES,  # of large tables
}

Axes = tuple[str, ...]  # mesh axes that split one dimension; (): none does
Layout = tuple[Axes, ...]  # of a parameter's last dimensions
Dimension = str | Axes | None  # a name in LOGICAL, or mesh axes themselves; None: not split
Rules = tuple[tuple[str, str], ...]  # (regular expression, the axes of the last dimensions as text)

# Parameter path -> mesh axes of its last dimensions, as in `config.mesh.rules`; the first match wins, and the
# last rule covers all. Leading dimensions (a scanned stack's depth, a convolution's window) are never split.
RULES: Rules = (
    (r"/(out|down)/kernel/a$", "tensor, none"),  # adapters [inputs, rank], [rank, outputs]: as their weight
    (r"/(out|down)/kernel/b$", "none, fsdp"),
    (r"/kernel/a$", "fsdp, none"),
    (r"/kernel/b$", "none, tensor"),
    (r"/router/kernel$", "fsdp, none"),
    (r"/experts/(up|gate)/kernel$", "expert, fsdp, tensor"),  # [experts, width, hidden]
    (r"/experts/down/kernel$", "expert, tensor, fsdp"),
    (r"/experts/(up|gate)/bias$", "expert, tensor"),
    (r"/experts/down/bias$", "expert, none"),
    (r"/layers/\d+/(inputs|state)/kernel$", "fsdp, none, tensor"),  # recurrent [inputs, gates, width]
    (r"/layers/\d+/(inputs|state)/bias$", "none, tensor"),
    (r"/rows$", f"{'+'.join(LOGICAL['rows'])}, none"),  # large tables: rows over the full mesh
    (r"/table$", "tensor, fsdp"),  # embeddings [vocabulary, width]
    (r"/(q|k|v|up|gate)/bias$", "tensor"),
    (r"/(out|down)/kernel$", "tensor, fsdp"),  # row-parallel [hidden, width]
    (r"/kernel$", "fsdp, tensor"),  # column-parallel [width, hidden]; convolutions [.., in, out]
    (r"", "none"),  # norms, biases, scalars: on every device
)

_plain = contextvars.ContextVar("plain", default=False)


def join_cluster() -> None:
    """Calls `jax.distributed.initialize()` when this process is one of several; else does nothing.

    Several are meant by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (set by hand or by a
    launcher), by a SLURM or Open MPI job of more than one task, or by a TPU VM (JAX asks its metadata).
    """
    env = os.environ
    if jax.distributed.is_initialized():
        return
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise InputError(
                "JAX_COORDINATOR_ADDRESS is set; set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, to numbers"
            ) from error
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index)
    elif max(int(env.get(key, 1)) for key in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")) > 1 or _on_tpu_vm():
        jax.distributed.initialize()


def _on_tpu_vm() -> bool:
    wants_tpu = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    return wants_tpu and any(pathlib.Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of the job's), with -1 filled in.

    Raises:
        InputError: the axes do not multiply to the number of devices, or the batch, the microbatches or
            the model's heads do not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.mesh.sizes()
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free:
        sizes[free[0]] = len(devices) // known
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "mesh.data=1"
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"{text} needs {math.prod(sizes.values()) if not free else f'a multiple of {known}'} devices, "
            f"but {len(devices)} are here; set one axis to -1 or start with that many devices"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    mesh = Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    _check_division(config, mesh)
    return mesh


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the mesh's shape, neighbors on the chip network side by side; slices along `data`."""
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    data = AXES.index("data")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[data] % slices:
        raise InputError(
            f"mesh.data={shape[data]} is no multiple of the {slices} slices, which only the data axis may "
            f"cross; set it to {slices} or a multiple"
        )
    inside = tuple(n // slices if axis == data else n for axis, n in enumerate(shape))
    outside = tuple(slices if axis == data else 1 for axis in range(len(shape)))
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)


def _check_division(config: Config, mesh: Mesh) -> None:
    ways = batch_ways(mesh)
    pieces = max(config.microbatches, 1)
    if config.batch_size % (ways * pieces):
        raise InputError(
            f"batch_size={config.batch_size} is not a multiple of {ways * pieces} "
            f"(mesh.data x mesh.fsdp x mesh.expert = {ways}, microbatches = {pieces}); "
            f"the next that is: {-(-config.batch_size // (ways * pieces)) * ways * pieces}"
        )
    for axis, split in mesh.shape.items():
        sizes = config.model.divides.get(axis)
        if split > 1 and sizes is None:
            raise InputError(
                f"mesh.{axis} is {split}, but model.name={config.model.name} with these keys does not shard "
                "over it; set it to 1 and use another axis"
            )
        for key, size in (sizes or {}).items():
            if size % split:
                raise InputError(
                    f"model.{key} is {size}, which mesh.{axis}={split} does not divide; lower mesh.{axis} "
                    "to a divisor"
                )


def batch_ways(mesh: Mesh) -> int:
    """Number of pieces into which the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL["batch"])


def platform() -> str:
    """The platform that the code being traced will run on (`cpu`, `gpu`, `tpu`), or `plain` in `plain()`."""
    if _plain.get():
        return "plain"
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Code traced in this context takes no kernels and no fast paths: `platform` is `plain`, `shard` idle."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def shard(x: jax.Array, *dimensions: Dimension) -> jax.Array:
    """Pins `x`'s layout, one entry a dimension: `shard(x, "batch", "sequence", "heads", None)`.

    An entry whose axes do not divide its dimension is dropped. Without a mesh it does nothing.
    """
    if not is_split():
        return x
    if len(dimensions) != x.ndim:
        raise ValueError(f"shard: {len(dimensions)} entries for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, _fit(dimensions, x.shape, mesh))


def is_split() -> bool:
    """True where the code being traced is partitioned over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.size == 1 or _plain.get())


def ways(name: str) -> int:
    """Number of pieces into which the mesh of the code being traced splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in LOGICAL[name])


def spec(*dimensions: Dimension) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are these, for `jax.shard_map`."""
    return PartitionSpec(*map(_entry, dimensions))


def used_by_experts(layout: Layout) -> Layout:
    """The layout in which the weights [experts, inputs, outputs] of experts are multiplied; only the experts
    are split by the axis that splits the batch elsewhere."""
    return used(layout[:1], "group") + used(layout[1:])


def used(layout: Layout, batch: str = "batch") -> Layout:
    """The layout in which a weight stored over `layout` is multiplied: gathered over the axes that split the
    batch, a logical axis."""
    return tuple(tuple(axis for axis in axes if axis not in LOGICAL[batch]) for axes in layout)


def result(layout: Layout) -> Axes:
    """The mesh axes over which a product with a weight stored over `layout` leaves its result."""
    return tuple(axis for axes in used(layout) for axis in axes)


def is_gathered(layout: Layout) -> bool:
    """True where a weight stored over `layout` is gathered to be used; a large table's rows never are."""
    return any(set(axes) & set(LOGICAL["group"]) and axes != LOGICAL["rows"] for axes in layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(layout: Layout, w: jax.Array) -> jax.Array:
    """A weight whose last dimensions are stored over `layout`, gathered over the axes that split the batch.

    Its gradient is scattered back to where it is stored.
    """
    return shard(w, *padded(used(layout, "group"), w.ndim))


gather.defvjp(
    lambda layout, w: (gather(layout, w), None),
    lambda layout, _, g: (shard(g, *padded(layout, g.ndim)),),
)


def sharding(mesh: Mesh, shape: tuple[int, ...], *dimensions: Dimension) -> NamedSharding:
    """The sharding on `mesh` of an array that `shard` would pin so."""
    return NamedSharding(mesh, _fit(dimensions, shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over the axes of `batch`, every other dimension on each device in full."""
    return NamedSharding(mesh, spec("batch"))


def host_rows(mesh: Mesh, batch_size: int) -> dict[str, int]:
    """Which slice of a batch this host must read: `process_index` of `process_count` equal slices.

    Hosts that split only the model (tensor) read the same rows, so there may be fewer slices than hosts.

    Raises:
        InputError: the mesh's device order gives this host rows that are not one slice.
    """
    spans = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = sorted({(s[0].start or 0, batch_size if s[0].stop is None else s[0].stop) for s in spans if s})
    first, last = starts[0][0], starts[-1][1]
    if sum(stop - start for start, stop in starts) != last - first or first % (last - first):
        raise InputError(
            "mesh: a host's rows of the batch are not one slice; put the tensor axis inside a host"
        )
    return {"process_index": first // (last - first), "process_count": batch_size // (last - first)}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(mesh: Mesh, rules: Rules, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of the parameter `path` ("blocks/attention/q/kernel"), by the first rule that matches.

    An axis that does not divide its dimension is left out there: the array is then replicated over it.
    """
    return NamedSharding(mesh, _fit(padded(rule(rules, path), len(shape)), shape, mesh))


def rules_of(config: Config) -> Rules:
    """The config's own rules, then RULES."""
    return (*config.mesh.parsed_rules(), *RULES)


def check_rules(config: Config, paths: Collection[str]) -> None:
    """Raises InputError where a rule of `mesh.rules` matches none of the parameters' paths."""
    for pattern, _ in config.mesh.parsed_rules():
        if not any(re.search(pattern, "/" + path) for path in paths):
            some = ", ".join(f"/{path}" for path in list(paths)[:3])
            raise InputError(
                f"mesh.rules: no parameter matches {pattern!r}; match paths such as {some} "
                "(plan.py --show-sharding lists all)"
            )


def rule(rules: Rules, path: str) -> Layout:
    """The mesh axes of the parameter's last dimensions, by the first rule that matches."""
    return _layout(next(text for pattern, text in rules if re.search(pattern, "/" + path)))


@functools.cache
def _layout(text: str) -> Layout:
    """`data+fsdp, none` -> (("data", "fsdp"), ())."""
    entries = [entry.strip() for entry in text.split(",")]
    return tuple(() if entry == "none" else tuple(map(str.strip, entry.split("+"))) for entry in entries)


def padded(layout: Layout, ndim: int) -> Layout:
    """The layout of the last `ndim` dimensions; those that it does not name are not split."""
    return (((),) * (ndim - len(layout)) + layout)[-ndim:] if ndim else ()


def _fit(dimensions: Sequence[Dimension], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    def fits(entry: Any, size: int) -> Any:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return entry if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return PartitionSpec(*(fits(entry, size) for entry, size in zip(spec(*dimensions), shape, strict=True)))


def _entry(dimension: Dimension) -> str | Axes | None:
    """A dimension as `PartitionSpec` writes it: one axis's name, several, or None."""
    axes = LOGICAL[dimension] if isinstance(dimension, str) else dimension or ()
    return axes if len(axes) > 1 else axes[0] if axes else None
