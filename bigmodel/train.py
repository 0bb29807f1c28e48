"""The training loop: plan, restore, step, log one step late, evaluate, save.

Exit codes (`Result.exit_code`, and what scripts/train.py exits with):
    0   done: `steps` steps are trained and saved
    2   bad input (InputError); nothing was overwritten
    3   the loss or the gradient is not finite (NotFinite); the last good checkpoint stays the newest
    4   the program compiled for this mesh is wrong (selfcheck.WrongProgram); no step was trained
    75  SIGTERM: the step was finished and saved; the same command resumes (EX_TEMPFAIL)
    130 Ctrl-C, likewise
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax

from bigmodel import data, disk, ending, evaluate, ledger, log, mesh, optim, selfcheck, units, workdir
from bigmodel.checkpoint import fingerprint, start
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config
from bigmodel.data import Pipeline, Prefetch
from bigmodel.ledger import Ledger, Window
from bigmodel.machines import chips
from bigmodel.machines.memory import ProcessMemory
from bigmodel.plan import estimate, fits, planner
from bigmodel.plan import receipt as receipts
from bigmodel.program import Program, State, steps_left

DONE, BAD_INPUT, NOT_FINITE, WRONG_PROGRAM = 0, 2, 3, 4
PREEMPTED, INTERRUPTED = ending.STOPPED, ending.INTERRUPTED
WEIGHED = 4  # the step whose memory is measured, after those that still grow the process for good


class NotFinite(RuntimeError):
    """The loss or the gradient became NaN or infinite. Nothing of that step was saved."""


@dataclass
class Result:
    """What a run left behind."""

    exit_code: int
    step: int
    metrics: dict[str, float]  # of the last evaluation, "eval/<split>/<metric>"
    workdir: pathlib.Path
    program: Program
    state: State = field(repr=False)


def run(
    config: Config,
    directory: str | os.PathLike[str],
    resume: start.Resume = "auto",
    *,
    force: bool = False,
    end: ending.Ending | None = None,
) -> Result:
    """Trains `config` in `directory`, on every device of the job; goes on from the newest checkpoint there.

    Every host of a multi-host job calls it alike.

    Args:
        resume: auto: if there is a checkpoint. must: fail if there is none. never: fail if there is a run.
        force: starts it even if it takes more memory than is free.
        end: hears of signals and of the job's other hosts; a script gives the one that may end its process.

    Raises:
        InputError: the config, the data, the devices and the directory do not fit together.
        NotFinite: training diverged.
        WrongProgram: the program compiled for this mesh computes another function than the model does.
    """
    spent = Ledger()
    log.show_logging()
    end = end or ending.Ending()
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
            train_data = data.make_pipeline(config, "train", path, **rows)
            eval_data = data.make_pipeline(config, "eval", path, **rows)
            start.agree_on_data(train_data, eval_data)
            the_program = planner.build_within_budget(config, the_mesh)
        return Run(the_program, path, train_data, eval_data, spent, end, force).train(stack)


@dataclass
class Run:
    """One run's parts, and the loop over them."""

    program: Program
    path: pathlib.Path
    train_data: Pipeline
    eval_data: Pipeline
    ledger: Ledger
    end: ending.Ending = field(default_factory=ending.Ending)
    force: bool = False

    def train(self, stack: contextlib.ExitStack) -> Result:
        config = self.program.config
        checkpoints = stack.enter_context(
            Checkpoints(
                self.path / "checkpoints",
                keep=config.checkpoint.keep,
                async_save=config.checkpoint.async_save,
            )
        )
        start.compare_with_last(self.program, self.path, checkpoints, self.train_data.fingerprint())
        self.train_data.keep_facts()
        # Compiled before any array exists: what the step takes is known then. A run that is done needs none.
        compiled = None if (checkpoints.latest() or 0) >= config.steps else self._compile()
        with self.ledger.timing("restore"):
            fits.check_granted(self.program)
            state = start.initial_state(self.program, self.path, checkpoints)
        first_step = int(state["step"])
        left = steps_left(config, state)
        if not left:
            log.say(f"done: {self.path} is at step {first_step:,} of {config.steps:,}; raise steps to go on")
            return Result(DONE, first_step, {}, self.path, self.program, state)
        compiled = compiled or self._compile()
        receipt = planner.of_run(self.program, compiled, left)
        log.say("\n".join(receipts.table(receipt)))
        found = self._check_gradient(state, receipt, first_step)
        before = self._write_start(receipt, first_step)
        if found is not None:
            selfcheck.refuse_wrong(found, config)
        writer = stack.enter_context(
            log.Writer(self.path, first_step=first_step, tensorboard=config.log.tensorboard)
        )
        loop = Loop(self, compiled, state, checkpoints, writer, receipt, before)
        loop.ends_at, loop.checked = first_step + left, found
        with disk.after(loop.write_ledger):
            return loop.run(first_step)

    def _compile(self) -> Any:
        """The train step. Raises InputError where this machine has no memory for it, or for the state."""
        if not self.force:
            fits.check_state(self.program)
        with self.ledger.timing("compile"):
            compiled = planner.compile_to_run(self.program)
        if not self.force:
            fits.check_step(self.program, compiled)
        return compiled

    def _check_gradient(
        self, state: State, receipt: receipts.Receipt, first_step: int
    ) -> selfcheck.Check | None:
        """Checks the gradient on this mesh, where that is due; the plan keeps what was found."""
        if not selfcheck.is_due(self.program.config, self.program.mesh):
            return None
        with self.ledger.timing("check"):
            found = selfcheck.check(self.program, state, self.train_data[first_step])
        log.say(found.line())
        receipt["gradient_check"] = dataclasses.asdict(found)
        return found

    def _write_start(self, receipt: receipts.Receipt, first_step: int) -> dict[str, Any]:
        """Writes the config and the plan. -> the ledger of the sessions before this one."""
        if first_step:
            log.say(f"resuming from step {first_step:,}")
        if jax.process_index() != 0:
            return {}
        workdir.write_config(self.path, self.program.config)
        plan = self.path / "plan.json"
        workdir.write_json(plan, receipts.add_up(workdir.read_json(plan), receipt, first_step))
        return workdir.read_json(self.path / "ledger.json")


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
        spent_before: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.run_, self.compiled, self.state = run, compiled, state
        self.spent_before = spent_before
        self.checkpoints, self.writer, self.receipt = checkpoints, writer, receipt
        self.config, self.ledger = run.program.config, run.ledger
        self.ends_at = self.config.steps  # or later, where float16's loss scale skips steps
        self.checked: selfcheck.Check | None = None  # compared with the first step
        self.pending: tuple[int, Any] | None = None
        self.window, self.memory = Window(), ProcessMemory()
        self.progress = log.Progress()
        self.eval_metrics: dict[str, float] = {}
        self.saved = -1

    def run(self, start: int) -> Result:
        run, step = self.run_, start
        batches = Prefetch(run.train_data, start, run.program.put, self.config.data.prefetch, run.end.stalled)
        with run.end.training():
            with self.progress, batches:
                self.window.reset()
                stopping = last = False
                for index, batch, wait_s in batches:
                    step = index + 1
                    with self._weighing(batch) if index == start + WEIGHED else contextlib.nullcontext():
                        self.step(step, batch, wait_s)
                    stopping = run.end.asked()
                    last = self._is_last(step) or stopping
                    if last or self._is_due(step):
                        stopping = self._pause(step, stopping) or stopping
                    if last or stopping:
                        break
                else:
                    stopping = run.end.stalled()
                if stopping and step < self.ends_at:
                    self._save_last(step)
            self.checkpoints.wait()
        self._finish(step)
        code = run.end.code if stopping and step < self.ends_at else DONE
        return Result(code, step, self.eval_metrics, run.path, run.program, self.state)

    def _is_due(self, step: int) -> bool:
        """Whether to evaluate or save after this step."""
        return step % self.config.eval.every_steps == 0 or step % self.config.checkpoint.every_steps == 0

    def _save_last(self, step: int) -> None:
        """Saves the step that the run stops at, if it is not saved yet."""
        self._read_pending()
        if self.saved != step and self.ledger.steps:
            self._save(step)

    def step(self, step: int, batch: Any, wait_s: float) -> None:
        """Trains step number `step`, the first being 1; its batch took `wait_s` seconds to wait for."""
        began = time.perf_counter()
        self.state, metrics = self.compiled(self.state, batch)
        self._read_pending()
        self.pending = (step, metrics)
        self.window.add(wait_s)
        self.ledger.steps += 1
        self.ledger.seconds["input"] += wait_s
        self.ledger.seconds["step"] += time.perf_counter() - began

    def _is_last(self, step: int) -> bool:
        """Whether all updates are made; where one may have been skipped, waits for the device to know."""
        if step >= self.ends_at:
            self.ends_at = step + steps_left(self.config, self.state)
        return step >= self.ends_at

    @contextlib.contextmanager
    def _weighing(self, batch: Any) -> Iterator[None]:
        """Measures the memory that one step takes, alone: twice, the device waits."""
        jax.block_until_ready(self.state)
        self.memory.begin(estimate.tree_bytes((self.state, batch)))
        yield
        jax.block_until_ready(self.state)
        self.memory.end()

    def _read_pending(self) -> None:
        """Waits for the step before; stops the run if it diverged; logs it if it is its turn."""
        if self.pending is None:
            return
        step, metrics = self.pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.pending = None
        # float16: an overflow that a smaller loss scale absorbs
        skipped = values.get("skipped", 0.0) > 0 and values["loss_scale"] > optim.LEAST_SCALE
        if not math.isfinite(values["loss"]) or not (skipped or math.isfinite(values["grad_norm"])):
            self.writer.write(step, {"train/loss": values["loss"], "train/grad_norm": values["grad_norm"]})
            self.checkpoints.wait()  # the save under way is of a step before this one
            kept = self.checkpoints.latest()
            raise NotFinite(
                f"step {step}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}; the "
                f"newest checkpoint is {'none' if kept is None else f'step {kept}'}; lower optim.lr, raise "
                "optim.warmup_steps, or set optim.clip_norm"
            )
        if self.checked is not None:
            selfcheck.refuse_other_step(self.checked, values, self.config)
            self.checked = None
        if step % self.config.log.every_steps == 0 or step >= self.ends_at:
            self._log(step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        step_s, wait_s = self.window.means()
        perf = {"step_time_s": step_s, "input_wait_s": wait_s}
        whole_s = step_s + wait_s
        unit = "tokens" if "tokens" in self.run_.program.batch_spec else "examples"
        per_s = self.receipt["tokens_per_step"] / whole_s
        perf[f"{unit}_per_s"] = per_s
        if (joules := self.ledger.joules()) is not None:
            perf["joules"] = joules
        peak = chips.peak_flops(self.run_.program.mesh.devices.flat[0], self.config.compute_dtype)
        mfu = ""
        if peak is not None:
            perf["mfu"] = (
                self.receipt["model_flops_per_step"] / whole_s / (peak * self.run_.program.mesh.size)
            )
            mfu = f"  MFU {perf['mfu']:.1%}"
        train = {f"train/{name}": value for name, value in values.items()}
        self.writer.write(step, train | {f"perf/{name}": value for name, value in perf.items()})
        eta = units.duration((self.ends_at - step) * whole_s)
        waiting = f"  input {wait_s / whole_s:.0%}" if wait_s > 0.05 * whole_s else ""
        self.progress.show(
            f"step {step:,}/{self.ends_at:,}  loss {values['loss']:.4f}  "
            f"{units.quantity(per_s)}{unit}/s{mfu}{waiting}  ETA {eta}"
        )
        self.window.reset()

    def _pause(self, step: int, stopping: bool) -> bool:
        """Saves and evaluates; the metrics of the step are read first, so that no diverged state is saved.

        -> whether the run was asked to stop meanwhile: an evaluation is then given up."""
        began = time.perf_counter()
        self._read_pending()
        self.ledger.seconds["step"] += time.perf_counter() - began
        last = step >= self.ends_at or stopping
        if last or step % self.config.checkpoint.every_steps == 0:
            self._save(step)
        if not stopping and (last or step % self.config.eval.every_steps == 0):
            with self.ledger.timing("eval"):
                stopping = not self._evaluate(step)
        self.window.reset()
        return stopping

    def _save(self, step: int) -> None:
        with self.ledger.timing("checkpoint"):
            meta = fingerprint.of(self.config, self.run_.train_data.fingerprint())
            self.checkpoints.save(step, self.state, meta)
        self.saved = step
        self.write_ledger()

    def write_ledger(self) -> None:
        """What this run has spent so far, all its sessions together. Raises InputError."""
        if jax.process_index() == 0:
            report = self.ledger.report(self.receipt["model_flops_per_step"])
            workdir.write_json(self.run_.path / "ledger.json", ledger.add_up(self.spent_before, report))

    def _evaluate(self, step: int) -> bool:
        """-> whether it came to its end, and was not given up."""
        run = self.run_
        try:
            values = evaluate.run(run.program, self.state, run.eval_data, stop=run.end.asked)
        except evaluate.GivenUp:
            log.say(f"eval      step {step:,}  given up")
            return False
        split = self.config.data.eval_split
        self.eval_metrics = {f"eval/{split}/{name}": value for name, value in values.items()}
        self.writer.write(step, self.eval_metrics)
        for name, image in evaluate.shown(run.program, self.state, run.eval_data).items():
            self.writer.picture(step, name, image)
        log.say(
            f"eval      step {step:,}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        )
        return True

    def _measured(self, report: dict[str, Any]) -> dict[str, tuple[float, str]]:
        """What the receipt planned, as it was, and how it was had."""
        the_mesh, hosts = self.run_.program.mesh, jax.process_count()
        stats = the_mesh.local_devices[0].memory_stats() or {}
        peak = (float(stats.get("peak_bytes_in_use", 0)), "of a device, by its allocator")
        return {
            "step_s": (report["step_s"] or 0.0, "mean"),
            "peak_bytes": peak if peak[0] else (self.memory.peak_bytes, "as a step made the process grow"),
            "state_bytes": (float(estimate.tree_bytes(self.state)), "of the live arrays"),
            "model_flops_per_step": (
                estimate.executed_flops(self.compiled.as_text() or "", the_mesh.size),
                "matrix products of the compiled program, the optimizer's and what is computed again too",
            ),
            "step_j": (report.get("step_j", 0.0) * hosts, report.get("joules_from", "")),
        }

    def _finish(self, step: int) -> None:
        """Says what was spent beside what was planned, and draws the curve."""
        report = self.ledger.report(self.receipt["model_flops_per_step"])
        log.say(f"spent     {units.duration(report['total_s'])}, {report['goodput']:.0%} in training steps")
        for line in receipts.compare(self.receipt, self._measured(report)):
            log.say(f"          {line}")
        if step:
            log.say(f"saved     step {step:,} in {self.run_.path}")
        if jax.process_index() == 0:
            log.plot_loss(self.run_.path)
