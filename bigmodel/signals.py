"""Signals that end a run: SIGTERM finishes and saves the step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether SIGTERM came and, in a multi-host job, all hosts stop at this step.

    A second SIGTERM ends the process at once.
    """
    if jax.process_count() > 1:  # JAX's coordination service has the signal, and agrees on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()

    def handle(number: int, frame: Any) -> None:
        came.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: came.is_set()
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
