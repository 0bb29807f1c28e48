"""Between the steps of a run: metrics over intervals, the best checkpoint, callbacks, samples."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from conftest import run_script, tiny

from bigmodel import config as config_lib
from bigmodel import log, tasks, train
from bigmodel.checkpoint import best as best_lib
from bigmodel.checkpoint.best import Best
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config, InputError
from bigmodel.training import plots


def cnn(**overrides: Any) -> Config:
    return tiny("cnn", **{"eval__batches": 1, "log__tensorboard": False} | overrides)


def logged(path: Any, name: str) -> dict[int, float]:
    """Step -> the metric, for the lines of metrics.jsonl that have it."""
    return {row["step"]: row[name] for row in log.read_metrics(path) if name in row}


def test_metrics_are_means_over_the_steps_since_the_last_line(tmp_path):
    for every in (1, 4):
        train.run(cnn(steps=8, log__every_steps=every), tmp_path / str(every))
    for name in ("train/loss", "train/accuracy", "train/grad_norm"):
        each, means = (logged(tmp_path / str(every), name) for every in (1, 4))
        assert set(means) == {4, 8}
        for last in means:
            assert means[last] == pytest.approx(np.mean([each[last - i] for i in range(4)]), rel=1e-6)
    rates = [logged(tmp_path / str(every), "train/lr") for every in (1, 4)]
    assert rates[1] == {step: rates[0][step] for step in (4, 8)}


# ----------------------------------------------------------------------- the best checkpoint, early stopping


def steps_of(path: pathlib.Path) -> list[int]:
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


BEST = {
    "checkpoint__best": "-eval/test/loss", "checkpoint__keep": 1, "checkpoint__every_steps": 100,
    "eval__every_steps": 2, "optim__schedule": "constant", "optim__warmup_steps": 0,
}  # fmt: skip


def test_the_best_step_stays_and_no_progress_ends_the_run_also_over_a_resume(tmp_path):
    config = cnn(**BEST, steps=6, optim__lr=1e-2)
    first = train.run(config, tmp_path)
    found = logged(tmp_path, "eval/test/loss")
    assert first.best_step == min(found, key=lambda step: found[step]) == 6
    assert steps_of(tmp_path) == [6]
    worse = config_lib.override(config, {"optim.lr": 3.0, "steps": 40, "eval.patience": 3})
    second = train.run(worse, tmp_path)
    assert (second.exit_code, second.step, second.best_step) == (train.DONE, 12, 6)
    assert steps_of(tmp_path) == [6, 12]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = train.run(worse, tmp_path)
    assert (again.step, again.best_step, again.metrics) == (12, 6, second.metrics)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    on = train.run(config_lib.override(worse, {"eval.patience": 4}), tmp_path)
    assert (on.step, steps_of(tmp_path)) == (14, [6, 14])


def test_a_metric_that_the_run_does_not_have_is_named(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.best=eval/test/mAP is no metric .*eval/test/accuracy"):
        train.run(cnn(steps=2, checkpoint__best="eval/test/mAP"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_best_of_a_log(tmp_path):
    best = Best("eval/test/accuracy")
    assert [best.add(i, value) for i, value in enumerate([None, float("nan"), 0.5, 0.5, 0.7, 0.6])] == [
        False, False, True, False, True, False,
    ]  # fmt: skip
    assert (best.step, best.value, best.since) == (4, 0.7, 1)
    rows = [
        {"step": i, "eval/test/loss": value}
        for i, value in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.6), (9, 0.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = best_lib.resumed("-eval/test/loss", tmp_path, 4, [1, 3, 4])  # 2 was removed, 9 is to come
    assert (resumed.step, resumed.value, resumed.since) == (3, 0.4, 1)


def test_tokens_a_second_do_not_count_padding(tmp_path, capsys):
    (tmp_path / "pairs.tsv").write_text("".join(f"{'a' * (i % 9 + 1)}\tb {i}\n" for i in range(90)))
    keys = {"data__name": f"pairs:{tmp_path}/pairs.tsv", "model__vocab_size": 384, "task__pack": False}
    run = train.run(tiny("t5", **keys, steps=2, log__every_steps=1, log__tensorboard=False), tmp_path / "run")
    config = run.program.config
    share = (tasks.make_pipeline(config, "train")[0]["segments"] > 0).mean()
    assert 0.1 < share < 0.7
    took = [logged(run.workdir, f"perf/{name}")[2] for name in ("step_time_s", "input_wait_s")]
    expected = share * config.batch_size * config.seq_len / sum(took)
    assert logged(run.workdir, "perf/tokens_per_s")[2] == pytest.approx(expected)
    assert f"padding   {1 - share:.0%} of a batch's positions" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ callbacks and the end


def test_callbacks_get_what_is_logged_and_may_end_the_run(tmp_path):
    events: list[train.Event] = []

    def listen(event: train.Event) -> bool:
        events.append(event)
        if event.state is not None:
            assert int(event.state["step"]) == event.step
        return event.kind == "eval" and event.step == 4

    config = cnn(steps=8, log__every_steps=2, eval__every_steps=4, checkpoint__every_steps=4)
    result = train.run(config, tmp_path, callbacks=[listen])
    assert (result.exit_code, result.step, steps_of(tmp_path)) == (train.DONE, 4, [4])
    order = [("log", 2), ("log", 4), ("save", 4), ("eval", 4)]
    assert [(event.kind, event.step) for event in events] == order
    rows = [{k: v for k, v in row.items() if k not in ("step", "time")} for row in log.read_metrics(tmp_path)]
    assert [dict(event.metrics) for event in events] == [rows[0], rows[1], {}, rows[2]]
    assert len(repr(result)) < 500
    assert train.run(config, tmp_path).step == 8


# ------------------------------------------------------------------------------------- sets, samples, starts


@pytest.mark.slow
def test_several_sets_are_evaluated_and_logged_by_name(tmp_path, capsys):
    sets = {"val": {"split": "test"}, "seen": {"split": "train"}}
    config = cnn(steps=2, eval__sets=sets, checkpoint__best="eval/val/accuracy")
    result = train.run(config, tmp_path)
    alone = train.run(cnn(steps=2), tmp_path / "alone").metrics
    assert result.metrics["eval/val/loss"] == alone["eval/test/loss"] != result.metrics["eval/seen/loss"]
    assert {name.split("/")[1] for name in result.metrics} == {"val", "seen"}
    assert "seen  accuracy" in capsys.readouterr().out
    more = {"eval.sets": {"other": {"split": "test"}}, "checkpoint.best": "", "steps": 3}
    metrics = train.run(config_lib.override(config, more), tmp_path).metrics
    ran = run_script("evaluate.py", f"--workdir={tmp_path}", "--set=other")
    assert json.loads(ran.out)["loss"] == pytest.approx(metrics["eval/other/loss"], rel=1e-5)


def test_samples_are_written_while_a_run_trains(corpus, tmp_path, capsys):
    keys = {"model__vocab_size": 264, "seq_len": 32, "eval__batches": 1, "log__tensorboard": False}
    train.run(tiny("gpt", data__name=corpus, steps=4, eval__every_steps=2, eval__samples=3, **keys), tmp_path)
    for step in (2, 4):
        assert (tmp_path / "samples" / f"{step:07}.txt").read_text().count(" >>> ") == 3
    assert capsys.readouterr().out.count("sample    ") == 2


def test_a_start_says_what_it_does_and_one_that_fails_leaves_nothing(tmp_path, capsys):
    train.run(cnn(steps=1), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    words = [word for word in (line.split()[0] for line in lines) if word != "preparing"]
    assert words[:4] == ["data", "data", "compile", "start"]
    assert "plan      measuring this machine" in lines
    with pytest.raises(InputError):
        train.run(cnn(data__name="table:nowhere.csv"), tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        train.run(cnn(data__name="table:nowhere.csv"), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] in ([], [".lock"])


@pytest.mark.parametrize(
    ("family", "keys", "unit"),
    [
        ("gpt", {}, "nats"),
        ("gpt", {"task__label_smoothing": 0.1}, ""),
        ("cnn", {}, "nats"),
        ("cnn", {"task__loss": "focal"}, ""),
        ("gan", {}, ""),
        ("detector", {}, ""),
    ],
)
def test_a_loss_is_in_nats_only_where_it_is_a_log_likelihood(family, keys, unit):
    assert tiny(family, **keys).task.loss_unit == unit


def test_curves_are_drawn_of_all_metrics_of_the_task(tmp_path):
    config = tiny("gan")
    assert plots.plot(tmp_path, config) == []
    rows = [
        {"step": step, "train/loss": 2.0, "train/generator_loss": 1.0, "train/lr": 0.1, "perf/mfu": 0.5}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [path.name for path in plots.plot(tmp_path, config)] == ["loss.png"]
    rows += [{"step": 2, "eval/test/told_apart": None, "eval/val/told_apart": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [path.name for path in plots.plot(tmp_path, config)] == ["loss.png", "metrics.png"]
