"""GPT-2, Llama and Mixtral shapes by name, from a toy to 175b.

    python scripts/train.py --config=configs/gpt.py:size=toy --workdir=runs/toy

`size` names a published shape: GPT-2 (Radford et al. 2019, table 2), GPT-3 (Brown et al. 2020, table 2.1),
Llama (Touvron et al. 2023, table 2), Llama 2 70B (Touvron et al. 2023b), Llama 3 (Grattafiori et al. 2024,
table 3), Mixtral (Jiang et al. 2024, table 1; capacity_factor=4 loses no token). `moe-toy` is `toy` with four
experts, two a token; `--config.mesh.expert=4` puts each on devices of its own.
Measured on 2 CPU cores: `toy` at seq_len=128, 600 steps, 1.9 bits per byte on held-out files in 1 min 33 s.
The corpus is the text of Python's standard library unless `--config.data.name` says otherwise.

`configs/gpt.py:ladder` is a study for a scaling law: four budgets of FLOPs, four widths each, the learning
rate by muP from width 32.

    python scripts/sweep.py --config=configs/gpt.py:ladder --study=runs/ladder
    python scripts/laws.py fit runs/ladder --out=law.json
    python scripts/budget.py --config=configs/gpt.py:ladder --config.batch_size=4 --target=cpu \\
        --budget=3e13flop --law=law.json
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib
from bigmodel.config import InputError
from bigmodel.config.families import GPT


def _gpt(depth: int, width: int, heads: int, **others: object) -> dict[str, object]:
    return {"depth": depth, "width": width, "heads": heads, **others}


def _llama(depth: int, width: int, heads: int, mlp_width: int, **others: object) -> dict[str, object]:
    shape = {
        "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "tie_embeddings": False,
        "vocab_size": 32_000, "norm_eps": 1e-5,
    }  # fmt: skip
    return {**shape, "depth": depth, "width": width, "heads": heads, "mlp_width": mlp_width, **others}


_GPT2 = {"vocab_size": 50_257}
_LLAMA3 = {"vocab_size": 128_256, "kv_heads": 8, "rope_theta": 500_000.0}
_MIXTRAL = {"kv_heads": 8, "rope_theta": 1e6, "experts": 8, "balance_loss": 0.02, "router_z_loss": 0.0}

SIZES: dict[str, dict[str, object]] = {
    "toy": _gpt(4, 128, 4),
    "small": _gpt(6, 384, 6),
    "124m": _gpt(12, 768, 12, **_GPT2),
    "350m": _gpt(24, 1024, 16, **_GPT2),
    "774m": _gpt(36, 1280, 20, **_GPT2),
    "1.5b": _gpt(48, 1600, 25, **_GPT2),
    "2.7b": _gpt(32, 2560, 32, **_GPT2),
    "6.7b": _gpt(32, 4096, 32, **_GPT2),
    "13b": _gpt(40, 5120, 40, **_GPT2),
    "175b": _gpt(96, 12288, 96, **_GPT2),
    "llama-toy": _llama(4, 128, 4, 352, vocab_size=264, kv_heads=2),
    "llama-7b": _llama(32, 4096, 32, 11008),
    "llama-13b": _llama(40, 5120, 40, 13824),
    "llama-33b": _llama(60, 6656, 52, 17920),
    "llama-65b": _llama(80, 8192, 64, 22016),
    "llama-70b": _llama(80, 8192, 64, 28672, kv_heads=8),
    "1t": _llama(128, 25_600, 200, 68_096),  # nobody's: a trillion parameters to plan with
    "mixtral-8x7b": _llama(32, 4096, 32, 14336, **_MIXTRAL),
    "moe-toy": _gpt(4, 128, 4, experts=4),
    "llama3-8b": _llama(32, 4096, 32, 14336, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 64, 28672, **_LLAMA3),
    "llama3-405b": _llama(126, 16384, 128, 53248, **_LLAMA3),
}


NARROW, WIDE = (16, 32, 48, 64), (32, 48, 64, 96)
LADDER = {5e11: NARROW, 1.25e12: NARROW, 3e12: WIDE, 7.5e12: WIDE}  # FLOPs of a run -> its widths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `size` (a key of SIZES) and `seq_len`; or `ladder`."""
    args = config_lib.parse_arg(arg, size="toy", seq_len=256, ladder=False)
    if args.ladder:
        return _ladder()
    if args.size not in SIZES:
        raise InputError(f"--config argument size={args.size!r} is unknown; choose one of {', '.join(SIZES)}")
    large = args.size not in ("toy", "small", "llama-toy", "moe-toy")
    config = ml_collections.ConfigDict()
    config.model = {"name": "gpt", **SIZES[args.size]}
    config.task = {"name": "lm"}
    config.data = {"name": "python_source"}
    config.seq_len = args.seq_len
    config.batch_size = 256 if large else 16
    config.steps = 20_000 if large else 600
    config.compute_dtype = "bfloat16" if large else "float32"
    config.remat = "minimal" if large else "none"
    if large:
        config.optim = {"name": "adamw", "lr": 6e-4, "end_lr": 0.1, "warmup_steps": 700, "weight_decay": 0.1}
    else:
        config.optim = {"name": "muon", "lr": 2e-2, "end_lr": 0.05, "warmup_steps": 50, "weight_decay": 0.01}
    if large and args.size not in ("124m", "350m", "774m"):
        config.mesh = {"data": 1, "fsdp": -1}  # the state of these is cut over all devices
    config.eval = {"every_steps": 1000 if large else 200, "batches": 50}
    config.checkpoint = {"every_steps": 1000 if large else 200}
    return config


def _ladder() -> ml_collections.ConfigDict:
    """The base of all rungs, at the width whose learning rate is theirs.

    It lies between the best of 2.5e-3, 5e-3, 1e-2 and 2e-2 at this width (1e-2: 1.93 nats in 1,800 steps) and
    at three times it (5e-3: 2.31 in 720), one seed each.
    """
    config = ml_collections.ConfigDict()
    config.model = {"name": "gpt", **_gpt(4, 32, 2), "mup_base_width": 32, "vocab_size": 264}
    config.task = {"name": "lm"}
    config.data = {"name": "python_source"}
    config.seq_len, config.batch_size, config.steps = 128, 4, 2000
    config.optim = {"name": "adamw", "lr": 7e-3, "end_lr": 0.1, "warmup_steps": 200}
    config.eval = {"every_steps": 10**9, "batches": 400}
    config.checkpoint = {"every_steps": 10**9}
    config.log = {"every_steps": 100, "tensorboard": False}
    return config


def _rung(flops: float, width: int) -> dict[str, object]:
    """Settings of a run of the ladder: as many steps as the FLOPs pay for, the first tenth to warm up."""
    config = _ladder()
    keys = {**config.model, "width": width, "heads": width // 16}
    per_step = GPT(**keys).resolve().flops_per_token(config.seq_len) * config.seq_len * config.batch_size
    steps = round(flops / per_step)
    return {
        "model.width": width,
        "model.heads": width // 16,
        "steps": steps,
        "optim.warmup_steps": steps // 10,
    }


def sweep(arg: str | None = None) -> list[dict[str, object]]:
    """The runs of the ladder, the cheapest first; else learning rates around the default."""
    if config_lib.parse_arg(arg, size="toy", seq_len=256, ladder=False).ladder:
        return [_rung(flops, width) for flops, widths in LADDER.items() for width in widths]
    return [{"optim.lr": lr} for lr in (5e-3, 1e-2, 2e-2, 4e-2)]
