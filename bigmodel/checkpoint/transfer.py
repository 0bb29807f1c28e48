"""Parameters from elsewhere: another run's workdir, or Hugging Face's files; and back to safetensors.

`load` fills a new run's state and reports what became of each array; `import_pretrained` makes a workdir that
evaluation, generation and training take; `export_safetensors` writes one out.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bigmodel import config as config_lib
from bigmodel import data, disk, huggingface, models, optim, tasks, trees, workdir
from bigmodel.checkpoint import parameters
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import MLM, Config, InputError
from bigmodel.data import backends, fitted, generation, tokenizer_files
from bigmodel.data import pretrained as tokens
from bigmodel.data.tokenizer_files import ORIGIN, TOKENIZER
from bigmodel.huggingface import Layout, Pretrained
from bigmodel.models.module import Definition
from bigmodel.program import Program, State

Arrays = dict[str, Any]  # by path, "blocks/attention/q/kernel": parameters and statistics
# Files of an import that its export puts back as they were, beside a tokenizer's own.
ORIGIN_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.model",
                "spiece.model")  # fmt: skip
log = logging.getLogger("bigmodel")

# Keys of config.model that may differ from the source's: what they change is shapes, or nothing that is
# stored. Any other one would give the same arrays another meaning.
FREE = {
    "vocab_size", "num_classes", "head", "pooler", "token_types", "tie_embeddings", "dropout", "scan",
    "attention_block", "balance_loss", "router_z_loss", "capacity_factor", "aux", "stem",
}  # fmt: skip


class Report(NamedTuple):
    """The fate of each array: `loaded`, `skipped` and `new` hold the run's paths, `left` the source's."""

    source: str
    loaded: list[str]
    skipped: dict[str, str]  # path -> why; it starts out as the run's seed has it
    new: list[str]
    left: list[str]
    untrained: list[str]  # skipped or new, and frozen: random for ever

    def lines(self) -> list[str]:
        counts = f"{len(self.loaded)} arrays loaded, {len(self.skipped)} skipped, {len(self.new)} new"
        out = [f"init      from {self.source}: {counts}"]
        out += [f"          skipped {path}: {why}" for path, why in self.skipped.items()]
        out += [f"          new     {path}" for path in self.new if not path.startswith("lora/")]
        out += [f"          not used: {_some(self.left)}"] if self.left else []
        fix = "they stay random; see optim.freeze and lora.train"
        return out + (
            [f"          frozen, but not loaded: {_some(self.untrained)}; {fix}"] if self.untrained else []
        )


# ---------------------------------------------------------------------------------------------- loading


def load(program: Program, state: State, directory: str, skip: str = "") -> tuple[State, Report]:
    """Puts the parameters and statistics of `directory` into a state at step 0.

    A table of positions that is longer there gives its first rows.

    Args:
        directory: a workdir, or one in Hugging Face's layout.
        skip: regex on paths, such as "/head/kernel"; what it finds stays as it is. "": nothing.

    Raises:
        InputError: nothing is there, nothing fits, or config.model would read the arrays in another way.
    """
    config, arrays = read(directory, program.config)
    _check_model(config, program.config, directory)
    report = Report(str(directory), [], {}, [], [], [])
    new: dict[str, Any] = {}
    for part in ("params", "rest"):

        def take(path: Any, x: jax.Array) -> jax.Array:
            name = trees.path_str(path)
            value = _fitting(name, x, arrays, skip, report)
            return x if value is None else _placed(value.astype(x.dtype), x.sharding)

        new[part] = jax.tree_util.tree_map_with_path(take, state[part])
    if not report.loaded:
        raise InputError(f"init.from={directory} has no array that fits this model; check it, and init.skip")
    report.left.extend(sorted(arrays.keys() - set(report.loaded) - report.skipped.keys()))
    trained, frozen = optim.split(program.config, new["params"])
    report.untrained.extend(sorted(trees.by_path(frozen).keys() - set(report.loaded)))
    if "ema" in state:
        new["ema"] = jax.tree.map(lambda p: p.astype("float32"), trained)
    # A CPU's arrays may lie on the numpy arrays they were made of, and on each other's: a step that is given
    # their memory (donation) would write into it. Copies lie on their own.
    sharding = jax.tree.map(lambda x: x.sharding, state)
    copy = jax.jit(lambda state: jax.tree.map(jax.numpy.copy, state), out_shardings=sharding)
    return copy({**state, **new}), report


def _fitting(name: str, x: Any, arrays: Arrays, skip: str, report: Report) -> np.ndarray | None:
    """The source's value for an array of the run's, and a line in the report."""
    if name not in arrays:
        report.new.append(name)
        return None
    value = arrays[name]
    if skip and re.search(skip, "/" + name):
        report.skipped[name] = "init.skip names it"
        return None
    if name.endswith("positions/table") and x.ndim == 2 and value.shape[0] > x.shape[0]:
        value = value[: x.shape[0]]
    if value.shape != x.shape:
        report.skipped[name] = f"it is {list(value.shape)} there, {list(x.shape)} here"
        return None
    report.loaded.append(name)
    return np.asarray(value)


def _placed(value: np.ndarray, sharding: Any) -> jax.Array:
    """Every process gives the shards that its devices hold."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _check_model(there: Config, here: Config, directory: str) -> None:
    a, b = (dataclasses.asdict(config.model) for config in (there, here))
    for key in (key for key in ("name", *a, *b) if key not in FREE):
        if a.get(key) != b.get(key):
            raise InputError(
                f"init.from={directory} has model.{key}={a.get(key)}, this run {b.get(key)}: the same arrays "
                f"would mean something else; set model.{key} to {a.get(key)}"
            )


