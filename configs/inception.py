r"""GoogLeNet (Szegedy et al. 2014) and Inception v3 (Szegedy et al. 2015), small stem for 28 or 32 pixels.

    python scripts/train.py --config=configs/inception.py --workdir=runs/inception

Claim: branches of several sizes side by side are cheap in parameters. Planned for `digits` of 8 x 8 pixels:
5.6 M parameters, 70 GFLOP and 0.65 s a step of 128. Measured on 2 CPU cores: 98.65 % of the test digits, 300
steps in 6 min 55 s; a step takes 1.15 s. (At 28 x 28 pixels: v1 853 GFLOP, v3 1,212: for an accelerator.)

ImageNet as in the papers (v1 at 224 pixels, v3 at 299), with auxiliary classifiers while training:

    python scripts/train.py --config=configs/inception.py:version=v3,stem=imagenet,classes=1000 \
        --config.data.name=imagenet2012 \
        --config.model.aux=true --config.data.image_size=299 --config.data.augment=resized_crop:0.08,flip \
        --config.task.label_smoothing=0.1 --workdir=runs/inception
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `data`, `classes`, `version` (v1 or v3), `stem` (small or imagenet)."""
    args = config_lib.parse_arg(arg, data="digits", classes=0, version="v1", stem="small")
    config = ml_collections.ConfigDict()
    config.model = {"name": "inception", "version": args.version, "stem": args.stem}
    config.model.num_classes = args.classes
    config.task = {"name": "classify"}
    config.data = {"name": args.data}
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
