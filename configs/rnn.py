r"""A recurrent language model, LSTM or GRU; packed documents never see each other's state.

    python scripts/train.py --config=configs/rnn.py --workdir=runs/rnn

Claim: the recurrent baseline that a Transformer should beat at equal cost. Planned: 0.66 M parameters,
15 GFLOP a step of 4,096 tokens. Measured on 2 shared CPU cores: 2.39 bits per byte on held-out files after
600 steps, 3 minutes of CPU time.

A text classifier, from a file with a column of texts and a column of labels:

    python scripts/train.py --config=configs/rnn.py --config.task.name=classify \
        --config.data.name=table:/path.csv --config.data.text=review --config.data.label=verdict \
        --workdir=runs/reviews
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `cell` (lstm or gru), `depth`, `width`, `data`, `seq_len`."""
    args = config_lib.parse_arg(arg, cell="lstm", depth=1, width=256, data="python_source", seq_len=128)
    config = ml_collections.ConfigDict()
    config.model = {"name": "rnn", "cell": args.cell, "depth": args.depth, "width": args.width}
    config.task = {"name": "lm"}
    config.data = {"name": args.data}
    config.seq_len = args.seq_len
    config.batch_size = 32
    config.steps = 600
    config.optim = {"name": "adamw", "lr": 4e-3, "warmup_steps": 50, "end_lr": 0.02, "weight_decay": 0.01}
    config.eval = {"every_steps": 300, "batches": 20}
    config.checkpoint = {"every_steps": 300}
    return config


def sweep() -> list[dict[str, object]]:
    """Both cells at learning rates around the default."""
    return [{"model.cell": cell, "optim.lr": lr} for cell in ("lstm", "gru") for lr in (2e-3, 4e-3, 8e-3)]
