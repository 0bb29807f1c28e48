"""Steps that are not finite, losses that jump, and the data that a rewind leaves out."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import build, built, by_path, random_batch, start, tiny

from bigmodel import config as config_lib
from bigmodel import log, train
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Train
from bigmodel.data import pipeline
from bigmodel.training import events
from bigmodel.training.divergence import Judge, Without

# -------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(dtype):
    keys = {"compute_dtype": dtype, "optim__ema_decay": 0.9, "optim__name": "adamw"}
    program = built("cnn", train__on_divergence="skip", **keys)
    batch = random_batch(program.config)
    bad = {**batch, "image": np.where(np.arange(8).reshape(8, 1, 1, 1) == 3, np.nan, batch["image"])}
    bad["image"] = bad["image"].astype(np.float32)
    state, _ = program.train_step(start(program), program.put(batch))
    before = jax.device_get(by_path(state))
    after, metrics = program.train_step(state, program.put(bad))
    assert metrics["skipped"].tolist() == [1, 1]
    for path, x in jax.device_get(by_path(after)).items():
        if path != "step" and not path.startswith("loss_scale"):
            np.testing.assert_array_equal(x, before[path], err_msg=path)
    assert int(after["step"]) == before["step"] + 1
    _, metrics = program.train_step(after, program.put(batch))
    assert metrics["skipped"].tolist() == [0, 1]
    assert np.isfinite(metrics["loss"]).all()


def test_a_good_step_is_the_same_whatever_a_bad_one_would_do():
    """And `stop` compiles no test for finite numbers."""
    programs = [built("cnn", train__on_divergence=how) for how in ("stop", "skip", "rewind")]
    texts = [program.lower().as_text() for program in programs]
    finite = [text.count("is_finite") for text in texts]
    assert finite[0] < finite[1]
    assert texts[1] == texts[2]
    plain = build(tiny("cnn", train__rewinds=9, train__bad_steps=9)).lower().as_text()
    assert texts[0] == plain
    batch = random_batch(programs[0].config)
    one, two = (program.train_step(start(program), program.put(batch))[0] for program in programs[:2])
    for path, x in by_path(one["params"]).items():
        np.testing.assert_array_equal(x, by_path(two["params"])[path], err_msg=path)
    assert "skipped" not in jax.eval_shape(programs[0].train_step, *_spec(programs[0]))[1]


def _spec(program):
    return program.state_spec, program.batch_spec


# -------------------------------------------------------------------------------------------- judgments


def losses_of(count: int, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return (4 * np.exp(-np.arange(count) / 200) + rng.standard_t(4, count) * 0.05 + 1).tolist()


def judged(keys: Train, losses: list[float], meta: dict | None = None, first: int = 1) -> list[str]:
    judge = Judge(keys, meta or {})
    return [judge.judge(step, x, bool(np.isfinite(x))) for step, x in enumerate(losses, first)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_with_heavy_tails_and_a_falling_loss_are_no_divergence(seed):
    assert "diverged" not in judged(Train("rewind"), losses_of(2000, seed))


def test_a_jump_that_stays_is_one_and_a_single_spike_is_not():
    losses = losses_of(200)
    losses[100] = 60.0
    assert judged(Train("rewind"), losses).count("spike") == 1
    verdicts = judged(Train("rewind"), losses_of(200) + [60.0] * 3)
    assert verdicts[-3:] == ["spike", "spike", "diverged"]
    assert set(judged(Train("rewind", spike=0), losses_of(200) + [60.0] * 9)) == {"good"}
    assert set(judged(Train("skip"), losses_of(200) + [60.0] * 9)) == {"good"}
    constant = judged(Train("rewind"), [1.0] * 50 + [1.0001] * 9 + [2.0] * 3)
    assert constant == ["good"] * 59 + ["spike", "spike", "diverged"]


def test_bad_steps_count_in_a_row_and_a_resumed_judge_goes_on():
    losses = [*losses_of(60), np.nan, np.nan, 1.0, np.nan, np.inf, np.nan]
    keys = Train("rewind")
    straight = judged(keys, losses)
    assert straight[-6:] == ["skipped", "skipped", "good", "skipped", "skipped", "diverged"]
    for cut in (10, 50, 61, 64, 65):
        judge = Judge(keys, {})
        first = [judge.judge(step, x, bool(np.isfinite(x))) for step, x in enumerate(losses[:cut], 1)]
        meta = json.loads(json.dumps(judge.meta()))
        assert first + judged(keys, losses[cut:], meta, cut + 1) == straight


def test_a_rewind_leaves_out_each_batch_once_and_no_other():
    """Also a second one to the same step, one to a later step, and one to an earlier step."""
    data = [f"batch {i}" for i in range(200)]
    judge = Judge(Train("rewind"), {})
    metas = {0: judge.meta(), 20: judge.meta()}
    assert judge.rewind(20, 26, metas[20]) == (20, 25)
    assert [Without(data, judge.windows)[i] for i in (19, 20, 21)] == ["batch 19", "batch 26", "batch 27"]
    assert judge.rewind(20, 24, metas[20]) == (20, 29)  # again, on batches 26 to 29
    assert [Without(data, judge.windows)[i] for i in (19, 20)] == ["batch 19", "batch 30"]
    metas[40] = judge.meta()
    assert judge.rewind(40, 42, metas[40]) == (50, 51)
    assert [Without(data, judge.windows)[i] for i in (19, 20, 39, 40)] == [
        "batch 19", "batch 30", "batch 49", "batch 52",
    ]  # fmt: skip
    assert judge.rewind(0, 41, metas[0]) == (0, 52)
    assert Without(data, judge.windows)[0] == "batch 53"
    assert judge.rewinds == 4


@pytest.mark.parametrize(
    ("saved", "bad", "to"),
    [
        ([5, 10, 15], 16, 10),  # 15 may be of the trouble already
        ([5, 10, 15], 18, 15),
        ([10], 11, 10),  # better than none
        ([5, 10, 13], 17, 10),  # a signal made 13
        ([20], 17, None),
        ([], 3, None),
    ],
)
def test_a_rewind_goes_to_a_regular_checkpoint_from_before(saved, bad, to):
    judge = Judge(Train("rewind"), {})
    judge.judge(bad, float("nan"), False)
    assert judge.target(saved, 5) == to


# ------------------------------------------------------------------------------------------------- runs


def spoil(monkeypatch: pytest.MonkeyPatch, bad: dict[int, float]) -> list[int]:
    """Multiplies the images of some training batches. -> the numbers of the batches read, as they come."""
    read, heard = pipeline.Pipeline.__getitem__, []

    def get(self: pipeline.Pipeline, step: int) -> dict[str, np.ndarray]:
        batch = read(self, step)
        if len(self) < 10**6:
            return batch
        heard.append(step)
        return {**batch, "image": batch["image"] * np.float32(bad.get(step, 1.0))}

    monkeypatch.setattr(pipeline.Pipeline, "__getitem__", get)
    return heard


def config_of(steps: int, how: str, **keys: object) -> config_lib.Config:
    return tiny(
        "cnn", steps=steps, log__every_steps=1, log__tensorboard=False, eval__batches=1,
        eval__every_steps=500,
        checkpoint__every_steps=5, checkpoint__keep=9, train__on_divergence=how, optim__schedule="constant",
        data__prefetch=1, **keys,
    )  # fmt: skip


def losses(path: pathlib.Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in log.read_metrics(path) if "train/loss" in row}


def digest(state: dict) -> dict[str, np.ndarray]:
    return jax.device_get(by_path(state))


def same(a: dict, b: dict) -> None:
    for path, x in digest(a).items():
        np.testing.assert_array_equal(x, digest(b)[path], err_msg=path)


def test_a_bad_batch_is_skipped_counted_and_its_update_made_up_for(tmp_path, monkeypatch):
    spoil(monkeypatch, {6: np.nan})
    with pytest.raises(train.NotFinite, match="step 7"):
        train.run(config_of(10, "stop"), tmp_path / "stop")
    result = train.run(config_of(10, "skip"), tmp_path / "skip")
    assert (result.exit_code, result.step) == (0, 11)
    assert sorted(losses(tmp_path / "skip")) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    row = log.read_metrics(tmp_path / "skip")[-2]
    assert row["train/skipped_steps"] == 1
    assert [each["step"] for each in events.read(tmp_path / "skip")] == [7]
    spoil(monkeypatch, dict.fromkeys(range(6, 20), np.nan))
    with pytest.raises(train.NotFinite, match=r"step 9: .*3 steps in a row"):
        train.run(config_of(10, "skip"), tmp_path / "row")


@pytest.mark.parametrize("factor", [np.nan, pytest.param(1e4, marks=pytest.mark.slow)])
def test_a_rewind_trains_what_a_run_without_those_batches_does(tmp_path, monkeypatch, factor):
    """A spike is finite: it is found by the losses before it."""
    keys = {"train__window": 20}
    spoil(monkeypatch, dict.fromkeys((31, 32, 33), factor))
    result = train.run(config_of(38, "rewind", **keys), tmp_path / "rewound")
    assert result.exit_code == 0
    (event,) = [each for each in events.read(tmp_path / "rewound") if each["event"] == "rewound"]
    assert (event["step"], event["to_step"], event["skip"]) == (34, 25, [25, 33])
    assert list(losses(tmp_path / "rewound")) == list(range(1, 39))
    assert log.read_metrics(tmp_path / "rewound")[-2]["train/rewinds"] == 1

    read = pipeline.Pipeline.__getitem__
    monkeypatch.setattr(
        pipeline.Pipeline, "__getitem__",
        lambda self, step: read(self, step + 9 * (step >= 25 and len(self) > 10**6)),
    )  # fmt: skip
    straight = train.run(config_of(38, "rewind", **keys), tmp_path / "straight")
    same(straight.state, result.state)
    assert losses(tmp_path / "straight") == losses(tmp_path / "rewound")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [12, 32, 27, 38])
def test_a_run_that_was_stopped_rewinds_as_one_that_was_not(tmp_path, monkeypatch, stop):
    """Before the bad steps, between them, after the rewind, and at a step with a checkpoint out of turn."""
    bad = dict.fromkeys((31, 32, 33), np.nan)
    config = config_of(40, "rewind")
    spoil(monkeypatch, bad)
    straight = train.run(config, tmp_path / "straight")
    train.run(config, tmp_path / "run", callbacks=[lambda event: event.kind == "log" and event.step == stop])
    resumed = train.run(config, tmp_path / "run")
    assert resumed.step == straight.step == 40
    same(straight.state, resumed.state)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.meta(40)["divergence"]["windows"] == [[25, 9]]


def test_after_so_many_rewinds_it_ends(tmp_path, monkeypatch):
    heard = spoil(monkeypatch, dict.fromkeys(range(11, 200), np.nan))
    with pytest.raises(train.NotFinite, match=r"after 2 rewinds \(train.rewinds\)"):
        train.run(config_of(40, "rewind", train__rewinds=2), tmp_path)
    assert [each["to_step"] for each in events.read(tmp_path) if each["event"] == "rewound"] == [5, 5]
    assert heard.count(5) == 1  # the first rewind left it out for good
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 5


def test_without_a_checkpoint_it_says_what_to_lower(tmp_path, monkeypatch):
    spoil(monkeypatch, dict.fromkeys((1, 2, 3), np.nan))
    with pytest.raises(train.NotFinite, match=r"no checkpoint to go back to: lower checkpoint\.every_steps"):
        train.run(config_of(40, "rewind"), tmp_path)
