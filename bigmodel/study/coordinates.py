"""The coordinate check of muP (Yang et al. 2022, appendix D.1): changes of activations over widths, by step.

Under muP what a few steps change is as large at any width; under the standard parametrization the logits
change more the wider the model is, so that the best learning rate falls with the width.

Legend: B batch, L length, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bigmodel.config import Config, override
from bigmodel.program import Program

Sizes = dict[str, np.ndarray]  # logits and scores: mean absolute change after each step


def of_width(config: Config, width: int) -> Config:
    """A Transformer's config at another width, with more heads of the same size."""
    model: Any = config.model
    heads, mlp_width = width // model.head_dim, model.mlp_width * width // model.width
    grown = {"width": width, "heads": heads, "kv_heads": heads * model.kv_heads // model.heads}
    return override(config, {f"model.{k}": v for k, v in {**grown, "mlp_width": mlp_width}.items()})


def changes(built: Program, batch: Mapping[str, Any], steps: int, seed: int = 0) -> Sizes:
    """Trains on one batch -> the mean absolute change of logits and of the last layer's scores, [steps]."""

    @jax.jit
    def activations(params: Any, rest: Any) -> dict[str, jax.Array]:
        taps: dict[str, Any] = {}
        outputs, _ = built.model.apply(params, rest, batch, key=None, train=False, taps=taps)
        last = taps["attention"][-1]
        q_BLHK, k_BSGK = last.q_BLHK, last.k_BSGK
        q_BLGRK = q_BLHK.reshape(*q_BLHK.shape[:2], k_BSGK.shape[2], -1, k_BSGK.shape[3])
        scores = jnp.einsum("blgrk,bsgk->bgrls", q_BLGRK, k_BSGK) * k_BSGK.shape[3] ** -0.5
        return {"logits": outputs["logits"], "scores": scores}

    state = built.init(jax.random.key(seed))
    first = activations(state["params"], state["rest"])
    found: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(steps):
        state, _ = built.train_step(state, built.put(batch))
        for name, x in activations(state["params"], state["rest"]).items():
            found[name].append(float(jnp.abs(x - first[name]).mean()))
    return {name: np.array(values) for name, values in found.items()}


def draw(found: Mapping[str, Mapping[int, Sizes]]) -> Figure:
    """Changes over widths, a line for each step. Args: found: parametrization -> width -> `changes`."""
    figure, axes = plt.subplots(2, len(found), figsize=(4.8 * len(found), 6.4), squeeze=False, sharey="row")
    for column, (title, by_width) in enumerate(found.items()):
        for row, name in enumerate(("logits", "scores")):
            ax, widths = axes[row][column], sorted(by_width)
            values = np.stack([by_width[width][name] for width in widths])
            for step in range(values.shape[1]):
                color = plt.get_cmap("viridis")(step / max(values.shape[1] - 1, 1) * 0.85)
                ax.plot(widths, values[:, step], "o-", color=color, label=f"step {step + 1}")
            ax.set(xscale="log", yscale="log", xlabel="width", title=f"{name}, {title}")
            ax.set_xticks(widths, map(str, widths))
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0][0].set_ylabel("mean |change|")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure
