"""Trains a config in a directory: plan, restore, then the loop of bigmodel/training/loop.py.

Exit codes (`Result.exit_code`, and what scripts/train.py exits with):
    0   done: `steps` steps are trained and saved, or eval.patience, a callback or the budget ended the run
    2   bad input (InputError); nothing was overwritten
    3   the loss or the gradient is not finite (NotFinite); the last good checkpoint stays the newest
    4   the program compiled for this mesh is wrong (selfcheck.WrongProgram); no step was trained
    75  SIGTERM: the step was finished and saved; the same command resumes (EX_TEMPFAIL)
    130 Ctrl-C, likewise
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bigmodel import config as config_lib
from bigmodel import disk, ledger, log, mesh, preview, selfcheck, tasks, workdir
from bigmodel.checkpoint import best as best_lib
from bigmodel.checkpoint import fingerprint, start
from bigmodel.checkpoint.best import Best
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config
from bigmodel.ledger import Ledger
from bigmodel.metrics import Sums
from bigmodel.plan import fits, planner
from bigmodel.plan import receipt as receipts
from bigmodel.program import State, steps_left
from bigmodel.training import ending, events, spending, tracking
from bigmodel.training.divergence import Judge, Without
from bigmodel.training.loop import Loop
from bigmodel.training.records import Callback, Event, NotFinite, Result, Run

__all__ = ["Callback", "Event", "Loop", "NotFinite", "Result", "Run", "run"]

DONE, BAD_INPUT, NOT_FINITE, WRONG_PROGRAM = 0, 2, 3, 4
PREEMPTED, INTERRUPTED = ending.STOPPED, ending.INTERRUPTED


def run(
    config: Config,
    directory: str | os.PathLike[str],
    resume: start.Resume = "auto",
    *,
    force: bool = False,
    end: ending.Ending | None = None,
    callbacks: Sequence[Callback] = (),
    at_end: Callable[[pathlib.Path], object] = bool,
) -> Result:
    """Trains `config` in `directory`, on every device of the job; goes on from the newest checkpoint there.

    Every host of a multi-host job calls it alike.

    Args:
        resume: auto: if there is a checkpoint. must: fail if there is none. never: fail if there is a run.
        force: starts it even if it takes more memory than is free.
        end: hears of signals and of the job's other hosts; a script gives the one that may end its process.
        callbacks: called, in order, on every host, after each line of the log, evaluation and checkpoint.
        at_end: called with the directory on the first host when training has ended, even by an error.

    Raises:
        InputError: the config, the data, the devices and the directory do not fit together.
        NotFinite: training diverged.
        WrongProgram: the program compiled for this mesh computes another function than the model does.
    """
    end = end or ending.Ending()
    beat = end.heartbeat
    spent = Ledger(beat.phase, waited_s=beat.waited_s, started_s=time.perf_counter() - beat.began)
    log.show_logging()
    mesh.join_cluster()
    end.join()
    with contextlib.ExitStack() as stack:
        stack.enter_context(fits.reporting())
        first = jax.process_index() == 0
        path = stack.enter_context(workdir.claim(directory)) if first else workdir.local(directory)
        with spent.timing("start"):
            start.agree(config, path, resume)
            the_mesh = mesh.make_mesh(config)
            spent.watch(the_mesh.local_devices)
            rows = mesh.host_rows(the_mesh, config.batch_size)
            with log.doing(f"data      reading {config.data.name}"):
                config = tasks.sized(config, path, last=start.last_config(path), say=log.say)
                train_data = tasks.make_pipeline(config, "train", path, **rows)
                eval_data = {
                    name: tasks.make_pipeline(each, "eval", path, **rows)
                    for name, each in config_lib.eval_sets(config).items()
                }
                start.agree_on_data(train_data, *eval_data.values())
            log.say(preview.division(config, train_data, eval_data))
            newest = start.newest_step(path) or 0
            before = _spent_before(path, newest) if first else {}
            known = spending.Start(
                last=start.last_config(path), newest=newest, before=before,
                data=train_data, evaluated=sum(map(len, eval_data.values())), ledger=spent, force=force,
            )  # fmt: skip
            the_program = spending.build(known, config, the_mesh)
        the_run = Run(the_program, path, train_data, eval_data, spent, end, callbacks, at_end)
        return _train(the_run, stack, before, force)


def _train(run: Run, stack: contextlib.ExitStack, before: dict[str, Any], force: bool) -> Result:
    config = run.program.config
    tracking.check(config)
    checkpoints = stack.enter_context(
        Checkpoints(
            run.path / "checkpoints",
            keep=config.checkpoint.keep,
            async_save=config.checkpoint.async_save,
        )
    )
    start.compare_with_last(run.program, run.path, checkpoints, run.train_data.fingerprint())
    run.train_data.keep_facts()
    newest = checkpoints.latest() or 0
    best = best_lib.resumed(config.checkpoint.best, run.path, newest, checkpoints.steps())
    checkpoints.best = best.step
    _check_best(run, best)
    enough = 0 < config.eval.patience <= best.since
    used_up = spending.is_used_up(config, before)
    # Compiled before any array exists: what the step takes is known then. A run that is done needs none.
    compiled = None if newest >= config.steps or enough or used_up else _compile(run, force)
    with (
        run.ledger.timing("restore"),
        log.doing(f"start     {'reading a checkpoint' if newest else 'making the first state'}"),
    ):
        fits.check_granted(run.program)
        state = start.initial_state(run.program, run.path, checkpoints)
    first_step = int(state["step"])
    left = steps_left(config, state)
    if not left or enough or used_up:
        key = "eval.patience" if enough and left else "budget" if config.budget else "steps"
        log.say(f"done: {run.path} is at step {first_step:,} of {config.steps:,}; raise {key} to go on")
        values = log.last_evaluation(run.path)
        return Result(DONE, first_step, values, run.path, run.program, state, best.step)
    compiled = compiled or _compile(run, force)
    with log.doing("plan      measuring this machine"):
        receipt = planner.of_run(run.program, compiled, left)
    log.say("\n".join(receipts.table(receipt)))
    run.end.heartbeat.planned_s = receipt["step_s"]
    meta = checkpoints.meta(first_step) if first_step else {}
    judge = Judge(config.train, meta)
    data = Without(run.train_data, judge.windows)
    checked = _check_gradient(run, state, receipt, lambda: data[first_step])
    spends = spending.Spending(config, before, run.ledger, run.program.mesh)
    _write_start(run, receipt, first_step)
    if checked is not None:
        selfcheck.refuse_wrong(checked, config)
    tracker = None
    if jax.process_index() == 0:
        with run.ledger.timing("start"):
            tracker = stack.enter_context(tracking.tracking(config, run.path))
    writer = stack.enter_context(
        log.Writer(run.path, first_step=first_step, tensorboard=config.log.tensorboard, tracker=tracker)
    )
    loop = Loop(run, compiled, state, checkpoints, writer, receipt, spending=spends)
    loop.ends_at, loop.checked, loop.best, loop.judge = first_step + left, checked, best, judge
    loop.sums = Sums(meta.get("interval"))
    if jax.process_index() == 0:
        stack.callback(run.at_end, run.path)
    with disk.after(loop.end_ledger):
        return loop.run(first_step)


def _spent_before(path: pathlib.Path, newest: int) -> dict[str, Any]:
    """Returns ledger.json of the earlier sessions; what the newest checkpoint lacks is wasted."""
    rows = log.read_metrics(path)
    ends = [each for each in events.read(path) if each["event"] == "ended" and each["host"] == 0]
    step = max((row["step"] for row in rows), default=0)
    times = [each["time"] for each in ends if each.get("step")] + [
        row["time"] for row in rows if "time" in row
    ]
    return ledger.lose(workdir.read_json(path / "ledger.json"), newest, (max(times), step) if times else None)


def _check_best(run: Run, best: Best) -> None:
    """Raises InputError where `checkpoint.best` is no metric that evaluations of this run have."""
    task = run.program.task
    if not best.metric:
        return
    batch = next(iter(run.eval_data.values())).spec()
    found = dict.fromkeys(jax.eval_shape(run.program.eval_step, run.program.state_spec, batch), 1.0)
    names = [*found, *task.derived(found), *task.over_all_names]
    best.check([f"eval/{data_set}/{name}" for data_set in run.eval_data for name in names])


def _compile(run: Run, force: bool) -> Any:
    """The train step. Raises InputError where this machine has no memory for it, or for the state."""
    if not force:
        fits.check_state(run.program)
    with run.ledger.timing("compile"), log.doing("compile   the train step"):
        compiled = planner.compile_to_run(run.program)
    if not force:
        fits.check_step(run.program, compiled)
    return compiled


def _check_gradient(
    run: Run, state: State, receipt: receipts.Receipt, read: Callable[[], Any]
) -> selfcheck.Check | None:
    """Checks the gradient on this mesh, where that is due; the plan keeps what was found.

    Args:
        read: gives the batch of the first step.
    """
    if not selfcheck.is_due(run.program.config, run.program.mesh):
        return None
    with run.ledger.timing("check"), log.doing("check     the gradient on this mesh"):
        found = selfcheck.check(run.program, state, read())
    log.say(found.line())
    receipt["gradient_check"] = dataclasses.asdict(found)
    return found


def _write_start(run: Run, receipt: receipts.Receipt, first_step: int) -> None:
    """Writes the config and the plan."""
    if first_step:
        log.say(f"resuming from step {first_step:,}")
    if jax.process_index() != 0:
        return
    workdir.write_config(run.path, run.program.config)
    plan = run.path / "plan.json"
    receipt |= {"command": shlex.join(["python", *sys.orig_argv[1:]]), "versions": fingerprint.versions()}
    workdir.write_json(plan, receipts.add_up(workdir.read_json(plan), receipt, first_step))
