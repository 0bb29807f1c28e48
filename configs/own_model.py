r"""An image classifier of one's own: a class in a Python file, with its keys at their defaults.

    python scripts/train.py --config=configs/own_model.py --workdir=runs/mixer
    python scripts/train.py --config=configs/own_model.py:model=examples/mixer.py:Mixer,data=mnist \
        --config.model.width=128 --workdir=runs/wide

Claim: a family that the package does not know is planned, trained, resumed, evaluated and compressed by the
ordinary commands. `examples/mixer.py` is such a family, an MLP-Mixer.
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `model` (path/to/file.py:Class or package.module:Class) and `data` (a dataset's name)."""
    args = config_lib.parse_arg(arg, model="examples/mixer.py:Mixer", data="digits")
    config = ml_collections.ConfigDict()
    config.model = {"name": args.model}
    config.task = {"name": "classify"}
    config.data = {"name": args.data}
    config.batch_size = 128
    config.steps = 500
    config.optim = {"name": "adamw", "lr": 2e-3, "warmup_steps": 50, "weight_decay": 0.05}
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (1e-3, 2e-3, 4e-3)]
