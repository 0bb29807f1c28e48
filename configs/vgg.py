r"""VGG 11, 13, 16 or 19 (Simonyan and Zisserman 2014); images below 32 pixels are enlarged to 32.

    python scripts/train.py --config=configs/vgg.py --workdir=runs/vgg

Claim: depth from 3x3 convolutions alone; with BatchNorm here. Planned for depth 11 at 32 x 32 pixels: 9.8 M
parameters, 117 GFLOP and 0.81 s a step of 128. Measured on 2 CPU cores: 99.66 % of the test `digits`, 300
steps in 4 min 43 s; a step takes 0.87 s.

ImageNet as in the paper, 138 M parameters at depth 16:

    python scripts/train.py --config=configs/vgg.py:depth=16,width=4096,data=imagenet2012,classes=1000 \
        --config.data.image_size=224 --config.data.augment=resized_crop:0.08,flip --workdir=runs/vgg
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `data`, `classes`, `depth`, `width` of the dense layers, `batch_norm`."""
    args = config_lib.parse_arg(arg, data="digits", classes=0, depth=11, width=512, batch_norm=True)
    config = ml_collections.ConfigDict()
    config.model = {"name": "vgg", "depth": args.depth, "width": args.width, "num_classes": args.classes}
    config.model.batch_norm = args.batch_norm
    config.task = {"name": "classify"}
    config.data = {"name": args.data, "image_size": 32}
    config.batch_size = 128
    few = args.data == "digits"
    config.steps = 300 if few else 1500
    config.optim = {
        "name": "sgd",
        "lr": 0.05,
        "warmup_steps": 50 if few else 200,
        "weight_decay": 5e-4,
        "weight_decay_on": "/kernel$",
    }
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (0.02, 0.05, 0.1)]
