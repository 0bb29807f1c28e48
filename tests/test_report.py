"""The page of a run or a study: its numbers are the files', and no file can break it."""

from __future__ import annotations

import json
import math
import pathlib
import re
import time
from typing import Any

import chromium
import numpy as np
import pytest
from conftest import run_script, tiny

from bigmodel import disk, train
from bigmodel.config import Config, InputError
from bigmodel.study import page as pages
from bigmodel.study import report, thinned

BUCKETS = {
    "start": 1.5,
    "compile": 2.25,
    "restore": 0.25,
    "step": 5.0,
    "input": 0.125,
    "eval": 0.5,
    "other": 0.375,
}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fe"
    "a735818e0000000049454e44ae426082"
)


def session(began: float, steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "began_at": began, "total_s": 10.0, "seconds": BUCKETS, "goodput": 0.5, "steps": steps,
        "model_flops": 2e9 * steps, "step_s": 5.0 / steps, "joules": 120.0, "step_j": 60.0 / steps,
        "joules_from": "measured: RAPL", **changes,
    }  # fmt: skip


def plan(steps: int) -> dict[str, Any]:
    return {
        "unit": "tokens", "tokens_per_step": 512, "model_flops_per_step": 2e9, "steps": steps, "total_s": 4.0,
        "total_flops": 2e9 * steps, "step_s": 4.0 / steps, "peak_bytes": 3 << 20, "params_bytes": 1 << 20,
        "optimizer_bytes": 1 << 20, "batch_bytes": 4096, "temporary_bytes": (1 << 20) - 4096, "kwh": 1e-4,
        "dollars": 0.5, "chip_hours": 0.25, "parameters": 262144, "devices": 1, "device_kind": "cpu",
        "limited_by": "matrix products", "time_source": "calibrated",
        "assumptions": {"pue": "1.1: a large data center"}, "versions": {"jax": "0.10.2"},
        "sessions": [{"first_step": 0, "steps": steps, "total_s": 4.0, "total_flops": 2e9 * steps,
                      "made_at": "2026-12-01T00:00:00Z", "command": "python scripts/train.py --config=x"}],
    }  # fmt: skip


def workdir(
    path: pathlib.Path, steps: int = 200, *, lr: float = 0.01, seed: int = 0, **config: Any
) -> pathlib.Path:
    """Makes the files of a finished run that trained nothing."""
    path.mkdir(parents=True)
    keys = {
        "seed": seed,
        "steps": steps,
        "model": {"name": "gpt"},
        "optim": {"lr": lr},
        "task": {"name": "lm"},
    }
    disk.write_json(path / "config.json", {**keys, "data": {"name": "python_source"}, **config})
    disk.write_json(path / "plan.json", plan(steps))
    one = session(1000.0, steps)
    measured = {"peak_bytes": [float(4 << 20), "growth of the process in one step"]}
    disk.write_json(path / "ledger.json", {**one, "measured": measured, "sessions": [one]})
    noise = np.random.default_rng(seed).normal(size=steps + 1)
    lines = []
    for step in range(1, steps + 1):
        loss = 1 + 3 * math.exp(-step * lr) + 0.02 * float(noise[step])
        row = {"train/loss": loss, "train/lr": lr, "perf/tokens_per_s": 100.0 + step}
        lines.append({"step": step, "time": 1002.0 + 5 * step / steps, **row})
        if step % 50 == 0:
            lines.append({"step": step, "time": 1002.0 + 5 * step / steps, "eval/test/loss": loss + 0.1})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def page(*sources: pathlib.Path, **options: Any) -> tuple[dict[str, Any], str]:
    """-> the numbers embedded in the page, and its HTML without Plotly."""
    html = pages.render(report.collect(sources, report.Options(**options)))
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1]), re.sub(r'(?<=id="library">)[^<]*', "", html)


def lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def cells(html: str, head: str) -> list[str]:
    """The cells of the row of a table that begins with `head`."""
    row = re.search(rf'<tr[^>]*><th scope="row">{re.escape(head)}</th>(.*?)</tr>', html, re.DOTALL)
    assert row is not None, head
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1], re.DOTALL)


# ------------------------------------------------------------------------------------- numbers are the files'


