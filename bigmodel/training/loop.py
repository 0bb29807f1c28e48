"""The loop: step, log one step late, evaluate, save."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import jax

from bigmodel import evaluate, ledger, log, optim, selfcheck, units, workdir
from bigmodel.checkpoint import best as best_lib
from bigmodel.checkpoint import fingerprint
from bigmodel.checkpoint.best import Best
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.data import Pipeline, Prefetch
from bigmodel.infer.samples import Samples
from bigmodel.ledger import Window
from bigmodel.machines import chips
from bigmodel.machines.memory import ProcessMemory
from bigmodel.metrics import Sums
from bigmodel.plan import estimate
from bigmodel.plan import receipt as receipts
from bigmodel.program import State, steps_left
from bigmodel.training import divergence, events, measured, plots
from bigmodel.training.divergence import Diverged, Judge
from bigmodel.training.records import Event, NotFinite, Result, Run, filled
from bigmodel.training.spending import Spending

SCHEDULED = r"lr(_\w+)?|loss_scale"  # metrics of a step that are settings
COUNTED_S = 10.0  # how often a run with a budget writes its ledger
WEIGHED = 4  # the step whose memory is measured, after those that still grow the process for good


class Loop:
    """The steps of one run. Metrics are read one step late, so that the device never waits for the host."""

    def __init__(
        self,
        run: Run,
        compiled: jax.stages.Compiled,
        state: State,
        checkpoints: Checkpoints,
        writer: log.Writer,
        receipt: receipts.Receipt,
        *,
        spending: Spending | None = None,
    ) -> None:
        self.run_, self.compiled, self.state = run, compiled, state
        self.spending = spending or Spending(run.program.config, {}, run.ledger, run.program.mesh)
        self.spending.evaluated = sum(map(len, run.eval_data.values()))
        self.checkpoints, self.writer, self.receipt = checkpoints, writer, receipt
        self.config, self.ledger = run.program.config, run.ledger
        self.ends_at = self.config.steps  # or later, where float16's loss scale skips steps
        self.checked: selfcheck.Check | None = None  # compared with the first step
        self.pending: tuple[int, Any] | None = None
        self.sums = Sums()  # of the steps since the last line of the log
        self.window, self.memory = Window(), ProcessMemory()
        self.progress = log.Progress()
        self.eval_metrics: dict[str, float] = {}
        self.best = Best(self.config.checkpoint.best)
        self.judge = Judge(self.config.train, {})
        self.samples: Samples | None = None
        self.enough = False  # the run ends early: by eval.patience, a callback or its budget
        self.counted = time.monotonic()
        self.saved = -1
        self.first_step = self.last_step = 0  # of this session
        self.filled = filled(run)
        self.ended: dict[str, Any] = {}  # for ledger.json: how the session ended, and what was measured

    def run(self, start: int) -> Result:
        run, step, stopping = self.run_, start, False
        self.first_step = self.last_step = start
        self.write_ledger()  # a run that is killed before its first checkpoint has spent this
        with run.end.training():
            with self.progress:
                while True:
                    try:
                        step, stopping = self._train(step)
                        if (stopping or self.enough) and step < self.ends_at:
                            self._save_last(step)
                        break
                    except Diverged as found:
                        step = self._rewind(found.step, found.values)
            self.checkpoints.wait()
        self._finish(step)
        code = run.end.code if stopping and step < self.ends_at else 0
        self.ended["ended"] = f"stopped by a signal ({code})" if code else "done"
        return Result(code, step, self.eval_metrics, run.path, run.program, self.state, self.best.step)

    def _train(self, start: int) -> tuple[int, bool]:
        """Trains from step `start` on. -> (the last step, true if the run has to stop there)."""
        run, step = self.run_, start
        stopping = last = False
        data = divergence.Without(run.train_data, self.judge.windows)
        with Prefetch(data, start, run.program.put, self.config.data.prefetch, run.end.stalled) as batches:
            self.window.reset()
            for index, batch, wait_s in batches:
                step = index + 1
                with self._weighing(batch) if index == start + WEIGHED else contextlib.nullcontext():
                    self.step(step, batch, wait_s)
                stopping = run.end.should_stop()
                self._compare_with_budget(step)
                last = self._is_last(step) or stopping or self.enough
                if last or self._is_due(step):
                    stopping = self._pause(step, stopping) or stopping
                if last or stopping or self.enough:
                    break
            else:
                stopping = run.end.stalled()
        return step, stopping

    def _is_due(self, step: int) -> bool:
        """Returns true when this step is followed by an evaluation or a checkpoint."""
        return step % self.config.eval.every_steps == 0 or step % self.config.checkpoint.every_steps == 0

    def _save_last(self, step: int) -> None:
        """Saves the step that the run stops at, if it is not saved yet."""
        self._read_pending()
        if self.saved != step and self.ledger.steps:
            self._save(step)

    def step(self, step: int, batch: Any, wait_s: float) -> None:
        """Trains step number `step` (from 1), whose batch took `wait_s` seconds to arrive."""
        began = time.perf_counter()
        self.state, metrics = self.compiled(self.state, batch)
        self._read_pending()
        self.pending = (step, metrics)
        self.window.add(wait_s)
        self.ledger.steps += 1
        self.last_step = step
        self.ledger.seconds["input"] += wait_s
        self.ledger.seconds["step"] += time.perf_counter() - began

    def _is_last(self, step: int) -> bool:
        """Returns true when all updates are made; waits for the device where float16 may have skipped one."""
        if step >= self.ends_at:
            self.ends_at = step + steps_left(self.config, self.state)
        return step >= self.ends_at

    @contextlib.contextmanager
    def _weighing(self, batch: Any) -> Iterator[None]:
        """Measures the memory of one step, which runs alone: the device is idle before and after it."""
        jax.block_until_ready(self.state)
        self.memory.begin(estimate.tree_bytes((self.state, batch)))
        yield
        jax.block_until_ready(self.state)
        self.memory.end()

    def _read_pending(self) -> None:
        """Waits for the previous step, stops the run if it diverged, and logs it when a line is due."""
        if self.pending is None:
            return
        step, metrics = self.pending
        pairs = {name: pair.tolist() for name, pair in jax.device_get(metrics).items()}
        self.pending = None
        values = {"loss": 0.0} | {name: total / weight for name, (total, weight) in pairs.items() if weight}
        # float16: an overflow that a smaller loss scale removes
        overflow = values.get("skipped", 0.0) > 0 and values.get("loss_scale", 0.0) > optim.LEAST_SCALE
        finite = math.isfinite(values["loss"]) and (overflow or math.isfinite(values["grad_norm"]))
        self._judge(step, values, finite)
        if not finite:
            pairs = {"skipped": pairs["skipped"]}
        elif overflow:
            del pairs["grad_norm"]  # infinite
        self.sums.add_read(pairs)
        if self.checked is not None and finite:
            selfcheck.refuse_other_step(self.checked, values, self.config)
            self.checked = None
        if step % self.config.log.every_steps == 0 or step >= self.ends_at:
            # Learning rates are logged as they are, all else as the mean since the last line.
            now = {name: value for name, value in values.items() if re.fullmatch(SCHEDULED, name)}
            self._log(step, self.sums.means() | now)
            self.sums = Sums()
        elif self.ledger.steps == 1:
            self.progress.show(f"step {step:,}/{self.ends_at:,}  loss {values['loss']:.4f}")

    def _judge(self, step: int, values: Mapping[str, float], finite: bool) -> None:
        """Does what `train.on_divergence` says about a step. Raises NotFinite, or Diverged for a rewind."""
        if not self.judge.is_on:
            if not finite:
                self._refuse(step, values)
            return
        verdict = self.judge.judge(step, values["loss"], finite)
        if not finite:
            about = {"loss": str(values["loss"]), "grad_norm": str(values.get("grad_norm"))}
            self._note("skipped", step=step, **about)
        if verdict == "diverged":
            if self.config.train.on_divergence == "rewind":
                raise Diverged(step, values)
            self._refuse(step, values, f"{self.config.train.bad_steps} steps in a row are not finite; ")

    def _rewind(self, step: int, values: Mapping[str, float]) -> int:
        """Goes back to a checkpoint, whose step it returns, and leaves out the data up to step `step`.

        Raises:
            NotFinite: there were `train.rewinds` before, or there is no checkpoint to go back to.
        """
        keys, judge = self.config.train, self.judge
        self.pending = None
        self.checkpoints.wait()
        to = judge.target(self.checkpoints.steps(), self.config.checkpoint.every_steps)
        if judge.rewinds >= keys.rewinds:
            self._refuse(step, values, f"after {judge.rewinds} rewinds (train.rewinds); ")
        if to is None:
            self._refuse(step, values, "no checkpoint to go back to: lower checkpoint.every_steps; ")
        self.state = {}  # frees the memory for the other one
        with self.ledger.timing("restore"):
            self.state, meta, _ = self.checkpoints.restore(self.run_.program.state_spec, to)
            self.checkpoints.remove_after(to)
        if self.ledger.waste(step - to):
            self.spending.sessions = ledger.lose(self.spending.sessions, to)
        self.last_step = to
        first, last = judge.rewind(to, step, meta)
        why = f"the loss was {values['loss']:.6g} after {keys.bad_steps} bad steps"
        log.say(f"rewind    from step {step:,} to {to:,}: {why}; batches {first:,} to {last:,} are left out")
        self._note("rewound", step=step, to_step=to, why=why, skip=[first, last])
        self.writer.rewind(to)
        self.best = best_lib.resumed(
            self.config.checkpoint.best, self.run_.path, to, self.checkpoints.steps()
        )
        self.checkpoints.best = self.best.step
        self.sums, self.saved, self.ends_at = Sums(meta.get("interval")), to, self.config.steps
        self.ends_at = to + steps_left(self.config, self.state)
        return to

    def _note(self, event: str, **fields: Any) -> None:
        if jax.process_index() == 0:
            events.append(self.run_.path, 0, event, **fields)

    def _refuse(self, step: int, values: Mapping[str, float], why: str = "") -> NoReturn:
        """Raises NotFinite."""
        self.writer.write(step, {"train/loss": values["loss"], "train/grad_norm": values["grad_norm"]})
        self.checkpoints.wait()  # a save in progress is of an earlier step
        newest = self.checkpoints.latest()
        raise NotFinite(
            f"step {step}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}; {why}the "
            f"newest checkpoint is {'none' if newest is None else f'step {newest}'}; lower optim.lr, raise "
            "optim.warmup_steps, or set optim.clip_norm"
        )

    def _log(self, step: int, values: dict[str, float]) -> None:
        step_s, wait_s = self.window.means()
        perf = {"step_time_s": step_s, "input_wait_s": wait_s}
        perf["goodput"] = self.ledger.goodput(self.spending.sessions)
        total_s = step_s + wait_s
        unit = "tokens" if "tokens" in self.run_.program.batch_spec else "examples"
        per_s = self.receipt["tokens_per_step"] * self.filled / total_s
        perf[f"{unit}_per_s"] = per_s
        if (joules := self.ledger.joules()) is not None:
            perf["joules"] = joules
        peak = chips.chip(self.run_.program.mesh.devices.flat[0]).flops.get(self.config.compute_dtype)
        mfu = ""
        if peak is not None:
            perf["mfu"] = (
                self.receipt["model_flops_per_step"] / total_s / (peak * self.run_.program.mesh.size)
            )
            mfu = f"  MFU {perf['mfu']:.1%}"
        row = {f"train/{name}": value for name, value in values.items()}
        row |= {f"perf/{name}": value for name, value in perf.items()}
        if self.judge.is_on:
            row |= {"train/skipped_steps": self.judge.skipped, "train/rewinds": self.judge.rewinds}
        if self.config.log.maxtext_names:
            size = self.run_.program.mesh.size
            row |= ledger.maxtext(row, self.receipt["model_flops_per_step"] / size, size)
        self.writer.write(step, row)
        eta = units.duration((self.ends_at - step) * total_s)
        waiting = f"  input {wait_s / total_s:.0%}" if wait_s > 0.05 * total_s else ""
        self.progress.show(
            f"step {step:,}/{self.ends_at:,}  loss {values.get('loss', math.nan):.4f}  "
            f"{units.quantity(per_s)}{unit}/s{mfu}{waiting}  ETA {eta}"
        )
        self._call("log", step, row)
        self.window.reset()

    def _call(self, kind: Literal["log", "eval", "save"], step: int, metrics: Mapping[str, float]) -> None:
        if not self.run_.callbacks:
            return
        began = time.perf_counter()
        state = None if kind == "log" else self.state
        event = Event(kind, step, MappingProxyType(dict(metrics)), self.run_.program, state)
        for callback in self.run_.callbacks:
            self.enough |= callback(event) is True
        spent_s = time.perf_counter() - began
        self.ledger.seconds["callbacks"] += spent_s
        if kind == "log":  # which happens within a step
            self.ledger.seconds["step"] -= spent_s

    def _pause(self, step: int, stopping: bool) -> bool:
        """Saves and evaluates. Reads the step's metrics first, so that no diverged state is saved.

        Returns true when a signal came meanwhile and the evaluation was given up."""
        began = time.perf_counter()
        self._read_pending()
        self.ledger.seconds["step"] += time.perf_counter() - began
        ending = time.perf_counter()
        last = step >= self.ends_at or stopping or self.enough
        if last or step % self.config.checkpoint.every_steps == 0:
            self._save(step)
        if not stopping and (last or step % self.config.eval.every_steps == 0):
            with self.ledger.timing("eval"):
                stopping = not self._evaluate(step)
            if not stopping:
                self._compare_with_best(step)
                self._call("eval", step, self.eval_metrics)
        self.spending.ending_s = max(self.spending.ending_s, time.perf_counter() - ending)
        self.window.reset()
        return stopping

    def _save(self, step: int) -> None:
        with self.ledger.timing("checkpoint"):
            meta = fingerprint.of(self.config, self.run_.train_data.fingerprint())
            meta |= {"interval": self.sums.pairs} | self.judge.meta()
            self.checkpoints.save(step, self.state, meta)
        self.saved = step
        self.write_ledger()
        self._call("save", step, {})

    def write_ledger(self) -> None:
        """Writes ledger.json: what all sessions of this run have spent so far. Raises InputError."""
        if jax.process_index() == 0:
            report = self.ledger.report(self.receipt["model_flops_per_step"])
            report |= {"first_step": self.first_step, "last_step": self.last_step}
            report |= self.spending.price(report)
            added = ledger.add_up(self.spending.sessions, report | self.ended)
            workdir.write_json(self.run_.path / "ledger.json", added)

    def end_ledger(self) -> None:
        """Writes ledger.json for the last time, with how the session ended. Raises InputError."""
        if (error := sys.exception()) is not None:
            self.ended["ended"] = f"{type(error).__name__}: {error}"
        self.write_ledger()

    def _evaluate(self, step: int) -> bool:
        """Evaluates on every set. Returns false when a signal ended it."""
        run = self.run_
        found: dict[str, float] = {}
        for name, pipeline in run.eval_data.items():
            try:
                values = evaluate.run(run.program, self.state, pipeline, stop=run.end.should_stop)
            except evaluate.GivenUp:
                log.say(f"eval      step {step:,}  given up")
                return False
            found |= {f"eval/{name}/{key}": value for key, value in values.items()}
            title = f"{name}  " if len(run.eval_data) > 1 else ""
            line = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
            log.say(f"eval      step {step:,}  {title}{line}")
        self.eval_metrics = found
        self.writer.write(step, found)
        first = next(iter(run.eval_data.values()))
        for name, image in evaluate.draw(run.program, self.state, first).items():
            self.writer.picture(step, name, image)
        self._write_samples(step, first)
        return True

    def _compare_with_best(self, step: int) -> None:
        """Saves a best step; ends the run after `eval.patience` evaluations without one."""
        best, patience = self.best, self.config.eval.patience
        if not best.metric:
            return
        if best.add(step, self.eval_metrics.get(best.metric)):
            self.checkpoints.best = step
            if self.saved != step:
                self._save(step)
        elif 0 < patience <= best.since:
            log.say(f"stopped   {best.metric} did not improve in {best.since} evaluations (eval.patience)")
            self.enough = True

    def _compare_with_budget(self, step: int) -> None:
        """Ends the run where its budget is spent; several hosts look at each line of the log alone."""
        if self.spending.cap is None or (jax.process_count() > 1 and step % self.config.log.every_steps):
            return
        if time.monotonic() - self.counted > COUNTED_S:  # a run that is killed has spent what it has spent
            self.write_ledger()
            self.counted = time.monotonic()
        if step < self.ends_at and self.spending.is_spent(sum(self.window.means())):
            log.say(f"budget    {self.spending.cap} is spent at step {step:,} of {self.ends_at:,}")
            self.enough = True

    def _write_samples(self, step: int, pipeline: Pipeline) -> None:
        if not self.config.eval.samples:
            return
        if self.samples is None:
            self.samples = Samples(self.run_.program, pipeline, self.config.eval.samples, self.run_.path)
        texts = self.samples.draw(self.state)
        self.writer.text(step, "samples", [f"{prompt} >>> {answer}" for prompt, answer in texts])
        log.say(f"sample    {texts[0].prompt!r:.60} >>> {texts[0].answer!r:.100}")

    def _finish(self, step: int) -> None:
        """Prints what was spent against what was planned, and draws the curves."""
        report = self.ledger.report(self.receipt["model_flops_per_step"])
        log.say(f"spent     {units.duration(report['total_s'])}, {report['goodput']:.0%} in training steps")
        if self.spending.cap is not None:
            log.say(f"          {self.spending.line()}")
        found = measured.of(self.run_.program, self.compiled, self.state, self.memory, report)
        self.ended["measured"] = {key: list(pair) for key, pair in found.items()}
        for line in receipts.compare(self.receipt, found):
            log.say(f"          {line}")
        if step:
            log.say(f"saved     step {step:,} in {self.run_.path}")
        if self.best.step is not None:
            log.say(f"best      step {self.best.step:,} in {self.best.metric} {self.best.value:.4f}")
        if jax.process_index() == 0:
            plots.plot(self.run_.path, self.config)
