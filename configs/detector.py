r"""FCOS (Tian et al. 2019), an anchor-free single-shot detector, on a small ResNet; drawn shapes by default.

    python scripts/train.py --config=configs/detector.py --workdir=runs/detector
    python scripts/evaluate.py --workdir=runs/detector

Claim: mAP@0.5 of at least 0.9 on drawn shapes in 10 minutes on 2 CPU cores. Planned: 0.43 M parameters,
7.6 GFLOP and 0.22 s a step of 32. Measured on 2 shared cores (0.6 s a step), on the 500 test
images: mAP@0.5 0.987 after 500 steps (7 min), 0.992 and mAP 0.847 after 1,000 of the 2,000 (12 min).

`shapes` (64x64, 4,000 images of one to five circles, squares, triangles and stars) is drawn, not downloaded.
Any TFDS set with `objects` of `bbox` and `label` works, e.g. COCO with the paper's ResNet-50:

    python scripts/train.py --config=configs/detector.py:depth=50,width=64,classes=80 \
        --config.data.name=coco/2017 --config.data.eval_split=validation --config.data.image_size=512 \
        --config.model.levels=2,3,4 --config.model.width=256 --config.model.head_depth=4 \
        --config.batch_size=16 --config.steps=90000 --config.optim.lr=1e-4 --workdir=runs/fcos
"""

from __future__ import annotations

import ml_collections

from bigmodel import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: `data`, `classes`, `depth`, `width` (of the backbone's first stage), `stem`."""
    args = config_lib.parse_arg(arg, data="shapes", classes=0, depth=10, width=32, stem="imagenet")
    config = ml_collections.ConfigDict()
    channels = tuple(args.width * 2**stage for stage in range(4))
    config.model = {"name": "detector", "depth": args.depth, "stem": args.stem, "channels": channels}
    config.model.levels, config.model.width, config.model.head_depth = (1, 2, 3), 48, 1
    config.model.num_classes = args.classes
    config.task = {"name": "detect"}
    config.data = {"name": args.data, "augment": "flip"}
    config.data.max_boxes = 100 if args.data != "shapes" else 8
    config.batch_size = 32
    config.steps = 2000
    config.optim = {"name": "adamw", "lr": 3e-3, "warmup_steps": 100, "weight_decay": 0.01}
    config.eval = {"every_steps": 500}
    config.checkpoint = {"every_steps": 500}
    return config


def sweep() -> list[dict[str, object]]:
    """Learning rates around the default."""
    return [{"optim.lr": lr} for lr in (1e-3, 3e-3, 1e-2)]