def test_the_page_of_a_real_run_has_the_numbers_of_its_files(run_of_a_few_steps):
    path = run_of_a_few_steps
    data, html = page(path)
    (run,) = data["runs"]
    rows = lines_of(path)
    for name in {name for row in rows for name in row} - {"step", "time"}:
        logged = [(row["step"], row[name]) for row in rows if name in row]
        curve = run["curves"][name]
        assert [(run["steps"][at], y) for at, y in zip(curve["at"], curve["y"], strict=True)] == logged
    ledger, receipt = (json.loads((path / name).read_text()) for name in ("ledger.json", "plan.json"))
    assert run["spent_s"] == ledger["seconds"]
    assert run["axes"]["tokens"]["per_step"] == receipt["tokens_per_step"]
    assert run["axes"]["flops"]["per_step"] * run["steps"][-1] == ledger["model_flops"]
    assert data["table"]["rows"][0]["values"]["total_s"] == ledger["total_s"]
    assert data["table"]["rows"][0]["values"]["goodput"] == ledger["goodput"]
    planned, measured, off, _ = cells(html, "a step")
    assert (planned, measured) == tuple(pages.text(x["step_s"], "seconds") for x in (receipt, ledger))
    assert off == pages.text(receipt["step_s"] / ledger["step_s"] - 1, "error")
    peak = ledger["measured"]["peak_bytes"]
    assert cells(html, "memory at the peak")[1:4:2] == [pages.text(peak[0], "bytes"), peak[1]]
    # The clock counts from the start of the session, which waited for the compiler first.
    seconds = [s for s in run["seconds"] if s is not None]
    assert seconds == sorted(seconds)
    assert ledger["seconds"]["compile"] < seconds[-1] <= ledger["total_s"] + 0.01
    assert ledger["sessions"][0]["ended"] == "done"
    assert data["table"]["rows"][0]["state"] == "complete"
    assert receipt["versions"]["jax"] in html
    assert receipt["sessions"][0]["command"]


def few_steps() -> Config:
    return tiny("mlp", data__name="digits", steps=8, log__every_steps=1, eval__every_steps=4, eval__batches=2)


