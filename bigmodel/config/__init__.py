"""WHAT CAN I SET? All keys of a config, with their defaults, types and checks. Nothing here imports JAX.

config = load("configs/gpt.py:size=124m", ["optim.lr=3e-4"])
"""

from bigmodel.config.adapt import Distill, Init, Lora, Prune, Quantize
from bigmodel.config.data import Data
from bigmodel.config.files import describe, difference, from_dict, load, override, parse_arg, sweep
from bigmodel.config.optim import OTHERS, Group, Optim
from bigmodel.config.parsing import InputError
from bigmodel.config.run import (
    Assume,
    Check,
    Checkpoint,
    Config,
    Eval,
    Log,
    Mesh,
    Train,
    eval_sets,
    flatten,
    to_dict,
)
from bigmodel.config.task import (
    GAN,
    LM,
    MLM,
    Classify,
    Detect,
    Labels,
    Multilabel,
    Rank,
    Regress,
    Seq2Seq,
    Task,
    TaskKeys,
)

__all__ = [
    "GAN",
    "LM",
    "MLM",
    "OTHERS",
    "Assume",
    "Check",
    "Checkpoint",
    "Classify",
    "Config",
    "Data",
    "Detect",
    "Distill",
    "Eval",
    "Group",
    "Init",
    "InputError",
    "Labels",
    "Log",
    "Lora",
    "Mesh",
    "Multilabel",
    "Optim",
    "Prune",
    "Quantize",
    "Rank",
    "Regress",
    "Seq2Seq",
    "Task",
    "TaskKeys",
    "Train",
    "describe",
    "difference",
    "eval_sets",
    "flatten",
    "from_dict",
    "load",
    "override",
    "parse_arg",
    "sweep",
    "to_dict",
]
