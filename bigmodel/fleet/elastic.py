"""A mesh for the devices that are there, where some of those that a run was planned for are missing."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from bigmodel import config as config_lib
from bigmodel import log, mesh, tasks, workdir
from bigmodel.checkpoint import fingerprint
from bigmodel.config import Config, InputError
from bigmodel.plan import candidates as candidates_lib
from bigmodel.plan import machine as machine_lib
from bigmodel.plan import target
from bigmodel.plan.candidates import OVER, Candidate

HEADROOM = 0.9  # of a device's memory: the closed form is no compiler


def refit(
    config: Config, directory: pathlib.Path | None = None, devices: Sequence[jax.Device] | None = None
) -> Config:
    """Returns the config, with another mesh where its own does not fit `devices` (default: all of the job's).

    The global batch and the order of the data stay. Of all legal meshes that are likely to fit in memory, one
    that needs no other microbatches or remat comes first, then the quickest by the planner's closed form.

    Args:
        directory: the workdir, for sizes that an earlier session took from the data.

    Raises:
        InputError: no mesh of these devices divides the batch and the model, or fits.
    """
    devices = tuple(jax.devices() if devices is None else devices)
    try:
        mesh.make_mesh(config, devices)
        return config
    except InputError as error:
        problem = error
    # Host 0 chooses: a machine that measures itself may rank the meshes otherwise than another.
    first = jax.process_index() == 0
    choice = _chosen(config, directory, devices) if first else {}
    if jax.process_count() > 1:
        choice = json.loads(fingerprint.gathered(json.dumps(choice))[0])
    if not choice:
        raise InputError(
            f"--elastic: no mesh of the {len(devices)} devices that are left divides the batch and the model "
            f"and fits ({problem}); choose a batch_size that more numbers divide, or wait for the others"
        )
    fitted = config_lib.override(config, choice)
    log.say(f"elastic   {len(devices)} devices: {candidates_lib.mesh_name(fitted)}")
    return fitted


def _chosen(config: Config, directory: pathlib.Path | None, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Returns keys of the config and their values; {} where no mesh is legal and likely to fit."""
    last = workdir.last_config(directory) if directory else None
    sized, aim = tasks.sized(config, directory, last=last), target.here(devices)
    capacity = machine_lib.of(aim).capacity_bytes
    found = [
        each
        for each in candidates_lib.candidates(sized, aim, OVER[:2])
        if capacity is None or each.likely_bytes <= HEADROOM * capacity
    ]
    if not found:
        return {}
    best = min(found, key=lambda each: (_changes(config, each), each.step_s)).config
    pieces = config.microbatches if best.microbatches == max(config.microbatches, 1) else best.microbatches
    sizes = {f"mesh.{axis}": size for axis, size in best.mesh.sizes().items()}
    return {**sizes, "microbatches": pieces, "remat": best.remat}


def _changes(config: Config, candidate: Candidate) -> int:
    """The number of settings besides the mesh that the candidate has otherwise."""
    other = candidate.config
    return (other.remat != config.remat) + (other.microbatches != max(config.microbatches, 1))
