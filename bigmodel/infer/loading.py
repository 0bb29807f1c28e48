"""Restores a run for inference, and checks it on its mesh."""

from __future__ import annotations

import functools
import os

import jax
import numpy as np

from bigmodel import log, mesh, program, selfcheck, tasks, workdir
from bigmodel.checkpoint import fingerprint, parameters
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Mesh
from bigmodel.infer import decode
from bigmodel.infer.decoder import Decoder
from bigmodel.infer.sampling import GREEDY
from bigmodel.program import Program, State


def load(
    directory: str | os.PathLike[str], step: int | None = None, axes: Mesh | None = None
) -> tuple[Program, State]:
    """Loads the run in `directory` -> (Program, a state of evaluated parameters, rest and step).

    Restores onto the devices at hand, whatever mesh trained it.

    Args:
        step: a checkpoint's step; None: the newest good one.
        axes: of the mesh, over all devices; None: as many devices as divide the batch, over `data`.

    Raises:
        InputError: no run or no checkpoint there.
        WrongProgram: on this mesh the model gives rows other outputs in another order (`selfcheck`).
    """
    path = workdir.local(directory)
    config = workdir.read_config(path).replace(mesh=axes or Mesh())
    devices = jax.devices()
    if axes is None:
        devices = devices[: np.gcd(len(devices), config.batch_size)]
    built = program.build(config, mesh.make_mesh(config, devices), tasks.batch_spec(config, path))
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.newest_meta() if step is None else checkpoints.meta(step)
        if "config" in meta:
            free = fingerprint.OF_TRAINING
            fingerprint.refuse_other_config(meta["config"], built.config, path / "config.json", free)
        for sentence in fingerprint.changed_files(meta, config):
            log.say(f"config    {sentence}")
        params, step = parameters.restore(checkpoints, config, built.state_spec["params"], step)
        rest, _, _ = checkpoints.restore(built.state_spec["rest"], step, part="rest")
    state = {"params": params, "rest": rest, "step": np.int32(step)}
    selfcheck.check_outputs(built, state)
    return built, state


def check_decoding(decoder: Decoder) -> None:
    """On a mesh of two or more axes, compares the logits of made-up prompts, and of what follows them, with
    those of the same prompts in another order. Raises WrongProgram where they differ."""
    built, lm = decoder.program, decoder.lm
    if not selfcheck.is_due(built.config, built.mesh):
        return
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, lm.vocabulary, (2 * mesh.batch_ways(built.mesh), 8))
    order = rng.permutation(len(prompts))
    prefill, follow = (decoder.jit(functools.partial(f, lm)) for f in (decode.prefill, decode.decode))

    def logits(prompts: np.ndarray) -> np.ndarray:
        state, *padded = decoder.unread(prompts.tolist(), [2] * len(prompts), [GREEDY] * len(prompts))
        first, state = jax.block_until_ready(prefill(decoder.params, decoder.rest, state, *padded))
        second, _ = follow(decoder.params, decoder.rest, {**state, "token": prompts[:, 0].astype(np.int32)})
        return np.stack([np.asarray(first, np.float32), np.asarray(second, np.float32)], 1)

    straight, mixed = logits(prompts)[order], logits(prompts[order])
    off = float(np.abs(straight - mixed).max() / max(np.abs(straight).max(), 1e-30))
    selfcheck.refuse_wrong(selfcheck.Check(None, None, off), built.config)
