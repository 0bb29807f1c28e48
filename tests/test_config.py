"""Overrides, and one line for every kind of bad input that names the key and the fix."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Annotated

import pytest
from conftest import ROOT, run_script

from bigmodel import config as config_lib
from bigmodel.config import Config, InputError, load, parsing, reference
from bigmodel.config.families import CNN, GPT

FILE, CONV = ROOT / "configs" / "gpt.py", ROOT / "configs" / "cnn.py"


def test_overrides_take_the_type_of_their_key():
    config = load(
        FILE,
        [
            "optim.lr=3e-4", "steps=7", "data.shuffle=no", "data.data_dir=/data", "mesh.fsdp=8", "remat=full",
            'compiler_options={"xla_flag": true}', "optim.weight_decay=0", "data.name=text:a=b.txt",
        ],
    )  # fmt: skip
    assert (config.optim.lr, config.steps, config.data.shuffle) == (3e-4, 7, False)
    assert (config.data.data_dir, config.mesh.fsdp, config.remat) == ("/data", 8, "full")
    assert config.compiler_options == {"xla_flag": True}
    assert isinstance(config.optim.weight_decay, float)
    assert config.data.name == "text:a=b.txt"
    assert load(FILE, ["data.data_dir=none"]).data.data_dir is None
    assert load(CONV, ["model.channels=8,16,32"]).model.channels == (8, 16, 32)


def test_overrides_may_be_values():
    assert load(FILE, {"optim.lr": 1, "mesh.data": 2}).optim.lr == 1.0
    assert load(CONV, {"model.channels": [4, 8]}).model.channels == (4, 8)


def test_the_config_takes_arguments():
    config = load(f"{FILE}:size=124m,seq_len=1024")
    assert isinstance(config.model, GPT)
    assert (config.model.depth, config.model.vocab_size, config.seq_len) == (12, 50257, 1024)


def test_zeros_are_derived():
    gelu = load(FILE, {"model.width": 96, "model.heads": 3}).model
    assert (gelu.kv_heads, gelu.head_dim, gelu.mlp_width) == (3, 32, 384)
    swiglu = load(FILE, {"model.width": 4096, "model.heads": 32, "model.mlp": "swiglu"}).model
    assert swiglu.mlp_width == 11008  # Llama 7B
    free = load(FILE, {"model.width": 100, "model.heads": 3, "model.head_dim": 16}).model
    assert free.head_dim == 16


SPECS = [FILE, CONV, f"{FILE}:size=llama3-8b", *(ROOT / "configs" / f"{n}.py" for n in ("bert", "t5", "vit"))]


@pytest.mark.parametrize("spec", SPECS, ids=["gpt", "cnn", "llama", "bert", "t5", "vit"])
def test_a_dict_brings_the_same_config_back(spec):
    config = load(spec, ["optim.lr=0.5"])
    tree = config_lib.to_dict(config)
    assert config_lib.from_dict(json.loads(json.dumps(tree))) == config


def test_difference_names_the_keys():
    a = load(FILE)
    b = a.replace(steps=9, optim=dataclasses.replace(a.optim, lr=0.5))
    assert config_lib.difference(a, b) == {"steps": (a.steps, 9), "optim.lr": (a.optim.lr, 0.5)}
    assert config_lib.difference(a, a) == {}
    other = config_lib.difference(a, load(CONV))
    assert other["model.name"] == ("gpt", "cnn")
    assert other["model.depth"] == (4, None)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(FILE).steps = 3  # type: ignore[misc]


BAD = [  # override -> what the message must name: the key, and the fix
    ("stpes=3", ["'stpes' is unknown", "did you mean 'steps'?"]),
    ("optim.leraning_rate=3", ["optim.leraning_rate", "unknown"]),
    ("optm.lr=3", ["optm", "did you mean 'optim'?"]),
    ("model.wdith=3", ["model.wdith", "did you mean 'model.width'?"]),
    ("eval.sets.val.splt=test", ["did you mean 'eval.sets.val.split'?"]),
    ("eval.patience=3", ["eval.patience needs a metric", "-eval/test/loss"]),
    ("checkpoint.best=accuracy", ["checkpoint.best is 'accuracy'", "eval/test/accuracy"]),
    ("lr=3", ["'lr' is unknown", "did you mean 'optim.lr'?"]),
    ("optim.learning_rate=3", ["did you mean 'optim.lr'?"]),
    ("model.n_layer=3", ["did you mean 'model.depth'?"]),
    ("warmup_step=3", ["did you mean 'optim.warmup_steps'?"]),
    ("name=gpt", ["'model.name' or 'task.name'"]),
    ("zzzz=3", ["'zzzz' is unknown", "known: assume, batch_size"]),
    ("model.name=gtp", ["model.name='gtp'", "did you mean 'gpt'?"]),
    ("steps=abc", ["steps='abc'", "whole number such as 1000"]),
    ("steps=1e5", ["steps='1e5'", "whole number"]),
    ("steps=2.5", ["steps='2.5'", "whole number"]),
    ("optim.lr=fast", ["optim.lr='fast'", "a number such as 3e-4"]),
    ("data.shuffle=maybe", ["data.shuffle='maybe'", "true or false"]),
    ("compiler_options={", ["compiler_options", "JSON"]),
    ("remat=half", ["remat='half'", "none, full, minimal"]),
    ("optim.name=adma", ["optim.name='adma'", "adamw, adam, sgd"]),
    ("optim.lr=nan", ["optim.lr=nan", "not a finite number"]),
    ("optim.lr=inf", ["optim.lr=inf", "not a finite number"]),
    ("budget=nan", ["budget=nan", "finite"]),
    ("optim=3", ["optim", "group of keys"]),
    ("steps.x=3", ["steps", "single value", "'x'"]),
    ("steps", ["override 'steps' has no value", "write steps=VALUE"]),
    ("steps=0", ["steps is 0", "1 or more"]),
    ("steps=-5", ["steps is -5", "1 or more"]),
    ("batch_size=0", ["batch_size is 0", "1 or more"]),
    ("seed=-1", ["seed is -1", "0 or more"]),
    ("microbatches=3", ["microbatches is 3", "batch_size=16"]),
    ("seq_len=1", ["seq_len is 1", "2 or more"]),
    ("log.every_steps=0", ["log.every_steps is 0", "1 or more"]),
    ("checkpoint.keep=0", ["checkpoint.keep is 0", "1 or more"]),
    ("eval.batches=0", ["eval.batches is 0", "-1 for the whole split"]),
    ("optim.lr=-1", ["optim.lr is -1", "0 or more"]),
    ("optim.b2=1", ["optim.b2 is 1", "below 1"]),
    ("optim.weight_decay_on=(", ["optim.weight_decay_on", "no regular expression"]),
    ("task.label_smoothing=1", ["task.label_smoothing is 1", "below 1|< 1"]),
    ("model.heads=3", ["model.heads is 3", "model.width=128"]),
    ("model.kv_heads=3", ["model.kv_heads is 3", "model.heads=4"]),
    ("model.depth=0", ["model.depth is 0", "1 or more"]),
    ("model.dropout=1", ["model.dropout is 1", "dropout < 1"]),
    ("data.tokenizer=words", ["data.tokenizer is 'words'", "bpe:8192"]),
    ("mesh.fsdp=0", ["mesh.fsdp is 0", "1 or more"]),
    ("mesh.fsdp=-1", ["mesh.fsdp is -1", "mesh.data", "only one axis"]),
    ("seed=99999999999999999999", ["seed is 99999999999999999999", "4294967295 or less"]),
    ("seed=4294967296", ["seed is 4294967296", "4294967295 or less"]),
    ("steps=99999999999999999999", ["steps is 9", "2147483647 or less"]),
    ("batch_size=2147483648", ["batch_size is 2147483648", "2147483647 or less"]),
    ("model.width=99999999999", ["model.width is 99999999999", "or less"]),
    ("checkpoint.every_steps=3000000000", ["checkpoint.every_steps is 3", "or less"]),
    ("optim.eps=-1", ["optim.eps is -1", "0 or more"]),
    ("optim.eps=1e-50", ["optim.eps is 1e-50", "0 as float32"]),
    ("optim.lr=1e39", ["optim.lr is 1e+39", "more than float32 holds"]),
    ("optim.b1=-0.1", ["optim.b1 is -0.1", "from 0 to below 1"]),
    ("optim.b1=nan", ["optim.b1=nan", "finite"]),
    ("model.dropout=1.5", ["model.dropout is 1.5", "dropout < 1"]),
    ("model.norm_eps=-1", ["model.norm_eps is -1", "above 0"]),
    ("model.norm_eps=0", ["model.norm_eps is 0", "above 0"]),
    ("model.rope_theta=-1", ["model.rope_theta is -1", "above 0"]),
    ("model.attention_block=-1", ["model.attention_block is -1", "0 or more"]),
    ("task.label_smoothing=1", ["task.label_smoothing is 1", "label_smoothing < 1"]),
    ("data.min_count=0", ["data.min_count is 0", "1 or more"]),
    ("data.max_boxes=-3", ["data.max_boxes is -3", "1 or more"]),
    ("data.name=", ["data.name is empty"]),
]

# Numeric keys that may be -1; of any other, no value below 0 makes a run.
MAY_BE_NEGATIVE = {f"mesh.{axis}" for axis in ("data", "fsdp", "tensor", "expert")} | {
    "eval.batches",
    "data.mean",
}
FAMILIES = {
    "bert",
    "cnn",
    "detector",
    "gan",
    "inception",
    "mlp",
    "recommender",
    "resnet",
    "rnn",
    "t5",
    "vgg",
    "vit",
}


@pytest.mark.parametrize("name", sorted(FAMILIES | {"gpt", "alexnet"}))
def test_every_number_of_every_family_has_a_range(name):
    spec = f"configs/{name}.py"
    flat = config_lib.flatten(config_lib.to_dict(load(spec)))
    numbers = {key: x for key, x in flat.items() if isinstance(x, int | float) and not isinstance(x, bool)}
    assert len(numbers) > 40
    for key, x in numbers.items():
        bad = [-2, 10**20] if isinstance(x, int) else [-0.5, "nan", "inf", "1e39", 1e-50]
        for value in bad if key not in MAY_BE_NEGATIVE else bad[1:]:
            with pytest.raises(InputError, match=re.escape(key.split(".")[-1])):
                load(spec, [f"{key}={value}"])


@pytest.mark.parametrize(("override", "words"), BAD, ids=[override for override, _ in BAD])
def test_bad_input_is_one_line_with_the_key_and_the_fix(override, words):
    with pytest.raises(InputError) as caught:
        load(FILE, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert any(part in message for part in word.split("|")), (word, message)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (f"{FILE}:size=7m", ["size='7m'", "toy"]),
        (f"{FILE}:sise=toy", ["'sise' is unknown", "did you mean 'size'?"]),
        (f"{FILE}:size", ["'size' has no value", "size=VALUE"]),
        (f"{FILE}:seq_len=long", ["'seq_len'", "whole number"]),
        ("configs/none.py", ["configs/none.py", "does not exist", "configs/gpt.py"]),
        (str(ROOT / "configs"), ["configs", "does not exist"]),
        (str(ROOT / "setup.cfg"), ["setup.cfg", "not a Python file"]),
    ],
)
def test_a_bad_spec_is_one_line(spec, words):
    with pytest.raises(InputError) as caught:
        load(spec)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_config_file_that_does_not_run_is_named(tmp_path):
    for text in ("def get_config(", "import no_such_module", "x = 1"):
        path = tmp_path / "broken.py"
        path.write_text(text)
        with pytest.raises(InputError, match=r"broken\.py.* cannot be read"):
            load(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"steps": "x"}, "steps='x'"),
        ({"steps": 2.0}, "steps=2.0 is float; it must be int"),
        ({"steps": True}, "steps=True is bool; it must be int"),
        ({"optim": {"lr": math.nan}}, "optim.lr=nan is not a finite number"),
        ({"optim": {"name": 3}}, "optim.name=3 is int"),
        ({"model": {"name": "gpt", "channels": 3}}, "model.channels"),
        ({"data": {"split": None}}, "data.split=None is NoneType; it must be str"),
    ],
)
def test_values_of_a_wrong_type_are_refused(tree, message):
    with pytest.raises(InputError) as caught:
        config_lib.from_dict(tree)
    assert message in str(caught.value)


def test_a_dict_of_nothing_is_the_default():
    assert config_lib.from_dict({}).model == GPT().resolve()
    assert config_lib.from_dict({"model": {"name": "cnn"}, "task": {"name": "classify"}}).model == CNN()
    assert isinstance(config_lib.from_dict({}), Config)


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str = ""

    def corners(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Dot(Shape):
    name: str = "dot"


@dataclasses.dataclass(frozen=True)
class Line(Shape):
    name: str = "line"


@dataclasses.dataclass(frozen=True)
class Drawing:
    shape: Annotated[Shape, Dot | Line] = Dot()


OWN = """
import dataclasses
from test_config import Shape

