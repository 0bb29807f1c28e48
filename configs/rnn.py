r"""A recurrent language model, LSTM or GRU; packed documents never see each other's state.

    python scripts/train.py --config=configs/rnn.py --workdir=runs/rnn

Planned: 2.6 M parameters; not yet measured.
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `cell` (lstm or gru), `depth`, `width`, `data`, `seq_len`."""
    args = config_lib.parse_arg(arg, cell="lstm", depth=2, width=384, data="python_source", seq_len=128)
    config = ml_collections.ConfigDict()
    config.model = {"name": "rnn", "cell": args.cell, "depth": args.depth, "width": args.width}
    config.task = {"name": "lm"}
    config.data = {"name": args.data}
    config.seq_len = args.seq_len
    config.batch_size = 32
    config.steps = 1000
    config.optim = {"name": "adamw", "lr": 4e-3, "warmup_steps": 50, "end_lr": 0.02, "weight_decay": 0.01}
    config.eval = {"every_steps": 500, "batches": 50}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Both cells at learning rates around the default."""
    return [{"model.cell": cell, "optim.lr": lr} for cell in ("lstm", "gru") for lr in (2e-3, 4e-3, 8e-3)]
