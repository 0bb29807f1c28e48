"""A trained model at work: loading it from a workdir, and sampling text.

Each token takes a full forward pass over a window of `seq_len`.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import data, mesh, program, tasks, workdir
from bigmodel.checkpoint import Checkpoints
from bigmodel.config import Mesh
from bigmodel.program import Program, State


def load(directory: str | os.PathLike[str], step: int | None = None) -> tuple[Program, State]:
    """The run in `directory` and what inference needs of its state: params (or ema) and rest.

    Restores onto the devices at hand, whatever mesh trained it.

    Args:
        step: a checkpoint's step; None: the newest good one.

    Raises:
        InputError: no run or no checkpoint there.
    """
    path = pathlib.Path(directory)
    config = workdir.read_config(path).replace(mesh=Mesh())
    devices = jax.devices()[: np.gcd(len(jax.devices()), config.batch_size)]
    built = program.build(config, mesh.make_mesh(config, devices), data.batch_spec(config))
    part = "ema" if "ema" in built.state_spec else "params"
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        params, _, step = checkpoints.restore(built.state_spec[part], step, part=part)
        rest, _, _ = checkpoints.restore(built.state_spec["rest"], step, part="rest")
    return built, {part: params, "params": params, "rest": rest}


def sample(
    program: Program,
    state: State,
    prompt: np.ndarray,
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> np.ndarray:
    """Continues `prompt` (int ids, at least one) by `length` ids; int32 [length].

    Args:
        temperature: 0 is greedy.
        top_k: only the k likeliest ids are drawn from (Fan et al. 2018); 0: all.

    Past `seq_len` the window slides by halves, so every id sees at least half a window.
    """
    window = program.config.seq_len
    params = state.get("ema", state["params"])
    step = _next_id(program, temperature, top_k)
    ids = [int(i) for i in prompt]
    start = max(len(ids) - window // 2, 0) if len(ids) >= window else 0
    key = jax.random.key(seed)
    for index in range(length):
        if len(ids) - start >= window:
            start = len(ids) - window // 2
        tokens = np.zeros((1, window), np.int32)
        tokens[0, : len(ids) - start] = ids[start:]
        at = jnp.int32(len(ids) - start - 1)
        ids.append(int(step(params, state["rest"], tokens, at, jax.random.fold_in(key, index))))
    return np.asarray(ids[len(ids) - length :], np.int32)


def _next_id(program: Program, temperature: float, top_k: int) -> Any:
    """jitted (params, rest, tokens [1, L], position of the last id, key) -> id."""

    @jax.jit
    def step(params: Any, rest: Any, tokens: jax.Array, at: jax.Array, key: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        batch = {
            "tokens": tokens,
            "segments": jnp.ones_like(tokens),
            "positions": jnp.arange(length, dtype=jnp.int32)[None],
        }
        outputs, _ = program.model.apply(params, rest, batch, key=None, train=False)
        logits = tasks.logits(outputs)[0, at].astype(jnp.float32)
        if temperature == 0:
            return logits.argmax()
        if top_k:
            least = jax.lax.top_k(logits, min(top_k, logits.shape[0]))[0][-1]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature)

    return step
