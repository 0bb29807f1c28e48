"""Keys of config.init, lora, prune, quantize and distill.

`problems` yields (key, what is wrong and the fix). Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bigmodel.config import parsing


@dataclass(frozen=True)
class Prune:
    """Weights that training keeps at zero, or brings there. scripts/compress.py sets it after pruning."""

    sparsity: float = 0.0  # share of the weights that are zero in the end; 0: off, unless a pattern is set
    pattern: str = ""  # N:M, such as 2:4: of M consecutive inputs N stay; "": any
    method: Literal["magnitude", "movement"] = "magnitude"  # movement: those that training moves to zero go
    scope: Literal["layer", "global"] = "layer"  # where weights are compared
    begin_step: int = 0
    end_step: int = 0  # up to here the share grows; 0: what is zero at the start stays so
    every_steps: int = 50  # between two masks
    on: str = r"(?<!/router)/kernel$"  # regex on parameter paths: which ones

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from parsing.regex_problems(self, "on")
        if not 0 <= self.sparsity < 1:
            yield "sparsity", f"is {self.sparsity}: choose 0 <= sparsity < 1"
        yield from pattern_problems(self.pattern)
        for key in ("begin_step", "end_step"):
            if getattr(self, key) < 0:
                yield key, f"is {getattr(self, key)}: set it to 0 or more"
        if self.end_step and self.begin_step >= self.end_step:
            yield "begin_step", f"is {self.begin_step}: set it below prune.end_step={self.end_step}"
        if self.every_steps < 1:
            yield "every_steps", f"is {self.every_steps}: set it to 1 or more"


def pattern_problems(pattern: str) -> Iterable[tuple[str, str]]:
    """Problems of a pattern N:M; "" is none."""
    n, _, m = pattern.partition(":")
    if pattern and not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
        yield "pattern", f"is {pattern!r}: give N:M with N below M, such as 2:4"


@dataclass(frozen=True)
class Quantize:
    """Storage of the weights of products. scripts/compress.py sets it; with `aware`, training does."""

    weights: Literal["none", "int8", "int4", "fp8"] = "none"
    group: int = 0  # inputs that share a scale; 0: all of an output's
    activations: Literal["none", "int8", "fp8"] = "none"  # what a product's inputs are rounded to: as weights
    aware: bool = False  # floats are kept and trained, but rounded wherever they are used
    on: str = r"(?<!/router)/(kernel|table)$"  # regex on parameter paths: which ones

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from parsing.regex_problems(self, "on")
        if self.group < 0:
            yield "group", f"is {self.group}: set it to 0 or more"
        if self.activations != "none" and (self.activations != self.weights or self.group or self.aware):
            yield (
                "activations",
                f"is {self.activations}, which needs quantize.weights={self.activations}, group=0 and "
                "aware=false",
            )


@dataclass(frozen=True)
class Distill:
    """A teacher whose outputs a model learns while it trains."""

    teacher: str = ""  # the workdir of a run; "": none
    weight: float = 1.0  # of the distance from the teacher's outputs, added to the task's own loss
    temperature: float = 2.0  # of both's probabilities (Hinton et al. 2015)
    hidden: float = 0.0  # weight of how the last hidden states relate to each other (Tung and Mori 2019)
    attention: float = 0.0  # Transformers: weight of the last layer's attention maps (Wang et al. 2020)

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("weight", "hidden", "attention"):
            if getattr(self, key) < 0:
                yield key, f"is {getattr(self, key)}: set it to 0 or more"
        if self.temperature <= 0:
            yield "temperature", f"is {self.temperature}: set it above 0, such as 2"


@dataclass(frozen=True)
class Init:
    """Parameters to start from, at step 0; a run that is resumed does not read them again."""

    from_: str = ""  # another run's workdir, or a directory in Hugging Face's layout; "": random ones
    skip: str = ""  # regex on paths: what stays random, such as /head/; "": nothing

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from parsing.regex_problems(self, "skip")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021). With them the model's own parameters stay as they are."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0  # the adapters' product counts alpha / rank
    on: str = r"/attention/(q|v)/kernel$"  # regex on parameter paths: the weights that get one
    train: str = ""  # regex on parameter paths: what is trained too, such as a new head; "": nothing

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from parsing.regex_problems(self, "on", "train")
        if self.rank < 0:
            yield "rank", f"is {self.rank}: set it to 1 or more, or to 0 for no adapters"
        if self.alpha <= 0:
            yield "alpha", f"is {self.alpha}: set it above 0, such as 16"
