"""Judges each step's loss, and leaves data out where training diverged (`config.train`).

A step is bad if its loss or gradient is not finite, or if its loss is a spike: above the median of the last
`window` good losses by `spike` times their spread (1.4826 times the median absolute deviation, which is the
standard deviation of a normal distribution). `bad_steps` in a row are a divergence. The run then goes back to
a checkpoint from before the first of them and on with the data that come after the last of them.

All of it is a function of the losses, and a checkpoint's meta has its state. So a run that was killed judges,
rewinds and leaves out as one that was not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bigmodel.config.run import Train
from bigmodel.data.pipeline import Batches

LEAST_LOSSES = 20  # before spikes are looked for
NORMAL = 1.4826
ROUNDING = 1e-3  # of the median: a loss that hardly varies has no spread to speak of

Verdict = Literal["good", "skipped", "spike", "diverged"]


class Diverged(Exception):
    """The run has to go back: so many bad steps came in a row."""

    def __init__(self, step: int, values: Mapping[str, float]) -> None:
        super().__init__(step)
        self.step, self.values = step, values


class Without:
    """Batches without the windows that rewinds left out."""

    def __init__(self, batches: Batches, windows: Sequence[tuple[int, int]]) -> None:
        self._batches, self._windows = batches, windows

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Any:
        return self._batches[step + left_out(self._windows, step)]


def left_out(windows: Sequence[tuple[int, int]], step: int) -> int:
    """Returns how many batches are left out before the one that step `step` (from 0) trains on.

    Args:
        windows: (the step that a rewind went back to, how many batches it left out there).
    """
    return sum(count for at, count in windows if at <= step)


class Judge:
    """The judgments of one run.

    Args:
        meta: meta of the checkpoint that the run goes on from; {} at its start.
    """

    def __init__(self, keys: Train, meta: Mapping[str, Any]) -> None:
        self._keys = keys
        meta = meta.get("divergence", {})
        self.rewinds = int(meta.get("rewinds", 0))
        self.skipped = int(meta.get("skipped", 0))  # steps in all
        self.windows: list[tuple[int, int]] = [(at, count) for at, count in meta.get("windows", [])]
        self._losses: list[float] = list(meta.get("losses", []))
        self._bad: list[int] = list(meta.get("bad", []))  # the last steps, all of them bad

    @property
    def is_on(self) -> bool:
        return self._keys.on_divergence != "stop"

    def meta(self) -> dict[str, Any]:
        """The state, for a checkpoint's meta; {} where nothing is judged."""
        if not self.is_on:
            return {}
        state = {"rewinds": self.rewinds, "skipped": self.skipped, "losses": self._losses, "bad": self._bad}
        return {"divergence": state | {"windows": [list(window) for window in self.windows]}}

    def judge(self, step: int, loss: float, finite: bool) -> Verdict:
        """Judges step number `step` (from 1).

        Args:
            finite: its loss and gradient are, or float16's loss scale takes care of them.
        """
        spike = finite and self._keys.on_divergence == "rewind" and self._is_spike(loss)
        if finite and not spike:
            self._bad = []
            self._losses = [*self._losses, loss][-self._keys.window :]
            return "good"
        self.skipped += not finite
        self._bad.append(step)
        if len(self._bad) >= self._keys.bad_steps:
            return "diverged"
        return "spike" if spike else "skipped"

    def _is_spike(self, loss: float) -> bool:
        if not self._keys.spike or len(self._losses) < min(LEAST_LOSSES, self._keys.window):
            return False
        middle = statistics.median(self._losses)
        deviation = statistics.median(abs(x - middle) for x in self._losses)
        return loss - middle > self._keys.spike * max(NORMAL * deviation, ROUNDING * abs(middle))

    def target(self, saved: Sequence[int], every: int) -> int | None:
        """Returns the step to go back to: the newest checkpoint from `bad_steps` before the first bad step.

        Checkpoints that a signal or a best evaluation made are left out, so that a run that was stopped goes
        back as one that was not.

        Args:
            saved: steps of the checkpoints.
            every: `checkpoint.every_steps`.
        """
        before = [step for step in saved if step % every == 0 and step < self._bad[0]]
        old = [step for step in before if step <= self._bad[0] - self._keys.bad_steps]
        return max(old or before, default=None)

    def rewind(self, to: int, step: int, meta: Mapping[str, Any]) -> tuple[int, int]:
        """Goes back to the checkpoint of step `to`, after step `step` was found bad.

        Args:
            meta: that checkpoint's.

        Returns: the numbers, from 0, of the first and the last batch that are left out from now on.
        """
        last = step - 1 + left_out(self.windows, step - 1)
        rewinds, skipped = self.rewinds + 1, self.skipped
        self.__init__(self._keys, meta)  # type: ignore[misc]
        self.rewinds, self.skipped = rewinds, skipped
        first = to + left_out(self.windows, to)
        self.windows = [*self.windows, (to, last + 1 - first)]
        return first, last
