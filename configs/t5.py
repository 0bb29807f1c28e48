"""T5 (Raffel et al. 2020): corrupted spans of plain text, or pairs of source and target.

    python scripts/train.py --config=configs/t5.py --workdir=runs/t5
    python scripts/train.py --config=configs/t5.py --config.data.name='pairs:FILE.tsv' --workdir=runs/pairs
    python scripts/plan.py --config=configs/t5.py:size=base,seq_len=512

`size` names a shape of the paper (section 3.7): small, base, large, 3b, 11b; each line of a pairs file is
source, tab, target, and `--config.task.target_len` the longest target. Several pairs share a row.
Claim: spans are predicted from the rest of the text. Planned: 24 GFLOP and 0.29 s a step of 32 inputs.
Measured after 1,000 steps: 43 % of the target tokens of held-out files right, 2.08 nats a token, 4.15 bits a
byte (sentinels count as losses, not as bytes; 0.73 of the bits are the spans' lengths, which the input does
not tell), in 10 min on two shared cores; still falling. After 400 steps: 4.43 bits, with AdamW at 2e-3
4.74, with Adafactor at 1e-2 4.73.
The corpus is the text of Python's standard library unless `--config.data.name` says otherwise.
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib
from bigmodel.config import InputError


def _t5(depth: int, width: int, heads: int, mlp_width: int, head_dim: int = 64) -> dict[str, object]:
    return {
        "depth": depth, "width": width, "heads": heads, "mlp_width": mlp_width, "head_dim": head_dim,
        "vocab_size": 32_128, "dropout": 0.1,
    }  # fmt: skip


SIZES: dict[str, dict[str, object]] = {
    "toy": {"depth": 3, "width": 128, "heads": 4, "mlp_width": 512},
    "small": _t5(6, 512, 8, 2048),
    "base": _t5(12, 768, 12, 3072),
    "large": _t5(24, 1024, 16, 4096),
    "3b": _t5(24, 1024, 32, 16_384, 128),
    "11b": _t5(24, 1024, 128, 65_536, 128),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `size` (a key of SIZES) and `seq_len`, of the inputs."""
    args = config_lib.parse_arg(arg, size="toy", seq_len=128)
    if args.size not in SIZES:
        raise InputError(f"--config argument size={args.size!r} is unknown; choose one of {', '.join(SIZES)}")
    large = args.size != "toy"
    config = ml_collections.ConfigDict()
    config.model = {"name": "t5", **SIZES[args.size]}
    config.task = {"name": "seq2seq"}
    config.data = {"name": "python_source"}
    config.seq_len = args.seq_len
    config.batch_size = 128 if large else 32
    config.steps = 524_288 if large else 1000
    config.compute_dtype = "bfloat16" if large else "float32"
    config.remat = "minimal" if large else "none"
    if large:
        config.optim = {"name": "adafactor", "lr": 1e-2, "schedule": "rsqrt", "warmup_steps": 10_000}
    else:
        config.optim = {"name": "muon", "lr": 3e-3, "end_lr": 0.05, "warmup_steps": 50, "weight_decay": 0.01}
    config.eval = {"every_steps": 1000 if large else 250, "batches": 50}
    config.checkpoint = {"every_steps": 1000 if large else 250}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (1e-3, 3e-3, 1e-2, 2e-2)]
