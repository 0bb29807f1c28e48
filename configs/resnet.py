r"""ResNet v1.5 (He et al. 2015); by default a ResNet-18 of an eighth of the width, for 28 or 32 pixels.

    python scripts/train.py --config=configs/resnet.py --workdir=runs/resnet

Claim: at least 99.2 % test accuracy on mnist in under 10 minutes on 2 CPU cores. Planned: 0.18 M parameters,
5.5 GFLOP a step of 128. Measured: 2,000 steps, 99.50 %, in 6 min 11 s; a step takes 0.16 to 0.20 s, where the
plan says 0.13: such narrow matrix products are slower between others than alone.

ImageNet as in the paper (random resized crops and flips, cosine schedule):

    python scripts/train.py --config=configs/resnet.py:depth=50,width=64,stem=imagenet,classes=1000 \
        --config.data.name=imagenet2012 --config.data.image_size=224 --config.data.eval_crop=0.875 \
        --config.data.augment=resized_crop:0.08,flip --config.data.mean=0.485,0.456,0.406 \
        --config.data.std=0.229,0.224,0.225 --config.task.label_smoothing=0.1 --config.steps=450000 \
        --config.batch_size=256 --workdir=runs/resnet50
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `data`, `classes`, `depth`, `width` (of the first stage), `stem` (small or imagenet)."""
    args = config_lib.parse_arg(arg, data="mnist", classes=0, depth=18, width=8, stem="small")
    config = ml_collections.ConfigDict()
    channels = tuple(args.width * 2**stage for stage in range(4))
    config.model = {"name": "resnet", "depth": args.depth, "stem": args.stem, "channels": channels}
    config.model.num_classes = args.classes
    config.task = {"name": "classify"}
    config.data = {"name": args.data, "augment": "crop:2"}
    config.batch_size = 128
    config.steps = 2000
    config.optim = {"name": "adamw", "lr": 4e-3, "warmup_steps": 200, "weight_decay": 0.01}
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (1e-3, 4e-3, 1e-2)]
