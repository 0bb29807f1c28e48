"""BERT (Devlin et al. 2018): masked words, and next sentences with `next_sentence`.

    python scripts/train.py --config=configs/bert.py --workdir=runs/bert
    python scripts/plan.py --config=configs/bert.py:size=base,seq_len=512

`size` names a published shape: base and large (table 1), minilm-l6 (Wang et al. 2020; six layers of 384).
Claim: words are predicted from both sides. Planned: 0.86 M parameters, 23 GFLOP and 0.26 s a step of 4,096
tokens. Measured after 1,000 steps: 63.8 % of the masked bytes of held-out files right (1.91 bits a byte), in
9 min 26 s of CPU time (14 min on two cores that did other work too).
The corpus is the text of Python's standard library unless `--config.data.name` says otherwise.
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib
from bigmodel.config import InputError


def _bert(depth: int, width: int, heads: int) -> dict[str, object]:
    return {"depth": depth, "width": width, "heads": heads, "vocab_size": 30_522}


SIZES: dict[str, dict[str, object]] = {
    "toy": {"depth": 4, "width": 128, "heads": 4, "norm_order": "pre"},
    "minilm-l6": _bert(6, 384, 12),
    "base": _bert(12, 768, 12),
    "large": _bert(24, 1024, 16),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `size` (a key of SIZES), `seq_len` and `next_sentence`."""
    args = config_lib.parse_arg(arg, size="toy", seq_len=128, next_sentence=False)
    if args.size not in SIZES:
        raise InputError(f"--config argument size={args.size!r} is unknown; choose one of {', '.join(SIZES)}")
    large = args.size != "toy"
    config = ml_collections.ConfigDict()
    config.model = {"name": "bert", **SIZES[args.size], "pooler": args.next_sentence}
    config.task = {"name": "mlm", "next_sentence": args.next_sentence}
    config.data = {"name": "python_source"}
    config.seq_len = args.seq_len
    config.batch_size = 256 if large else 32
    config.steps = 1_000_000 if large else 1000
    config.compute_dtype = "bfloat16" if large else "float32"
    config.remat = "minimal" if large else "none"
    if large:
        config.optim = {"name": "adamw", "lr": 1e-4, "schedule": "linear", "warmup_steps": 10_000}
        config.optim.update({"weight_decay": 0.01, "b2": 0.999})
    else:
        config.optim = {"name": "muon", "lr": 2e-2, "end_lr": 0.05, "warmup_steps": 50, "weight_decay": 0.01}
    config.eval = {"every_steps": 1000 if large else 250, "batches": 50}
    config.checkpoint = {"every_steps": 1000 if large else 250}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (5e-3, 1e-2, 2e-2, 4e-2)]
