"""The keys of `config.task`: what a model is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    name: Literal["lm", "mlm", "seq2seq", "classify", "multilabel", "regress", "gan", "detect", "rank"] = "lm"
    label_smoothing: float = 0.0
    mask_rate: float = 0.15  # mlm, and seq2seq on plain text: the share of tokens to be predicted
    mean_span: float = 3.0  # seq2seq on plain text: tokens in a corrupted span
    next_sentence: bool = False  # mlm: predict too whether the second half of a text goes on the first
    goes_on: int = 0  # next_sentence: the class of a half that goes on: 0 as in BERT's own files, or 1
    target_len: int = 0  # seq2seq on pairs: tokens of a target; 0: seq_len
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"  # of classify and multilabel
    focal_gamma: float = 2.0  # Lin et al. 2017: the loss times (1 - p) ** gamma
    class_weights: Literal["none", "balanced"] = "none"  # balanced: the training loss weighs classes alike
    aux_weight: float = 0.3  # of each auxiliary classifier's loss, for models that have them
    huber_delta: float = 0.0  # regress: squared error up to here, absolute beyond; 0: squared everywhere
    top_k: int = 5  # classify: also counts a label among so many likeliest; rank: HR@k, NDCG@k
    gan_loss: Literal["non-saturating", "hinge", "wgan-gp"] = "non-saturating"
    rank_loss: Literal["binary", "softmax", "rating"] = "binary"  # softmax: among the batch's items
    negatives: int = 4  # rank, binary: for each rating of a user, items that it never rated
    eval_negatives: int = 0  # rank: a held-out item is ranked among so many that are drawn; 0: among all
    gradient_penalty: float = 10.0  # wgan-gp: the weight of (slope - 1)^2 (Gulrajani et al. 2017)
    most_detections: int = 100  # detect: of an image, the best ones
    least_score: float = 0.05  # detect: a detection below this is none
    nms_overlap: float = 0.6  # detect: of two of a class that overlap by more (IoU), the better one stays