def read(directory: str | os.PathLike[str], like: Config | None = None) -> tuple[Config, Arrays]:
    """The config and arrays of a workdir (its moving average if it has one), or of Hugging Face's files.

    Adapters are merged into the weights that they adapt, and quantized weights are floats again, but for a
    run (`like`) that holds its own in the same way.

    Raises:
        InputError: it is neither, or damaged.
    """
    path = workdir.local(directory, "init.from or --workdir")
    if not (path / "checkpoints").is_dir():
        pretrained = huggingface.open_pretrained(path)
        return pretrained.config, pretrained.arrays(_shapes(_model(pretrained)))
    config = workdir.read_config(path)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        params, step = parameters.restore(checkpoints, config, checkpoints.spec("params", sharding))
        rest, _, _ = checkpoints.restore(checkpoints.spec("rest", sharding), step, part="rest")
    if config.lora.rank or (
        config.quantize.weights != "none" and (like is None or like.quantize != config.quantize)
    ):
        model = models.define(config, tasks.batch_spec(config, path))
        params = trees.by_path(jax.jit(model.plain)(trees.nest(params), trees.nest(rest)))
        rest = trees.by_path(model.divide(trees.nest(rest))[1])
    return config, {name: np.asarray(x) for name, x in (params | rest).items()}


def is_imported(checkpoints: Checkpoints) -> bool:
    """True if there are an imported model's parameters alone, without a state of training."""
    return checkpoints.latest() == 0 and "imported" in checkpoints.meta(0)


def _model(pretrained: Pretrained) -> Definition:
    """The model that a Hugging Face config describes; of images it needs no dataset."""
    config = pretrained.config
    if config.model.vocab_size:
        tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.int32)
        pairs = isinstance(config.task, MLM) and config.task.next_sentence
        names = ["tokens", *(["next_sentence"] if pairs else [])]
        return models.define(config, dict.fromkeys(names, tokens))
    size, channels = config.data.image_size, pretrained.channels()
    image = jax.ShapeDtypeStruct((config.batch_size, size, size, channels), np.float32)
    return models.define(config, {"image": image})


def _shapes(model: Definition) -> dict[str, tuple[int, ...]]:
    both = trees.by_path(model.params_spec), trees.by_path(model.rest_spec)
    return {name: x.shape for tree in both for name, x in tree.items()}


# ---------------------------------------------------------------------------------- to and from Hugging Face


