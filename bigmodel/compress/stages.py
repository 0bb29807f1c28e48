"""Runs a recipe on a workdir: writes a smaller workdir and a report of every stage.

Everything is written to OUT.partial, which is renamed to OUT at the end, so bad input leaves OUT untouched.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from dataclasses import replace

from bigmodel import disk, log, train, workdir
from bigmodel.checkpoint import transfer
from bigmodel.compress import distill, prune, quantize, recipe, report, structure, trained
from bigmodel.compress.recipe import Stage, Step
from bigmodel.compress.trained import Trained
from bigmodel.config import Config, InputError

SEED_STRIDE = 100  # between two repetitions: each training step of a recipe takes the next seed


def run(
    directory: str | os.PathLike[str], stages: tuple[Stage, ...], out: str | os.PathLike[str], seed: int = -1
) -> list[report.Row]:
    """Runs the recipe on the run in `directory`; writes the workdir `out` with report.json and report.png.

    Only steps that train or calibrate need training data. Without held-out data there are no metrics and no
    picture.

    Args:
        seed: -1 for the run's own.

    Raises:
        InputError: `out` is not empty, there is no good checkpoint, or a step does not fit the model.
        train.NotFinite: training diverged.
    """
    log.show_logging()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(disk.new_directory(out, "--out"))
        scratch = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=made.parent, prefix=".stages-"))
        )
        model = trained.load(directory)
        check(model.config, stages)
        if seed >= 0:
            model = trained.changed(model, model.config.replace(seed=seed), model.params, model.rest)
        seed = model.config.seed
        rows, models = [report.describe("dense", model)], [model]
        for number, stage in enumerate(stages, 1):
            for index, step in enumerate(stage.steps):
                model = _apply(model, step, scratch / f"{number}-{index}", pathlib.Path(directory), seed)
            log.say(f"stage     {stage.name}")
            rows.append(report.describe(stage.name, model))
            models.append(model)
        report.time_all(rows, models)
        trained.save(model, made)
        workdir.write_json(made / "report.json", {"stages": rows})
        if rows[0]["metrics"]:
            report.draw(rows, made / "report.png")
    report.say(report.table(rows))
    return rows


def repeat(
    directory: str | os.PathLike[str], stages: tuple[Stage, ...], out: str | os.PathLike[str], times: int
) -> list[report.Row]:
    """Calls `run` `times` times with different seeds, into `out`/1, `out`/2 and so on.

    `out`/report.json gives the spread of each stage's metrics, and whether a stage differs from the one
    before. Raises as `run`.
    """
    first = workdir.read_config(pathlib.Path(directory)).seed
    with disk.new_directory(out, "--out") as made:
        runs = [
            run(directory, stages, made / str(number + 1), first + SEED_STRIDE * number)
            for number in range(times)
        ]
        rows = report.spread(runs)
        workdir.write_json(made / "report.json", {"runs": times, "stages": rows})
    report.say(report.spread_table(rows))
    return rows


def check(config: Config, stages: tuple[Stage, ...]) -> None:
    """Refuses a recipe that cannot end well, before its first stage spends hours.

    Args:
        config: the config of the run that is compressed.

    Raises:
        InputError: a quantized model is pruned or quantized again, the family has no such units, a student's
            config is wrong, or the chip has no such number format.
    """
    for stage in stages:
        for step in stage.steps:
            quantized = config.quantize.weights != "none" and not config.quantize.aware
            if quantized and isinstance(step, recipe.PruneStep | recipe.QuantizeStep):
                prunes = isinstance(step, recipe.PruneStep)
                fix = "prune it before" if prunes else "start from a run that is not quantized"
                raise InputError(
                    f"recipe stage {stage.name}: the model is {config.quantize.weights} already; {fix}"
                )
            if isinstance(step, recipe.QuantizeStep):
                quantize.check_chip(step)
                config = config.replace(quantize=quantize.settings(step))
            elif isinstance(step, recipe.PruneStep) and step.unit != "weights":
                structure.check(config.model, step.unit)
            elif isinstance(step, recipe.DistillStep) and step.student:
                config = distill.smaller(config, step.student)


def _apply(model: Trained, step: Step, scratch: pathlib.Path, teacher: pathlib.Path, seed: int) -> Trained:
    """Runs one step. Training uses `scratch` as its workdir. All new students begin with the same seed, so
    that stages can be compared."""
    if isinstance(step, recipe.QuantizeStep):
        if step.steps:
            model = tune(quantize.aware(model, step), step.steps, 0.0, scratch)
        return quantize.apply(model, step)
    if isinstance(step, recipe.FinetuneStep):
        return tune(model, step.steps, step.lr, scratch)
    if isinstance(step, recipe.DistillStep):
        student = distill.begin(model, step, _teacher(model, step, teacher, scratch), seed)
        return distill.end(tune(student, step.steps, distill.learning_rate(model, step), scratch))
    if step.unit != "weights":
        return structure.apply(model, step)
    if not step.steps:
        return prune.apply(model, step)
    model = tune(prune.scheduled(model, step), step.steps, 0.0, scratch)
    return prune.finished(model)


def _teacher(
    model: Trained, step: recipe.DistillStep, first: pathlib.Path, scratch: pathlib.Path
) -> pathlib.Path:
    """Returns the teacher's workdir; imports a directory in Hugging Face's layout next to `scratch`."""
    given = pathlib.Path(step.teacher) if step.teacher else first
    if (given / "checkpoints").is_dir() or not any(given.glob("*.safetensors")):
        return given
    made = scratch.with_name(f"{scratch.name}-teacher")
    transfer.import_pretrained(given, made, {"seq_len": model.config.seq_len})
    return made


def tune(model: Trained, steps: int, lr: float, scratch: pathlib.Path) -> Trained:
    """Trains on in a run of its own, with the next seed's data order.

    Args:
        lr: 0: a tenth of the config's.
    """
    old = model.config
    config = old.replace(
        seed=old.seed + 1, steps=steps, budget=0.0, optim=replace(old.optim, lr=lr or old.optim.lr / 10),
        log=replace(old.log, tensorboard=False), eval=replace(old.eval, every_steps=steps),
        checkpoint=replace(old.checkpoint, every_steps=steps),
    )  # fmt: skip
    trained.save(trained.changed(model, config, model.params, model.rest), scratch)
    result = train.run(config, scratch)
    if result.exit_code != train.DONE:  # stopped by a signal: half a stage is of no use
        raise SystemExit(result.exit_code)
    params = result.program.evaluated(result.state)
    return Trained(result.program, params, result.state["rest"], scratch, result.state, result.step)
