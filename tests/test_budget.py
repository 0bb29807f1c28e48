"""The run that a budget is best spent on: against brute force, a closed form, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex

import numpy as np
import pytest
from conftest import ROOT, run_script, sized

from bigmodel import units
from bigmodel.config import InputError
from bigmodel.study import budget, laws, shapes
from bigmodel.study.budget import Buyer, Choice, Offer
from bigmodel.study.shapes import Shape

LAW = laws.PUBLISHED["besiroglu2024"]
CONFIG = sized("124m", seq_len=256)
SPEED = 1e15  # FLOP/s
SIZES = shapes.between(CONFIG, 1e7, 3e10)


def offer(shape: Shape, slower: float = 1.0) -> Offer:
    """A size at 6 N FLOPs a token, on a machine of one speed for all."""
    params = shapes.parameters(CONFIG.model, CONFIG.seq_len, shape)
    flops = 6 * params * 2**18
    step = {"total_flops": flops, "total_s": slower * flops / SPEED}
    return Offer(shape, CONFIG, params, step, None, 2**18)


def uneven(shape: Shape) -> Offer:
    """Narrow matrices are slower, and some widths are for no reason."""
    return offer(shape, (1 + 2000 / shape.width) * (1.5 if shape.width % 512 else 1.0))


def bought(text: str, compile=offer, estimate=offer, most: int = 6) -> tuple[list[Offer], Buyer]:
    buyer = Buyer(LAW, units.cap(text), estimate, compile, most)
    return buyer.run(SIZES)[0], buyer


def test_sizes_are_evenly_spaced_and_legal():
    counts = [shapes.parameters(CONFIG.model, CONFIG.seq_len, each) for each in SIZES]
    ratios = np.diff(np.log(counts)) / math.log(shapes.STEP)
    assert ((ratios > 0) & (ratios < 2.2)).all()
    for shape in SIZES:
        assert shape.heads * shape.head_dim == shape.width
        assert 24 <= shape.width / shape.depth <= 165
    llama = sized("llama-70b")
    wide = llama.model.mlp_width / llama.model.width
    for shape in shapes.between(llama, 1e8, 1e11):
        assert shape.heads == 8 * shape.kv_heads
        assert shape.mlp_width / shape.width == pytest.approx(wide, rel=0.15)


@pytest.mark.parametrize("size", ["124m", "llama-7b", "llama3-8b", "mixtral-8x7b"])
def test_parameters_are_those_of_the_published_sizes(size):
    model = sized(size, seq_len=1024).model
    shape = Shape(*(getattr(model, key) for key in shapes.KEYS))
    published = {"124m": 124e6, "llama-7b": 6.74e9, "llama3-8b": 8.03e9, "mixtral-8x7b": 12.9e9}[size]
    assert shapes.parameters(model, 1024, shape) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("flops", [1e19, 1e20, 1e22])
@pytest.mark.parametrize("text", ["{:g}flop", "{:g}s"])
def test_at_one_speed_the_choice_is_the_closed_form_s(flops, text):
    amount = flops if "flop" in text else flops / SPEED / budget.SHARE
    made, _ = bought(text.format(amount))
    best = laws.optimal(LAW, flops)
    assert abs(math.log(made[0].params / best.params)) < 1.2 * math.log(shapes.STEP)
    assert made[0].loss == pytest.approx(best.loss, rel=5e-4)
    assert made[0].tokens * made[0].params * 6 <= flops * 1.00001


@pytest.mark.parametrize("seconds", [1e4, 1e5, 1e6])
def test_the_choice_is_nearly_the_best_of_all_and_never_behind_one_that_was_compiled(seconds):
    made, buyer = bought(f"{seconds:g}s", compile=uneven)
    every = min(buyer.worth(uneven(shape)).loss for shape in SIZES)
    assert made[0].loss == min(each.loss for each in made)
    assert made[0].loss <= every * 1.005
    assert len(buyer.compiled) <= 6
    alone, _ = bought(f"{seconds:g}s", compile=uneven, most=1)
    assert made[0].loss <= alone[0].loss


@pytest.mark.parametrize("price", [offer, uneven])
def test_doubling_the_budget_never_raises_the_loss(price):
    losses = [bought(f"{1e4 * 2**n}s", compile=price)[0][0].loss for n in range(8)]
    assert losses == sorted(losses, reverse=True)


def test_where_the_best_does_not_fit_the_largest_that_does_is_taken():
    def small(shape: Shape) -> Offer | None:
        return offer(shape) if shape.width <= 1024 else None

    fitting = max((each for each in map(small, SIZES) if each), key=lambda each: each.params)
    for estimate, compile in ((small, offer), (offer, small)):
        buyer = Buyer(LAW, units.cap("1e22flop"), estimate, compile, most=40)
        assert buyer.run(SIZES)[0][0].shape == fitting.shape


def test_the_batch_grows_with_the_budget_and_divides():
    sizes = [budget.batch_size(10.0**n, 1024, 24) for n in range(12, 26)]
    assert sizes == sorted(sizes)
    assert all(each % 3 == 0 for each in sizes)
    assert budget.batch_size(1e20, 4096, 256) * 4096 == 2**20  # DeepSeek's figure 3: about 1e6 tokens


def test_notes_say_what_the_prediction_rests_on():
    law = dataclasses.replace(LAW, resamples=np.tile(LAW.theta, (50, 1)), noise=np.full(9, 0.01))
    law.about.update({"flops": [1e17, 1e19], "runs": 9})
    within = Buyer(law, units.cap("1e20flop"), offer, offer)
    best = within.run(SIZES)[0][0]
    assert best.low <= best.loss * 1.011 <= best.high * 1.011
    choice = Choice((best,), (), 0, 1, 1.0, False)
    text = " ".join(budget.notes(choice, law))
    assert "10 times the FLOPs of its largest run" in text
    assert "50 resamples of its 9 runs" in text
    assert "guessing" not in text
    law.about.pop("runs")
    law.about.pop("flops")
    poor = dataclasses.replace(best, loss=20.0, low=math.nan, tokens_per_step=1.0)
    text = " ".join(budget.notes(Choice((poor,), (), 0, 1, 1.0, True), LAW))
    for part in ("published coefficients", "its smallest run has", "guessing among", "at the edge"):
        assert part in text


@pytest.mark.slow  # it measures this machine, if nothing has yet
def test_the_commands_that_are_printed_run(tmp_path):
    path, few = tmp_path / "choice.json", ["--config.data.prefetch=1"]
    ran = run_script(
        "budget.py", "--config=configs/gpt.py:seq_len=64", "--config.eval.batches=1", *few, "--target=cpu",
        "--budget=3e11flop", "--compile=1", f"--json={path}", limit_s=300,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(path.read_text())
    best = found["choices"][0]
    assert best["compiled"]
    assert best["receipt"]["fits"]
    assert best["receipt"]["model_flops_per_step"] * best["steps"] == pytest.approx(3e11, rel=0.05)
    assert best["params"] == best["receipt"]["active_parameters"]
    assert best["loss"] == min(each["loss"] for each in found["choices"] if each["compiled"])
    assert found["train"] in ran.out
    python, script, *flags = shlex.split(found["train"])
    assert (python, script, flags[-1]) == ("python", "scripts/train.py", "--workdir=runs/budget")
    flags[-1] = f"--workdir={tmp_path / 'run'}"
    alone = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    trained = run_script("train.py", *flags, "--config.budget=1e9flop", env={"XLA_FLAGS": alone})  # a 300th
    assert trained.code == 0, trained.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["active_parameters"] == best["params"]
    assert plan["tokens_per_step"] * best["steps"] == best["tokens"]
    assert plan["model_flops_per_step"] == best["receipt"]["model_flops_per_step"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget=$5"], "assume.dollars_per_chip_hour"),
        (["--budget=2h", "--config.model.width=64"], "--config.model.width: scripts/budget.py chooses it"),
        (["--budget=1flop"], "give a larger one"),
    ],
)
def test_bad_commands_are_one_line(flags, words):
    ran = run_script("budget.py", f"--config={ROOT}/configs/gpt.py", "--target=cpu", *flags)
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert words in ran.err


def test_sizes_are_chosen_for_language_models_alone():
    with pytest.raises(InputError, match=r"take such a config, as configs/gpt.py"):
        shapes.between(sized("124m").replace(task=sized("124m").task.__class__(name="classify")), 1e6, 1e9)


def test_one_law_is_taken_and_it_counts_parameters_as_a_run_does(tmp_path):
    def written(law: dict[str, laws.Law], params: str) -> str:
        laws.write(tmp_path / "law.json", law, {"loss": "loss", "by": "data", "params": params})
        return str(tmp_path / "law.json")

    about = {"frontier": {}, "isoflop": {}, "left_out": [], "flops_per": 6.0}
    law = dataclasses.replace(LAW, about={**LAW.about, **about})
    path = written({"a": law, "b": law}, "params")
    assert budget.read_law(path, "b").coefficients == pytest.approx(LAW.coefficients)
    with pytest.raises(InputError, match="laws of 'a', 'b': choose one by --group"):
        budget.read_law(path)
    with pytest.raises(InputError, match="counts parameters by 'without_embeddings'"):
        budget.read_law(written({"": law}, "without_embeddings"))
