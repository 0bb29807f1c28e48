"""Restores the parameters that evaluation sees, wherever a checkpoint has them.

One rule for evaluation, prediction, serving, export, compression and teachers: the moving average
(`optim.ema_decay`) of the parameters that are trained, the others as they are.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from bigmodel import optim
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config
from bigmodel.program import evaluated

Tree = Any


def restore(
    checkpoints: Checkpoints, config: Config, spec: Tree, step: int | None = None
) -> tuple[Tree, int]:
    """Restores what `Program.evaluated` returns, without the rest of the state -> (parameters, step).

    Args:
        config: of the run that saved it.
        spec: of its parameters, with the shardings that they are to arrive in.
        step: None: the newest good one.

    Raises:
        InputError: there is no checkpoint, or it does not fit `spec`. CorruptCheckpoint: it is damaged.
    """
    parts: dict[str, Tree] = {}
    trained, frozen = optim.split(config, spec) if config.optim.ema_decay else ({}, spec)
    if trained:
        average = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding), trained
        )
        parts["ema"], _, step = checkpoints.restore(average, step, part="ema")
    if frozen:
        parts["params"], _, step = checkpoints.restore(spec, step, part="params")
    return evaluated({"params": spec, **parts}), cast(int, step)
