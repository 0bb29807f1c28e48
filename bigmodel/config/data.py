"""The keys of `config.data`: what to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Data:
    """The data. `name`: a TFDS or bundled dataset, or files such as `text:GLOB`, see data/sources.py."""

    name: str = "python_source"
    split: str = "train"
    eval_split: str = "test"
    data_dir: str | None = None  # None: TFDS's own default (~/tensorflow_datasets or $TFDS_DATA_DIR)
    # bytes | bpe:VOCAB_SIZE (trained on the training split) | hf:DIR; the workdir keeps it
    tokenizer: str = "bytes"
    columns: tuple[str, ...] = ()  # files: NAME:COLUMN where they have other names, as user:userId
    # blocks: of each file of text:, spread over it, go to test; auto: the end of one file, some of several
    split_by: Literal["auto", "blocks"] = "auto"
    test_fraction: float = 0.1  # files without splits of their own: so much of them is test
    shuffle: bool = True
    cache: bool = True  # keep decoded images in memory, and token files on disk, after the first read
    prefetch: int = 2  # batches made ready ahead of the step
    label: str = "label"  # of one output an example: the feature that is learned
    text: str = "text"  # the feature that holds the text
    categorical: tuple[str, ...] = ()  # tables: columns that are categories though they hold numbers
    ignore: tuple[str, ...] = ()  # tables: columns left out
    min_count: int = 2  # tables: a category that fewer training rows have is an unknown one
    group: str = ""  # a feature that parts the examples into groups, for gaps between them
    image_size: int = 0  # images: resized to this, then cut square; 0: as stored, if all have one size
    eval_crop: float = 1.0  # evaluation resizes to image_size / eval_crop, and cuts the middle out
    # exact: both sides become image_size / eval_crop; none: an image has its size already
    resize: Literal["cover", "exact", "none"] = "cover"
    # area: OpenCV's averages where it shrinks, linear where it grows; the others are Pillow's
    resample: Literal["area", "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "area"
    mean: tuple[float, ...] = ()  # of a channel, in 0..1, for normalizing; nothing: 0.5
    std: tuple[float, ...] = ()
    augment: str = ""  # training images: crop:4,flip:0.5,randaugment:2:9,erase:0.25 or resized_crop:0.08,...
    mixup: float = 0.0  # Beta(a, a) of mixup (Zhang et al. 2017); 0: off
    cutmix: float = 0.0  # Beta(a, a) of CutMix (Yun et al. 2019); 0: off
    # Classes are drawn ~ their count, its root, alike; over, under: in epochs of equal counts, see balance.py
    balance: Literal["none", "sqrt", "balanced", "over", "under"] = "none"
    max_boxes: int = 100  # detect: places for an image's boxes; one with more is a bad record
    decimal: Literal["auto", ".", ","] = (
        "auto"  # the sign before a fraction in files of numbers; auto: by cells
    )
    max_skipped: int = 0  # records or rows of files: so many bad ones are skipped, one more is an error
