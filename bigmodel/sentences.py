"""Sentence embeddings of an encoder.

Legend: B texts, L length, N texts in all, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.config import InputError
from bigmodel.data.text import Tokenizer, special_id
from bigmodel.families import BERT
from bigmodel.program import Program, State, averaged


def embed(built: Program, state: State, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings float32 [N, D]: the mean over a text's hidden states, at length 1 (Reimers and
    Gurevych 2019). A text is cut at `seq_len`. Raises InputError for a model that is no encoder (bert)."""
    config, model = built.config, built.config.model
    if not isinstance(model, BERT):
        raise InputError(f"model.name={model.name} makes no embeddings; use a run of bert")
    first = special_id(tokenizer, model.vocab_size, "cls")
    rows = [[first, *tokenizer.encode(t)[: config.seq_len - 2].tolist(), tokenizer.separator] for t in texts]

    def run(params: Any, rest: Any, tokens_BL: jax.Array, length_B: jax.Array) -> jax.Array:
        at_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)
        real_BL = (at_BL < length_B[:, None]).astype(jnp.int32)
        batch = {"tokens": tokens_BL, "segments": real_BL, "positions": at_BL}
        batch["masked_positions"] = jnp.zeros((tokens_BL.shape[0], 1), jnp.int32)
        with jax.sharding.use_abstract_mesh(built.mesh.abstract_mesh):
            outputs, _ = built.model.apply(params, rest, batch, key=None, train=False)
        sum_BD = (outputs["hidden"].astype(jnp.float32) * real_BL[..., None].astype(jnp.float32)).sum(1)
        mean_BD = sum_BD / length_B[:, None].astype(jnp.float32)
        return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)

    step, out, size = jax.jit(run), [], config.batch_size
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = min(-(-max(map(len, part)) // 32) * 32, config.seq_len)  # few shapes, so few compilations
        tokens_BL, length_B = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for row, ids in enumerate(part):
            tokens_BL[row, : len(ids)], length_B[row] = ids, len(ids)
        out.append(np.asarray(step(averaged(state), state["rest"], tokens_BL, length_B))[: len(part)])
    return np.concatenate(out)
