"""Large embedding tables, cut by rows over the whole mesh, and the inputs of models that read tables.

Legend: B batch, C categories an example, V rows, D width, N numbers an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel import mesh


class Rows(nnx.Module):
    """ids [B, C] -> rows [B, C, D] of a table [V, D] of which every device holds a part (model parallelism of
    Naumov et al. 2019, section 4, under data parallelism of all that follows)."""

    def __init__(self, v: int, d: int, *, std: float, dtype: str, rngs: nnx.Rngs):
        self.rows = nnx.Param(std * jax.random.normal(rngs.params(), (v, d), dtype))

    def __call__(self, ids_BC: jax.Array, dtype: str) -> jax.Array:
        return lookup(self.rows[...], ids_BC, dtype)


def lookup(table_VD: jax.Array, ids_BC: jax.Array, dtype: str) -> jax.Array:
    """table[ids] in `dtype`, each device reading its own rows for the whole batch.

    Left to itself XLA gathers the table. Here the ids, which are small, go to every device; it reads those it
    holds, and one reduce-scatter adds the zeros of the others and brings every example home.
    """
    axes = jax.sharding.get_abstract_mesh()
    if axes.empty or axes.size == 1 or table_VD.shape[0] % axes.size or mesh.platform() == "plain":
        return table_VD[ids_BC].astype(dtype)
    every, batch = mesh.LOGICAL["rows"], mesh.LOGICAL["batch"]
    others = tuple(axis for axis in every if axis not in batch)

    def local(part_VD: jax.Array, ids_BC: jax.Array) -> jax.Array:
        ids_BC = jax.lax.all_gather(ids_BC, batch, tiled=True)
        at_BC = ids_BC - jax.lax.axis_index(every) * part_VD.shape[0]
        is_here_BC = (at_BC >= 0) & (at_BC < part_VD.shape[0])
        rows_BCD = part_VD[jnp.clip(at_BC, 0, part_VD.shape[0] - 1)].astype(dtype)
        rows_BCD = jnp.where(is_here_BC[..., None], rows_BCD, jnp.zeros((), dtype))
        rows_BCD = jax.lax.psum_scatter(rows_BCD, batch, tiled=True)
        return jax.lax.psum(rows_BCD, others)

    specs = mesh.spec("rows", None), mesh.spec("batch", None)
    over_mesh = jax.shard_map(local, in_specs=specs, out_specs=mesh.spec("batch"), check_vma=False)
    return over_mesh(table_VD, ids_BC)


class TableInputs(nnx.Module):
    """batch `numeric` [B, N] and `categorical` [B, C], where there are any -> ([B, N], [B, C, D]) or None."""

    def __init__(self, rows: int, d: int, spec: Mapping[str, Any], *, dtype: str, rngs: nnx.Rngs):
        self.numbers = spec["numeric"].shape[1] if "numeric" in spec else 0
        self.categories = spec["categorical"].shape[1] if "categorical" in spec else 0
        self.embed = Rows(rows, d, std=d**-0.5, dtype=dtype, rngs=rngs) if self.categories else None

    def __call__(
        self, batch: Mapping[str, jax.Array], dtype: str
    ) -> tuple[jax.Array | None, jax.Array | None]:
        return (
            batch["numeric"].astype(dtype) if self.numbers else None,
            self.embed(batch["categorical"], dtype) if self.embed is not None else None,
        )
