"""Weights & Biases: a run's metrics and pictures also go to a project (`log.wandb`).

Its faults are warnings: metrics.jsonl has everything. wandb.json in the workdir keeps the run's id, under
which a resumed run goes on. WANDB_MODE=offline writes to the workdir's `wandb/`, for `wandb sync` later.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigmodel import config as config_lib
from bigmodel import log, workdir
from bigmodel.config import Config, InputError

WAIT_S = 60  # for its service at the start, and for the last uploads at the end


def check(config: Config) -> None:
    """Raises InputError where `log.wandb` is set and the first host cannot import wandb."""
    if not config.log.wandb or jax.process_index() != 0:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"log.wandb={config.log.wandb}: wandb is not installed here ({error}); pip install wandb, or "
            "leave log.wandb out"
        ) from error


@contextlib.contextmanager
def tracking(config: Config, directory: pathlib.Path) -> Iterator[Wandb | None]:
    """Starts tracking where `log.wandb` is set, and ends it with the block."""
    tracker = Wandb(config, directory) if config.log.wandb else None
    try:
        yield tracker
    except BaseException:
        if tracker is not None:
            tracker.finish(1)
        raise
    if tracker is not None:
        tracker.finish(0)


class Wandb:
    """One run at Weights & Biases; silent after its first fault."""

    def __init__(self, config: Config, directory: pathlib.Path) -> None:
        """Raises InputError where wandb.json cannot be written."""
        entity, _, project = config.log.wandb.rpartition("/")
        path = directory / "wandb.json"
        run_id = workdir.read_json(path).get("id") or secrets.token_hex(4)
        workdir.write_json(path, {"id": run_id, "project": config.log.wandb})
        self._run: Any = None
        with self._shielded("start"):
            import wandb

            settings = wandb.Settings(
                console="off", silent=True, init_timeout=WAIT_S, login_timeout=WAIT_S, finish_timeout=WAIT_S
            )
            self._run = wandb.init(
                entity=entity or None, project=project, id=str(run_id), resume="allow", dir=str(directory),
                name=directory.resolve().name, config=config_lib.to_dict(config), settings=settings,
            )  # fmt: skip
            place = "offline" if self._run.offline else self._run.url
            log.say(f"wandb     {config.log.wandb}, run {run_id}, {place}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics; steps that an earlier session logged stay as they are."""
        self._log(step, dict(metrics))

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Logs a picture, uint8 [H, W, 3]."""
        if self._run is None:
            return
        with self._shielded("log"):
            import wandb

            self._log(step, {name: wandb.Image(image_HWC)})

    def finish(self, code: int) -> None:
        """Ends the run there: 0 for one that ended well."""
        if self._run is not None:
            with self._shielded("finish"):
                self._run.finish(exit_code=code)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        with self._shielded("log"):
            if step >= self._run.step:
                self._run.log(values, step=step)

    @contextlib.contextmanager
    def _shielded(self, doing: str) -> Iterator[None]:
        """Turns any error into a warning, after which nothing is tracked."""
        try:
            yield
        except Exception as error:  # of its service, the network, its files: never the run's
            self._run = None
            said = " ".join(f"{type(error).__name__}: {error}".split())
            logging.getLogger("bigmodel").warning(
                "log.wandb: %s failed (%.200s); the run goes on without it", doing, said
            )