def import_pretrained(
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Config:
    """Hugging Face's files -> a new workdir that evaluate, generate and train take. -> its config.

    Its checkpoint of step 0 holds parameters and statistics alone.

    Args:
        overrides: as `config.load` takes them, over the config that the files imply.

    Raises:
        InputError: the files are not sound (see `huggingface`); nothing is then written.
    """
    pretrained = huggingface.open_pretrained(directory)
    config = config_lib.override(pretrained.config, overrides)
    if config.model != pretrained.config.model:
        raise InputError(f"--config.model: what shapes the model comes from {directory}; leave it out")
    model = _model(pretrained._replace(config=config))
    arrays = pretrained.arrays(_shapes(model))

    def stored(spec: Any) -> dict[Any, Any]:
        return trees.nest(
            {name: jax.device_put(arrays[name].astype(x.dtype)) for name, x in trees.by_path(spec).items()}
        )

    state = {"params": stored(model.params_spec), "rest": stored(model.rest_spec)}
    _check_finite(arrays, str(directory))
    facts = huggingface.names.facts(config, pretrained.class_names(), pretrained.channels())
    with disk.new_directory(target, "--workdir") as path:
        workdir.write_config(path, config)
        _keep_files(pretrained, config, path)
        fitted.write(path, facts)
        with Checkpoints(path / "checkpoints", async_save=False) as checkpoints:
            checkpoints.save(0, {"step": jax.numpy.int32(0), **state}, {"imported": str(directory)})
    return config


def _check_finite(arrays: Arrays, directory: str) -> None:
    for name, x in arrays.items():
        if not np.isfinite(np.asarray(x, np.float32)).all():
            raise InputError(f"{directory} has NaN or infinity in what becomes {name}; fetch the file again")


def _keep_files(pretrained: Pretrained, config: Config, path: pathlib.Path) -> None:
    """Keeps what an export puts back and what inputs are read by. Raises InputError for a bad tokenizer."""
    origin, source = path / ORIGIN, pretrained.directory
    tokenizer_files.keep(source, origin, ORIGIN_FILES)
    huggingface.write_unused(pretrained, origin)
    kind, _, there = config.data.tokenizer.partition(":")
    if not config.model.vocab_size:
        if not config.data.mean:
            log.warning(
                "%s has no preprocessor_config.json: pixels are normalized by 0.5 and 0.5; if the model "
                "learned from others, set --config.data.mean and --config.data.std", source,
            )  # fmt: skip
        return
    if kind != "hf":
        return
    if pathlib.Path(there) != source.absolute():  # another's tokenizer was asked for
        tokenizer_files.keep(tokenizer_files.home(pathlib.Path(there) / TOKENIZER), origin)
    if not (origin / TOKENIZER).is_file() and (made := backends.from_vocabulary(origin)):
        (path / TOKENIZER).write_text(made, "utf-8")
    elif (origin / TOKENIZER).is_file():
        shutil.copyfile(origin / TOKENIZER, path / TOKENIZER)
    else:
        _say_no_tokenizer(source)
        return
    tokenizer = tokens.Pretrained.load(path / TOKENIZER)
    if tokenizer.chats is not None:
        log.info("chats follow the model's own template")
    for line in generation.not_used(tokenizer.files.generation):
        log.warning("%s/generation_config.json: %s is not used", source, line)


def _say_no_tokenizer(source: pathlib.Path) -> None:
    """Raises InputError for a tokenizer that is there, but in no form that is read."""
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"):
        if (source / name).is_file():
            raise InputError(
                f"{source} has {name} but no tokenizer.json; transformers writes it: "
                f"AutoTokenizer.from_pretrained({str(source)!r}).save_pretrained(DIR)"
            )
    log.warning("%s has no tokenizer: text needs --config.data.tokenizer=hf:DIR (or bytes)", source)


def export_safetensors(directory: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """A workdir -> a new directory of safetensors, in Hugging Face's layout where there is one.

    An imported model that was not trained comes out bit for bit as it went in, config.json included.

    -> what was written: the layout's name and the files.

    Raises:
        InputError: no run, no checkpoint, or `target` is in the way.
    """
    path = pathlib.Path(directory)
    config, arrays = read(path)
    layout, tensors = huggingface.tensors_of(config, arrays)
    origin = path / ORIGIN if (path / ORIGIN / "config.json").is_file() else None
    with disk.new_directory(target, "--out") as out:
        if origin is not None:
            tokenizer_files.keep(origin, out, ORIGIN_FILES)
        if origin is not None and huggingface.describes(origin, config):
            tensors = huggingface.as_imported(origin, tensors, config)
        elif origin is not None and layout is not None:  # parts were taken out: config.json is another
            tree = huggingface.write_config(config, layout, arrays, _names(path, config))
            there = tokenizer_files.json_object(origin / "config.json")
            tree |= {key: there[key] for key in there if key.endswith("_token_id")}
            huggingface.companions.write(out, {"config.json": tree})
        elif layout is not None:
            huggingface.companions.write(out, _files(path, config, layout, arrays))
        elif (path / TOKENIZER).is_file():
            shutil.copyfile(path / TOKENIZER, out / TOKENIZER)
        if (path / fitted.FILE).is_file():
            shutil.copyfile(path / fitted.FILE, out / fitted.FILE)
        huggingface.write(out, tensors)
        if layout is None:
            workdir.write_config(out, config)
        for file in (file for file in out.rglob("*") if file.is_file()):
            file.chmod(0o644)
        files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return [layout.architecture if layout else "names of this package", *files]


def _names(path: pathlib.Path, config: Config) -> tuple[str, ...]:
    """The classes' names; () where there are none, or none are known."""
    names: tuple[str, ...] = ()
    if config.task.one_output:
        try:
            names = tasks.class_names(config, path)
        except InputError as error:
            log.warning("the names of the classes are not known, LABEL_0 and so on stand for them: %s", error)
    return names if len(names) == config.model.num_classes else ()


def _files(path: pathlib.Path, config: Config, layout: Layout, arrays: Arrays) -> dict[str, dict[str, Any]]:
    """File name -> its JSON, of a model that was trained here, in the workdir `path`."""
    tree = huggingface.write_config(config, layout, arrays, _names(path, config))
    if config.model.vocab_size:
        tokenizer = data.get_tokenizer(config, path)
        tree |= huggingface.companions.ids(config, tokenizer)
        return {"config.json": tree, **huggingface.companions.texts(config, tokenizer)}
    size, channels = huggingface.image_of(config, arrays)
    if not size:
        height, width = tasks.batch_spec(config, path)["image"].shape[1:3]
        size = height if height == width else 0
    if not size:
        log.warning("images are not square: no preprocessor_config.json is written")
        return {"config.json": tree}
    return {"config.json": tree, **huggingface.companions.pictures(config, size, channels)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
