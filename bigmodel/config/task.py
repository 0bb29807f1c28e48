"""The keys of `config.task`: what a model is trained for. `task.name` picks one of these dataclasses.

The code of each task is in bigmodel/tasks/. `problems` yields (key, what is wrong and the fix).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from bigmodel.config.families.base import Family, at_least_0, positive, rate
from bigmodel.config.parsing import InputError

LabelKind = Literal["", "class", "classes", "numbers"]
Generates = Literal["", "continuation", "answer"]


@dataclass(frozen=True)
class TaskKeys:
    """The base of every task. A task of your own derives from it and returns its code from `task`."""

    name: str = ""
    like: ClassVar[str] = ""  # of your own: the built-in task whose models it trains, such as classify
    predicts_tokens: ClassVar[bool] = False  # a loss at positions of a text
    one_output: ClassVar[bool] = False  # one vector for each example, whatever the example is
    label_kind: ClassVar[LabelKind] = ""  # of data.label: one class, several classes, or numbers
    generates: ClassVar[Generates] = ""  # text that continues a prompt, or answers it

    @property
    def weighs_classes(self) -> bool:
        """True if rare classes weigh more in the training loss."""
        return False

    @property
    def least_seq_len(self) -> int:
        return 1

    @property
    def answer_len(self) -> int:
        """Tokens of an answer's text, where they are not seq_len; else 0."""
        return 0

    @property
    def loss_unit(self) -> str:
        """Unit of the loss: nats, where it is a mean negative log-likelihood; else none."""
        return "nats" if self.predicts_tokens and not getattr(self, "label_smoothing", 0.0) else ""

    def task(self) -> Any:
        """Returns the code of a task outside the package: a subclass of `bigmodel.tasks.base.Task`."""
        raise InputError(
            f"task.name={self.name}: {type(self).__name__} has no method `task`; let it return a subclass of "
            "bigmodel.tasks.base.Task"
        )

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        """Yields what is wrong with the keys, for a model of this family."""
        return ()


@dataclass(frozen=True)
class LM(TaskKeys):
    """Next tokens of packed documents."""

    name: Literal["lm"] = "lm"
    label_smoothing: float = 0.0
    predicts_tokens: ClassVar[bool] = True
    generates: ClassVar[Generates] = "continuation"

    @property
    def least_seq_len(self) -> int:
        return 2

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from rate(self, "label_smoothing")


@dataclass(frozen=True)
class MLM(TaskKeys):
    """Masked words, and whether two sentences follow each other (Devlin et al. 2018)."""

    name: Literal["mlm"] = "mlm"
    label_smoothing: float = 0.0
    mask_rate: float = 0.15  # share of the tokens to predict
    next_sentence: bool = False  # also predict whether the second half of a text follows the first
    goes_on: int = 0  # next_sentence: the class of a half that follows: 0 as in BERT's own files, or 1
    predicts_tokens: ClassVar[bool] = True

    @property
    def least_seq_len(self) -> int:
        return 5 if self.next_sentence else 2

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from rate(self, "label_smoothing")
        yield from _share(self, "mask_rate")
        if self.goes_on not in (0, 1):
            yield "goes_on", f"is {self.goes_on}: set it to 0 or 1"
        if self.next_sentence and not model.pooler:
            yield "next_sentence", "needs a model with a pooler; set model.pooler to true"


@dataclass(frozen=True)
class Seq2Seq(TaskKeys):
    """A target text for an input text: pairs, or spans that plain text lost (Raffel et al. 2020)."""

    name: Literal["seq2seq"] = "seq2seq"
    label_smoothing: float = 0.0
    mask_rate: float = 0.15  # plain text: share of the tokens in corrupted spans
    mean_span: float = 3.0  # plain text: tokens in a corrupted span
    target_len: int = 0  # pairs: tokens of a target; 0: seq_len
    pack: bool = True  # pairs: several in a row of seq_len and target_len tokens, kept apart
    predicts_tokens: ClassVar[bool] = True
    generates: ClassVar[Generates] = "answer"

    @property
    def least_seq_len(self) -> int:
        return 4

    @property
    def answer_len(self) -> int:
        return self.target_len

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from rate(self, "label_smoothing")
        yield from _share(self, "mask_rate")
        if self.mean_span < 1:
            yield "mean_span", f"is {self.mean_span}: set it to 1 or more"
        if self.target_len < 0 or self.target_len == 1:
            yield "target_len", f"is {self.target_len}: set it to 2 or more, or to 0 for seq_len"


