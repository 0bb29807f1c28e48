r"""AlexNet, one tower (Krizhevsky 2014), with the small stem for images of 28 or 32 pixels.

    python scripts/train.py --config=configs/alexnet.py --workdir=runs/alexnet

Claim: dropout and ReLU train eight layers without any normalization. Planned for `digits` of 8 x 8 pixels:
2.9 M parameters, 10.7 GFLOP and 0.078 s a step of 128. Measured on 2 CPU cores: 98.65 % of the test digits,
300 steps in 40 s; a step takes 0.081 s.

ImageNet as in the paper, 61.1 M parameters:

    python scripts/train.py --config=configs/alexnet.py:stem=imagenet,classes=1000 \
        --config.data.name=imagenet2012 \
        --config.data.image_size=224 --config.data.augment=resized_crop:0.08,flip --workdir=runs/alexnet
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `data`, `classes`, `stem` (small or imagenet), `width` of the dense layers."""
    args = config_lib.parse_arg(arg, data="digits", classes=0, stem="small", width=512)
    config = ml_collections.ConfigDict()
    config.model = {"name": "alexnet", "stem": args.stem, "width": args.width, "num_classes": args.classes}
    config.task = {"name": "classify"}
    config.data = {"name": args.data}
    config.batch_size = 128
    few = args.data == "digits"
    config.steps = 300 if few else 1500
    config.optim = {
        "name": "sgd",
        "lr": 0.02,
        "warmup_steps": 50 if few else 200,
        "weight_decay": 5e-4,
        "weight_decay_on": "/kernel$",
    }
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (0.005, 0.02, 0.05)]