@pytest.fixture(scope="module")
def run_of_a_few_steps(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    train.run(few_steps(), path, at_end=report.write_at_end)
    return path


def test_a_run_that_ends_has_its_page(run_of_a_few_steps):
    html = (run_of_a_few_steps / "report.html").read_text()
    assert "Planned beside measured" in html
    assert 'id="library">H4sI' in html  # gzip in base64


def test_an_error_that_ends_a_run_is_on_its_page_and_a_fault_of_the_page_does_not_hide_it(tmp_path, capsys):
    def explode(event: train.Event) -> None:
        raise train.NotFinite(f"step {event.step}: the loss is <nan>")

    for path in (tmp_path / "a", tmp_path / "b"):
        if path.name == "b":
            (path / "report.html").mkdir(parents=True)
        with pytest.raises(train.NotFinite, match="step 1: the loss is <nan>"):
            train.run(few_steps(), path, callbacks=[explode], at_end=report.write_at_end)
    html = (tmp_path / "a" / "report.html").read_text()
    assert "NotFinite: step 1: the loss is &lt;nan&gt;" in html
    said = capsys.readouterr().out
    assert said.count("report.html is not written") == 1
    assert (tmp_path / "b" / "ledger.json").exists()


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    path = workdir(tmp_path / "run")
    (path / "report.html").mkdir()
    report.write_at_end(path)
    report.write_at_end(tmp_path / "none")
    assert len(caplog.records) == 2
    assert all("report.html is not written" in each.getMessage() for each in caplog.records)


def test_tokens_flops_time_and_dollars_are_those_of_plan_and_ledger(tmp_path):
    path = workdir(tmp_path / "run")
    data, _ = page(path)
    (run,) = data["runs"]
    last = run["curves"]["eval/test/loss"]["at"][-1]
    assert run["axes"]["tokens"] == {"label": "tokens", "per_step": 512}
    assert run["steps"][last] * run["axes"]["flops"]["per_step"] == 2e9 * 200
    assert run["seconds"][last] == 1007.0 - 1000.0
    # Half a dollar was planned for 4 s of steps; 10 s have passed.
    assert data["table"]["rows"][0]["values"]["dollars"] == pytest.approx(0.5 / 4 * 10)
    assert run["dollars_per_s"] == 0.5 / 4
    assert data["table"]["rows"][0]["values"]["kwh"] == pytest.approx(120 / 3.6e6 * 1.1)
    priced, _ = page(path, dollars_per_chip_hour=8.0)
    assert priced["table"]["rows"][0]["values"]["dollars"] == pytest.approx(0.25 * 8 / 4 * 10)
    ledger = json.loads((path / "ledger.json").read_text())
    disk.write_json(path / "ledger.json", ledger | {"dollars": 3.0, "kwh": 0.5, "chip_hours": 2.0})
    data, html = page(path)
    assert {"dollars": 3.0, "kwh": 0.5}.items() <= data["table"]["rows"][0]["values"].items()
    assert data["runs"][0]["dollars_per_s"] == 3.0 / 10
    assert cells(html, "cost in all")[1] == "$3.00"
    assert page(path, dollars_per_chip_hour=8.0)[0]["table"]["rows"][0]["values"]["dollars"] == 16.0


def test_the_clock_stops_between_sessions(tmp_path):
    path = workdir(tmp_path / "run")
    two = [session(1000.0, 100), session(5000.0, 100)]
    disk.write_json(path / "ledger.json", {**two[1], "total_s": 20.0, "sessions": two})
    rows = [
        {"step": s, "time": t, "train/loss": 1.0} for s, t in ((50, 1004.0), (100, 1009.0), (150, 5003.0))
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page(path)[0]["runs"][0]["seconds"] == [4.0, 9.0, 13.0]
    old = [{k: v for k, v in each.items() if k != "began_at"} for each in two]
    disk.write_json(path / "ledger.json", {**old[1], "sessions": old})
    (run,) = page(path)[0]["runs"]
    assert run["seconds"] == [0.0, 5.0, 3999.0]
    assert "pauses included" in run["since"]


def test_the_state_of_a_run_is_that_of_its_newest_session(tmp_path):
    def state(**changes: Any) -> str:
        path = workdir(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        one = session(1_800_000_000.0, 100, **changes)
        disk.write_json(path / "ledger.json", {**one, "sessions": [one]})
        disk.write_json(path / "plan.json", plan(400) | {"made_at": made_at})
        return report.collect([path]).states[0]

    made_at = "2027-01-15T08:00:01Z"  # 1,800,000,001: the session's own plan
    assert state(ended="done") == "complete"  # by eval.patience, say
    assert state(ended="stopped by a signal (75)") == state() == "step 200 of 400"
    made_at = "2027-01-15T08:00:11Z"  # it has ended, and a newer one has planned
    assert state(ended="done") == "step 200 of 400"


def test_totals_are_compared_with_the_plan_only_where_they_count_the_same_steps(tmp_path):
    path = workdir(tmp_path / "run")
    assert cells(page(path)[1], "time in steps")[2] == "-20.0%"
    disk.write_json(path / "ledger.json", {**session(1000.0, 50), "sessions": [session(1000.0, 50)]})
    html = page(path)[1]
    assert cells(html, "time in steps")[2] == "-"
    assert cells(html, "a step")[2] == "-80.0%"


# --------------------------------------------------------------------------------------------- thinned curves


@pytest.mark.parametrize("count", [1, 9, 10, 11, 57, 1000])
def test_thinned_curves_lose_neither_the_mean_nor_a_spike(count):
    y = np.random.default_rng(count).normal(size=count)
    rows = [{"step": n, "time": 0.0, "loss": float(value)} for n, value in enumerate(y)]
    curve = thinned.curves(rows, 10)["loss"]
    points = len(curve["at"])
    assert points == min(count, 10)
    assert (curve["at"][0], curve["at"][-1]) == (0, count - 1)
    assert (curve["y"][0], curve["y"][-1]) == (y[0], y[-1])
    sizes = np.diff([-1, *curve["at"]])
    np.testing.assert_allclose(np.dot(sizes, curve["y"]) / count, y.mean(), atol=1e-12)
    assert min(curve.get("low", curve["y"])) == y.min()
    assert max(curve.get("high", curve["y"])) == y.max()
    assert curve.get("lines_per_point", 1) >= sizes[1:-1].max(initial=1)


def test_values_that_are_not_finite_are_gaps_and_counted():
    values = [1.0, None, math.nan, math.inf, 2.0, 10**400, True, "x"]
    rows = [{"step": n, "loss": value} for n, value in enumerate(values)]
    curve = thinned.curves(rows, 100)["loss"]
    assert curve["y"] == [1.0, None, None, None, 2.0, None]
    assert (curve["lines"], curve["not_finite"], curve["not_finite_at"]) == (6, 4, [1, 2, 3, 5])
    huge = [{"step": n, "loss": 1e308 if n % 2 else 0.1} for n in range(1000)] + [
        {"step": 1000, "lr": 0.1}
    ] * 1000
    found = thinned.curves(huge, 10)
    assert set(found["lr"]["y"]) == {0.1}  # no mean of equal values that rounds
    assert all(y is not None for y in found["loss"]["y"])
    many = [{"step": n, "loss": None if n % 2 else 1.0} for n in range(1000)]
    assert set(thinned.curves(many, 10)["loss"]["y"][:-1]) == {1.0}


def test_a_long_log_is_thinned_within_bounds_and_says_so(tmp_path):
    path = workdir(tmp_path / "run")
    rows = [
        json.dumps({"step": n, "time": float(n), "train/loss": 1.0 + (n == 77_777)}) for n in range(100_000)
    ]
    (path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    data, _ = page(path)
    curve = data["runs"][0]["curves"]["train/loss"]
    assert len(curve["at"]) == pages.POINTS
    assert max(curve["high"]) == 2.0
    assert curve["lines"] == 100_000
    began = time.perf_counter()
    report.write_at_end(path)
    assert time.perf_counter() - began < 5  # 0.5 s on two idle cores
    assert "one line in 5 of the others" in (path / "report.html").read_text()


# ----------------------------------------------------------------------------------- files of every condition


def damaged(path: pathlib.Path) -> None:
    for name in ("config.json", "plan.json", "ledger.json", "evaluation.json"):
        (path / name).write_bytes(b'{"seconds": [1, ')
    (path / "metrics.jsonl").write_bytes(
        b'\xff\xfe{"step"\n[1]\n{"step": 3, "time": 1, "train/loss": NaN}\n{"step": 4'
    )
    (path / "events.jsonl").write_bytes(b'{"time": 1, "host": 0, "event": "restart"}\nnot JSON\n')
    for name in ("samples", "pictures", "evaluation", "checkpoints"):
        (path / name).mkdir()
    (path / "samples" / "0000003.txt").write_bytes(b"\xff\x00text")
    (path / "evaluation" / "roc.png").write_bytes(PNG[:30])


def of_other_types(path: pathlib.Path) -> None:
    odd = [None, "x", [1], {"a": 1}, True, 1e308, "NaN"]
    for name in ("config.json", "plan.json", "ledger.json", "evaluation.json"):
        values = json.loads((path / name).read_text()) if (path / name).exists() else {"accuracy": 1}
        (path / name).write_text(json.dumps({key: odd[n % len(odd)] for n, key in enumerate(values)}))
    (path / "metrics.jsonl").write_text(
        '{"step": -1, "time": "x", "a": {}, "b/c": 1e400, "": 1}\n{"step": 5, "time": null}\n'
    )


def resumed(path: pathlib.Path) -> None:
    rows = [
        {"step": s, "time": 1000.0 + n, "train/loss": float(n)}
        for n, s in enumerate((10, 20, 30, 20, 30, 40))
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def killed(path: pathlib.Path) -> None:
    for name in ("ledger.json", "plan.json"):
        (path / name).unlink()
    content = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(content[: len(content) // 2])


def empty(path: pathlib.Path) -> None:
    for each in path.iterdir():
        each.unlink()
    (path / "metrics.jsonl").write_bytes(b"")


def diverged(path: pathlib.Path) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "time": 1010.0, "train/loss": null, "train/grad_norm": null}\n')


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (
            damaged,
            ["config.json is not JSON", "damaged in lines 1, 2", "roc.png is damaged", "1 damaged lines"],
        ),
        (of_other_types, []),
        (resumed, ["2 lines of metrics.jsonl are of steps that were trained again"]),
        (killed, ["step 100 of 200"]),
        (empty, ["config.json is missing", "no step was logged"]),
        (diverged, ["diverged"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_of_every_condition_give_a_page_alone_and_beside_a_sound_run(condition, said, tmp_path):
    path, sound = workdir(tmp_path / "run"), workdir(tmp_path / "sound", seed=1)
    condition(path)
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    for sources in ((path,), (path, sound)):
        data, html = page(*sources)
        assert len(data["runs"]) == len(sources)
        assert not [words for words in said if words not in html]
    assert before == {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    if condition is resumed:
        curve = page(path)[0]["runs"][0]["curves"]["train/loss"]
        assert curve["y"] == [0.0, 3.0, 4.0, 5.0]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def test_text_of_a_run_is_never_markup(tmp_path):
    path = workdir(tmp_path / "<img src=x onerror=alert(3)>", extra={EVIL: EVIL})
    (path / "samples").mkdir()
    (path / "samples" / "0000050.txt").write_text(EVIL)
    disk.write_json(path / "evaluation.json", {EVIL: EVIL})
    disk.write_json(path / "plan.json", plan(200) | {"limited_by": EVIL, "versions": {EVIL: EVIL}})
    (path / "events.jsonl").write_text(
        json.dumps({"time": EVIL, "host": EVIL, "event": EVIL, EVIL: EVIL}) + "\n"
    )
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 201, "time": 1.0, EVIL: 1.0, "train/" + EVIL: None}) + "\n")
    data, html = page(path, workdir(tmp_path / "other"))
    assert EVIL in data["runs"][0]["curves"]  # as it is, where it is data
    rest = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)  # the page's own, last
    assert "<img" not in html
    assert "alert(1)</script>" not in html
    assert rest.count("<script") == rest.count("</script>") == 2  # data and library
    assert html.count("<script>") == 1


# ----------------------------------------------------------------------------------------------- several runs


def test_runs_are_ranked_and_compared_over_seeds_by_their_own_files(tmp_path):
    from bigmodel.study import compare

    for lr in (0.01, 0.03):
        for seed in range(3):
            workdir(tmp_path / "study" / f"lr={lr},seed={seed}", lr=lr, seed=seed)
    data, html = page(tmp_path / "study")
    assert data["table"]["settings"] == ["seed", "optim.lr"]
    finals = [
        ({"seed": str(seed), "optim.lr": str(lr)}, lines_of(tmp_path / "study" / f"lr={lr},seed={seed}")[-1])
        for lr in (0.01, 0.03)
        for seed in range(3)
    ]
    expected = compare.groups([(settings, row["eval/test/loss"]) for settings, row in finals])
    assert [each["values"]["metric"] for each in data["table"]["rows"]] == [
        row["eval/test/loss"] for _, row in finals
    ]
    for found, group in zip(data["groups"], expected, strict=True):
        assert (found["mean"], found["p"], found["values"]) == (group.mean, group.p, list(group.values))
        assert tuple(found["interval"]) == group.interval
    assert "differs from the best" in html
    assert (data["metric"], data["maximize"]) == ("eval/test/loss", False)
    assert page(tmp_path / "study", metric="perf/tokens_per_s")[0]["maximize"] is True
    with pytest.raises(InputError, match="--metric=nope is in no run; choose one of train/loss"):
        page(tmp_path / "study", metric="nope")


def test_a_study_has_its_states_and_metric_from_its_storage(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory = tmp_path / "study"
    workdir(directory / "lr=0.01", lr=0.01)
    made = optuna.create_study(study_name="study", storage=f"sqlite:///{directory}/study.db")
    made.set_user_attr("definition", {"metric": "perf/tokens_per_s", "maximize": True})
    for name, value in (("lr=0.01", "0.01"), ("lr=0.5", "0.5")):
        made.enqueue_trial({}, user_attrs={"name": name, "settings": {"optim.lr": value}})
    trial = made.ask()
    trial.set_user_attr("state", "pruned")
    data, html = page(directory)
    assert (data["metric"], data["maximize"]) == ("perf/tokens_per_s", True)
    assert data["table"]["rows"][0]["state"] == "pruned"
    assert data["table"]["rows"][0]["values"]["optim.lr"] == "0.01"
    assert "1 trials have not begun: lr=0.5" in html
    report.write_at_end(directory, made)
    assert "pruned" in (directory / "report.html").read_text()
    (directory / "study.db").write_bytes(b"no database")
    assert "storage cannot be read" in page(directory)[1]


def test_runs_of_one_name_are_told_apart_and_read_once(tmp_path):
    a, b = workdir(tmp_path / "a" / "run"), workdir(tmp_path / "b" / "run")
    data, _ = page(a, b, a)
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]


# ------------------------------------------------------------------------------------------------- the script


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    done = run_script("report.py", str(workdir(tmp_path / "run")), f"--out={tmp_path}/page.html")
    assert done.code == 0, done.err
    assert (tmp_path / "page.html").stat().st_size < 3 << 20
    with pytest.raises(InputError, match="none has neither a run nor runs inside"):
        page(tmp_path / "none")
    for flags, said in (
        ([str(tmp_path / "run"), f"--out={tmp_path}"], "is a directory; name a file"),
        ([str(tmp_path / "run"), "--assume=pue=2"], "takes dollars_per_chip_hour alone"),
    ):
        done = run_script("report.py", *flags)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert said in done.err


LENGTHS = "[...document.querySelectorAll('#curves .scatterlayer path.js-line')].map(p => p.getTotalLength())"
CHOOSE = """new Promise(done => {
    document.getElementById("axis").value = "AXIS";
    document.getElementById("smoothing").value = 0.5;
    document.getElementById("axis").dispatchEvent(new Event("input"));
    requestAnimationFrame(() => setTimeout(done, 50));
})"""


@pytest.mark.slow
@pytest.mark.skipif(chromium.found() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page_at_every_size_without_a_network(scheme, tmp_path):
    path = workdir(tmp_path / "<b>evil</b> & run", 3000)
    with (path / "metrics.jsonl").open("a") as file:
        for step in (3001, 3002):
            row = {"step": step, "time": step - 1993.0, f"train/{EVIL}": float(step), "train/loss": None}
            file.write(json.dumps(row) + "\n")
    for lr in (0.01, 0.03, 0.1):
        for seed in range(4):
            workdir(tmp_path / "study" / f"lr={lr},seed={seed}", lr=lr, seed=seed)
    report.save(report.collect([path]), tmp_path / "run.html")
    report.save(report.collect([tmp_path / "study"]), tmp_path / "study.html")
    with chromium.tab(tmp_path / "profile") as tab:
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        tab.call("Emulation.setEmulatedMedia", features=media)
        for name in ("run", "study"):
            for width, height in ((390, 844), (1024, 768), (1920, 1080)):
                tab.resize(width, height, phone=width < 500)
                tab.open(tmp_path / f"{name}.html")
                assert tab.value("document.documentElement.dataset.failed ?? ''") == ""
                assert tab.value("document.documentElement.scrollWidth") <= width
                assert tab.value("document.querySelectorAll('.panel .js-plotly-plot').length") >= 3
                assert min(tab.value(LENGTHS)) > 50
                tab.value("for (const id of ['logx', 'logy']) document.getElementById(id).click()")
                for axis in tab.value("[...document.getElementById('axis').options].map(o => o.value)"):
                    tab.value(CHOOSE.replace("AXIS", axis))
                    assert min(tab.value(LENGTHS)) > 10, axis
                tab.screenshot(tmp_path / f"{name}-{width}-{scheme}.png")
                if name == "study":
                    assert tab.value("document.querySelectorAll('#parcoords canvas').length") > 0
                    assert (
                        tab.value("document.querySelector('#parcoords').textContent").count("optim.lr") == 1
                    )
                assert not tab.complaints()
                assert not tab.requests()
                assert tab.value("document.querySelectorAll('script').length") == 4  # and Plotly
            pdf = tab.pdf()
            assert pdf.startswith(b"%PDF")
            assert len(pdf) > 20_000
        order = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[2].dataset.v)"
        tab.value("document.querySelectorAll('#runs thead button')[2].click()")
        assert tab.value(order) == [str(seed) for seed in range(4) for _ in range(3)]
        lines = "document.querySelectorAll('#curves .panel:first-child path.js-line').length"
        assert tab.value(lines) == 2 * 12  # as logged and smoothed
        tab.value("document.querySelector('#runs tbody input').click()")
        assert tab.value(lines) == 2 * 11