@dataclass(frozen=True)
class Labels(TaskKeys):
    """Keys of tasks with one output for each example: an image, a text, a row of a table."""

    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"  # balanced: classes weigh alike in the training loss
    aux_weight: float = 0.3  # of each auxiliary classifier's loss, for models that have them
    least_group: int = 30  # data.group: a gap is between rates of as many examples or more
    one_output: ClassVar[bool] = True

    @property
    def weighs_classes(self) -> bool:
        return self.class_weights != "none"

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from rate(self, "label_smoothing")
        yield from at_least_0(self, "aux_weight", "least_group")
        if self.weighs_classes and self.label_kind != "class":
            yield "class_weights", f"needs task.name=classify, not {self.name}; set it to none"


@dataclass(frozen=True)
class Classify(Labels):
    """One class for each example."""

    name: Literal["classify"] = "classify"
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = 2.0  # Lin et al. 2017: the loss times (1 - p) ** gamma
    top_k: int = 5  # also report top-k accuracy
    label_kind: ClassVar[LabelKind] = "class"

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from super().problems(model)
        yield from at_least_0(self, "focal_gamma")
        yield from positive(self, "top_k")

    @property
    def loss_unit(self) -> str:
        plain = self.loss == "cross_entropy" and not self.label_smoothing and not self.weighs_classes
        return "nats" if plain else ""


@dataclass(frozen=True)
class Multilabel(Labels):
    """Any number of classes for each example."""

    name: Literal["multilabel"] = "multilabel"
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = 2.0  # Lin et al. 2017: the loss times (1 - p) ** gamma
    top_k: int = 5
    label_kind: ClassVar[LabelKind] = "classes"

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from super().problems(model)
        yield from at_least_0(self, "focal_gamma")


@dataclass(frozen=True)
class Regress(Labels):
    """Numbers for each example."""

    name: Literal["regress"] = "regress"
    huber_delta: float = 0.0  # squared error up to here, absolute beyond; 0: squared everywhere
    label_kind: ClassVar[LabelKind] = "numbers"

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from super().problems(model)
        yield from at_least_0(self, "huber_delta")


@dataclass(frozen=True)
class GAN(TaskKeys):
    """Images like those of the data."""

    name: Literal["gan"] = "gan"
    gan_loss: Literal["non-saturating", "hinge", "wgan-gp"] = "non-saturating"
    gradient_penalty: float = 10.0  # wgan-gp: the weight of (slope - 1)^2 (Gulrajani et al. 2017)
    label_kind: ClassVar[LabelKind] = "class"

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "gradient_penalty")
        if self.gan_loss == "wgan-gp" and model.mixes_examples:
            yield (
                "gan_loss",
                "is wgan-gp, whose penalty is an example's own; set model.norm to none or spectral",
            )


@dataclass(frozen=True)
class Detect(TaskKeys):
    """Boxes of objects in images, and their classes."""

    name: Literal["detect"] = "detect"
    focal_gamma: float = 2.0  # Lin et al. 2017: the loss times (1 - p) ** gamma
    most_detections: int = 100  # of an image, the best ones
    least_score: float = 0.05  # detections below this are dropped
    nms_overlap: float = 0.6  # of two boxes of a class that overlap by more (IoU), the better one stays

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "focal_gamma")
        yield from positive(self, "most_detections")
        for key in ("least_score", "nms_overlap"):
            yield from _share(self, key)


@dataclass(frozen=True)
class Rank(TaskKeys):
    """Items for users."""

    name: Literal["rank"] = "rank"
    rank_loss: Literal["binary", "softmax", "rating"] = "binary"  # softmax: among the batch's items
    negatives: int = 4  # binary: for each rating of a user, items that it never rated
    eval_negatives: int = 0  # a held-out item is ranked among so many that are drawn; 0: among all
    top_k: int = 5  # HR@k, NDCG@k

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "eval_negatives")
        yield from positive(self, "negatives", "top_k")


def _share(keys: TaskKeys, key: str) -> Iterable[tuple[str, str]]:
    if not 0 < getattr(keys, key) < 1:
        yield key, f"is {getattr(keys, key)}: choose 0 < {key} < 1"


# One of these by its name, or a class of one's own (see parsing.build).
Task = Annotated[TaskKeys, LM | MLM | Seq2Seq | Classify | Multilabel | Regress | GAN | Detect | Rank]
TASKS: tuple[type[TaskKeys], ...] = get_args(get_args(Task)[1])


def keys_of(name: str) -> set[str]:
    """Returns the keys of a task of the package; none for another name."""
    return {field.name for cls in TASKS if cls.name == name for field in dataclasses.fields(cls)}
