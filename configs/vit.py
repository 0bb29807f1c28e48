r"""Vision Transformers (Dosovitskiy et al. 2020; Ti and S: Touvron et al. 2020; g: Zhai et al. 2021).

    python scripts/train.py --config=configs/vit.py:data=mnist --config.data.augment=crop:2 \
        --config.steps=2000 --workdir=runs/vit-mnist
    python scripts/plan.py --config=configs/vit.py:data=imagenet2012,size=b

Claim: at least 98 % test accuracy on mnist. Planned: 27 GFLOP a step of 128. Measured on 2 shared CPU
cores: 98.64 %, 24 minutes of CPU time.
Any TFDS image classification set with one image size works; `size=toy` takes patches of 4 pixels, the
published sizes 16 (h and g: 14) pixels.
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib
from bigmodel.config import InputError


def _vit(depth: int, width: int, heads: int, patch: int = 16, **others: object) -> dict[str, object]:
    return {"depth": depth, "width": width, "heads": heads, "patch": patch, **others}


SIZES: dict[str, dict[str, object]] = {
    "toy": _vit(6, 96, 4, 4, pool="mean"),
    "ti": _vit(12, 192, 3),
    "s": _vit(12, 384, 6),
    "b": _vit(12, 768, 12),
    "l": _vit(24, 1024, 16),
    "h": _vit(32, 1280, 16, 14),
    "g": _vit(40, 1408, 16, 14, mlp_width=6144),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `data` (a dataset's name), `classes` and `size` (a key of SIZES)."""
    args = config_lib.parse_arg(arg, data="digits", classes=0, size="toy")
    if args.size not in SIZES:
        raise InputError(f"--config argument size={args.size!r} is unknown; choose one of {', '.join(SIZES)}")
    large = args.size != "toy"
    config = ml_collections.ConfigDict()
    config.model = {"name": "vit", **SIZES[args.size], "num_classes": args.classes}
    config.task = {"name": "classify"}
    config.data = {"name": args.data}
    config.batch_size = 4096 if large else 128
    config.steps = 10_000 if large else (500 if args.data == "digits" else 3000)
    config.compute_dtype = "bfloat16" if large else "float32"
    config.remat = "minimal" if large else "none"
    config.optim = {"name": "adamw", "lr": 3e-3 if large else 1e-3, "b2": 0.999}
    config.optim.update({"warmup_steps": 1000 if large else 100, "weight_decay": 0.3 if large else 0.05})
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (3e-4, 1e-3, 3e-3)]
