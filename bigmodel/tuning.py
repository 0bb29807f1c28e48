"""What a run starts from, and what is trained of it: the keys of `config.init` and `config.lora`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bigmodel import typed


@dataclass(frozen=True)
class Init:
    """Parameters to start from, at step 0; a run that is resumed does not read them again."""

    from_: str = ""  # another run's workdir, or a directory in Hugging Face's layout; "": random ones
    skip: str = ""  # regex on paths: what stays random, such as /head/; "": nothing

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from typed.regex_problems(self, "skip")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021). With them the model's own parameters stay as they are."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0  # the adapters' product counts alpha / rank
    on: str = r"/attention/(q|v)/kernel$"  # regex on parameter paths: the weights that get one
    train: str = ""  # regex on parameter paths: what is trained beside them, such as a new head; "": nothing

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from typed.regex_problems(self, "on", "train")
        if self.rank < 0:
            yield "rank", f"is {self.rank}: set it to 1 or more, or to 0 for no adapters"
        if self.alpha <= 0:
            yield "alpha", f"is {self.alpha}: set it above 0, such as 16"