@dataclasses.dataclass(frozen=True)
class Square(Shape):
    side: float = 1.0

class Bare(Shape): ...
class Other: ...
"""


def test_a_class_of_ones_own_is_named_by_its_file_or_module(tmp_path, monkeypatch):
    (tmp_path / "shapes_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/shapes_of_mine.py:Square", "shapes_of_mine:Square"):
        tree = {"shape": {"name": name, "side": "2"}}
        shape = parsing.build(Drawing, tree, "").shape
        assert (type(shape).__name__, shape.name, shape.side) == ("Square", name, 2.0)
        assert shape == parsing.build(Drawing, tree, "").shape  # one class, however often it is read


def test_a_file_that_changed_is_read_again(tmp_path):
    file = tmp_path / "shapes_of_mine.py"
    for side in (1.0, 3.0):
        file.write_text(OWN.replace("1.0", str(side)))
        assert parsing.build(Drawing, {"shape": {"name": f"{file}:Square"}}, "").shape.side == side


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.py:Square", ["none.py", "does not exist", "correct the path"]),
        ("shapes.py:Sqare", ["has no 'Sqare'", "did you mean 'Square'?"]),
        ("shapes.py:Other", ["is no Shape", "derive it from test_config.Shape"]),
        ("shapes.py:OWN", ["has no 'OWN'"]),
        ("shapes.py:dataclasses", ["is no Shape"]),
        ("shapes.py:Bare", ["dataclass(frozen=True)"]),
        ("broken.py:Square", ["broken.py", "cannot be read", "line 2: ZeroDivisionError"]),
        ("no_such_package.x:Square", ["'no_such_package.x' cannot be imported", "PYTHONPATH"]),
    ],
)
def test_a_bad_reference_is_one_line(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(InputError) as caught:
        parsing.build(Drawing, {"shape": {"name": name}}, "")
    for word in (f"shape.name={name!r}", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("name", ["gpt", "cnn", "recommender"])
def test_every_key_is_described_once_and_those_that_are_set_have_a_star(name):
    path = ROOT / "configs" / f"{name}.py"
    lines = [line for line in config_lib.describe(path, ["optim.lr=0.5", "eval.sets.val.split=test"]) if line]
    config = load(path, ["optim.lr=0.5"])
    found = {line[2:].split()[0]: line for line in lines}
    everything = config_lib.flatten(config_lib.to_dict(config)).keys()
    assert len(found) == len(lines)
    assert everything - found.keys() <= {key for key in everything if key.startswith("optim.groups.")}
    assert found.keys() - everything <= {"compiler_options", "optim.groups", "eval.sets"}
    starred = {key for key, line in found.items() if line.startswith("* ")}
    assert {"optim.lr", "eval.sets", "batch_size"} <= starred
    assert "seed" not in starred
    assert re.search(r"^\* optim\.lr +0\.5 +float, default 0\.001$", found["optim.lr"])
    assert found["optim.clip_norm"].endswith("float  # by global norm; 0: off")
    assert "gpt|bert|" in found["model.name"]


@pytest.mark.parametrize(("theirs", "ours"), reference.ELSEWHERE.items())
def test_names_of_other_codebases_are_answered_with_ours(theirs, ours):
    for key in (theirs, f"optim.{theirs}"):
        with pytest.raises(InputError, match=re.escape(f"did you mean {ours!r}?")):
            load(FILE, {key: 1})


def test_help_of_a_script_lists_the_keys_of_its_config():
    ran = run_script("train.py", "--config=configs/mlp.py", "--config.seed=3", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"\n\* seed +3 +int, default 0", ran.out)
    assert "model.widths" in ran.out
