r"""Recommenders: matrix factorisation, neural collaborative filtering, two towers, DLRM.

    python scripts/train.py --config=configs/recommender.py:kind=mf --workdir=runs/mf
    python scripts/evaluate.py --workdir=runs/mf

Claim: near the best that is possible on generated sets whose best is known (TO MEASURE).

Ratings of one's own: `--config.data.name=ratings:/path.csv` (user, item, rating, timestamp); errors name the
sizes that the tables need. `loss` is `rating` (squared error), `binary` (drawn negatives) or `softmax` (the
batch's items as negatives, logQ-corrected). `--config.task.eval_negatives=99` ranks as He et al. 2017 do, not
among all items.
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib
from bigmodel.config import InputError

KINDS: dict[str, dict[str, object]] = {
    "mf": {"width": 6},
    "ncf": {"width": 16, "widths": (64, 32, 16)},
    "two_tower": {"width": 32, "widths": (64, 32)},
    "dlrm": {"width": 16, "bottom": (64, 32), "widths": (64, 32), "rows": 4096},
}
LOSSES = {"mf": "rating", "ncf": "binary", "two_tower": "softmax", "dlrm": ""}
RATES = {"mf": 3e-2, "ncf": 3e-3, "two_tower": 1e-2, "dlrm": 3e-3}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `kind` (a key of KINDS), `data`, `users` and `items` (rows of their tables), `loss`."""
    args = config_lib.parse_arg(arg, kind="mf", data="", users=1024, items=512, loss="")
    if args.kind not in KINDS:
        raise InputError(f"--config argument kind={args.kind!r} is unknown; choose one of {', '.join(KINDS)}")
    dlrm = args.kind == "dlrm"
    config = ml_collections.ConfigDict()
    config.model = {"name": "recommender", "kind": args.kind, "users": args.users, "items": args["items"]}
    config.model.update(KINDS[args.kind])
    config.task = {"name": "classify"} if dlrm else {"name": "rank", "top_k": 10}
    if not dlrm:
        config.task.rank_loss = args.loss or LOSSES[args.kind]
    config.data = {"name": args.data or ("clicks" if dlrm else "lowrank_ratings")}
    config.batch_size = 512
    config.steps = 600 if dlrm else 2500
    config.optim = {"name": "adamw", "lr": RATES[args.kind], "b2": 0.999, "warmup_steps": 50}
    config.optim.update({"weight_decay": 0.1, "weight_decay_on": "/rows$"})  # the tables alone
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Weight decay of the tables around the default, which matters most where ratings are few."""
    return [{"optim.weight_decay": decay} for decay in (0.03, 0.1, 0.3)]
