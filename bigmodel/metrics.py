"""Metrics as sums that add exactly across batches, devices and hosts.

A metric is (sum, weight), two float32 scalars; its value is sum / weight. Under `jax.jit` over a mesh a sum
already spans all devices and hosts; over batches, `Sums` adds in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Sums:
    """Adds the metrics of many batches; `values` divides once, at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
        for name, pair in jax.device_get(dict(metrics)).items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)

    def values(self) -> dict[str, float]:
        """Raises ValueError for a metric that no example carried weight for: it has no value."""
        empty = [name for name, (_, weight) in self._sums.items() if weight == 0]
        if empty or not self._sums:
            raise ValueError(f"no example counted towards {', '.join(empty) or 'any metric'}")
        return {name: float(total / weight) for name, (total, weight) in self._sums.items()}
