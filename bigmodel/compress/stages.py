"""A workdir and a recipe -> a smaller workdir, and a report of every stage.

Everything is made in OUT.partial, which takes OUT's name when all is done: bad input leaves OUT untouched.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import replace

from bigmodel import log, train, workdir
from bigmodel.checkpoint import transfer
from bigmodel.compress import distill, prune, quantize, recipe, report, structure, trained
from bigmodel.compress.recipe import Op, Stage
from bigmodel.compress.trained import Trained
from bigmodel.config import InputError

SEEDS_APART = 100  # those of two repetitions: each training step of a recipe takes the next one


def run(
    directory: str | os.PathLike[str], stages: tuple[Stage, ...], out: str | os.PathLike[str], seed: int = -1
) -> list[report.Row]:
    """Takes the run in `directory` through the recipe; writes `out`, report.json and report.png in it.

    Training data are needed by what trains or calibrates alone; without held-out data there are no metrics,
    and no picture of them.

    Args:
        seed: of what is random in it; -1: the run's own.

    Raises:
        InputError: `out` holds something, there is no good checkpoint, or a step does not fit the model.
        train.NotFinite: training diverged.
    """
    log.show_logging()
    with _made_whole(out) as scratch:
        model = trained.load(directory)
        if seed >= 0:
            model = trained.changed(model, model.config.replace(seed=seed), model.params, model.rest)
        seed = model.config.seed
        rows, models = [report.describe("dense", model)], [model]
        for number, stage in enumerate(stages, 1):
            for index, op in enumerate(stage.ops):
                model = _apply(model, op, scratch / f"{number}-{index}", pathlib.Path(directory), seed)
            log.say(f"stage     {stage.name}")
            rows.append(report.describe(stage.name, model))
            models.append(model)
        report.time_all(rows, models)
        made = scratch / "made"
        trained.save(model, made)
        workdir.write_json(made / "report.json", {"stages": rows})
        if rows[0]["metrics"]:
            report.draw(rows, made / "report.png")
    report.say(report.table(rows))
    return rows


def repeat(
    directory: str | os.PathLike[str], stages: tuple[Stage, ...], out: str | os.PathLike[str], times: int
) -> list[report.Row]:
    """`run`, so often, into `out`/1, `out`/2 ..., with seeds of their own, and `out`/report.json, which says
    how far they spread and whether a stage differs from the one before. Raises as `run`."""
    first = workdir.read_config(pathlib.Path(directory)).seed
    with _made_whole(out) as scratch:
        made = scratch / "made"
        runs = [
            run(directory, stages, made / str(number + 1), first + SEEDS_APART * number)
            for number in range(times)
        ]
        rows = report.spread(runs)
        workdir.write_json(made / "report.json", {"runs": times, "stages": rows})
    report.say(report.spread_table(rows))
    return rows


@contextlib.contextmanager
def _made_whole(out: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A scratch directory; what is then in its `made` takes the name `out` if nothing is raised.

    Raises:
        InputError: `out` holds something or cannot be written.
    """
    target = pathlib.Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--out={target} exists and is not an empty directory; choose a new one")
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out={target}: {error.strerror}; choose a directory you can write") from error
    try:
        yield scratch
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / "made", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _apply(model: Trained, op: Op, scratch: pathlib.Path, teacher: pathlib.Path, seed: int) -> Trained:
    """One step of a stage. What trains does so in `scratch`, a workdir of its own. New students begin with
    the same seed, so that their stages can be compared."""
    if isinstance(op, recipe.Quantize):
        if op.steps:
            model = tune(quantize.aware(model, op), op.steps, 0.0, scratch)
        return quantize.apply(model, op)
    if isinstance(op, recipe.Finetune):
        return tune(model, op.steps, op.lr, scratch)
    if isinstance(op, recipe.Distill):
        student = distill.begin(model, op, _teacher(model, op, teacher, scratch), seed)
        return distill.end(tune(student, op.steps, distill.learning_rate(model, op), scratch))
    if op.unit != "weights":
        return structure.apply(model, op)
    if not op.steps:
        return prune.apply(model, op)
    model = tune(prune.scheduled(model, op), op.steps, 0.0, scratch)
    return prune.finished(model)


def _teacher(model: Trained, op: recipe.Distill, first: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The teacher's workdir; one is made in `scratch` of a directory in Hugging Face's layout."""
    given = pathlib.Path(op.teacher) if op.teacher else first
    if (given / "checkpoints").is_dir() or not any(given.glob("*.safetensors")):
        return given
    made = scratch.with_name(f"{scratch.name}-teacher")
    transfer.import_pretrained(given, made, {"seq_len": model.config.seq_len})
    return made


def tune(model: Trained, steps: int, lr: float, scratch: pathlib.Path) -> Trained:
    """Trains on: a run of its own, in the order of another seed.

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
    if result.exit_code != train.DONE:  # stopped by a signal: half a training is no stage
        raise SystemExit(result.exit_code)
    params = result.program.evaluated(result.state)
    return Trained(result.program, params, result.state["rest"], scratch, result.state, result.step)
