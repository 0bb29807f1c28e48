"""What a run really spent: seconds by bucket, steps, FLOPs. `goodput` is the share of training steps."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any


class Ledger:
    """Buckets: start, compile, restore, step, input, eval, checkpoint. The rest of the time is `other`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0

    @contextlib.contextmanager
    def timing(self, bucket: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[bucket] += time.perf_counter() - began

    def report(self, flops_per_step: float) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        total = time.perf_counter() - self._began
        buckets = dict(self.seconds) | {"other": total - sum(self.seconds.values())}
        return {
            "total_s": total,
            "seconds": {name: round(s, 4) for name, s in buckets.items()},
            "goodput": self.seconds["step"] / total,
            "steps": self.steps,
            "model_flops": flops_per_step * self.steps,
            "step_s": self.seconds["step"] / self.steps if self.steps else None,
        }
