"""Shows what a config would be trained on, before it is: amounts, lengths, classes, examples, a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bigmodel import config as config_lib
from bigmodel import pictures, tasks
from bigmodel.config import Config
from bigmodel.data import Facts, Pipeline, get_tokenizer, ratings, tables

BATCHES = 100  # of training, to count in
EXAMPLES = 3
MOST_CLASSES = 20
LONGEST = 400  # characters of a text

Batch = Mapping[str, np.ndarray]


def show(config: Config, out: pathlib.Path | None = None, say: Callable[[str], None] = print) -> None:
    """Reads the data as training would, and says what they are, line by line.

    Args:
        out: a directory for the picture of a batch of images, as training sees it.

    Raises:
        InputError: data that are not there or do not suit the model or the task.
    """
    config = tasks.sized(config, say=say)
    train = tasks.make_pipeline(config, "train")
    evals = {name: tasks.make_pipeline(c, "eval") for name, c in config_lib.eval_sets(config).items()}
    say(division(config, train, evals))
    batches = [train[step] for step in range(min(-(-train.num_examples // config.batch_size), BATCHES))]
    shapes = (f"{key} {x.dtype} [{', '.join(map(str, x.shape))}]" for key, x in batches[0].items())
    say(f"batch     {', '.join(shapes)}")
    drawn = sum(int(batch["mask"].sum()) for batch in batches)
    for line in [*_lengths(batches), *_labels(config, batches, train.class_names)]:
        say(f"{line} (of {drawn:,} examples drawn)")
    for number, line in enumerate(_examples(config, batches[0], train.class_names), 1):
        say(f"example   {number}: {line}")
    if out and "image" in batches[0]:
        image = pictures.grid(pictures.pixels(config, batches[0]["image"]))
        say(f"wrote     {', '.join(pictures.save(out, {'batch': image}))}")


def division(config: Config, train: Pipeline, evals: Mapping[str, Pipeline]) -> str:
    """Says how much data each set has, and how a file was divided."""
    rule = f" ({train.split_rule})" if train.split_rule else ""
    amounts = ", ".join(f"{each.amount} {name}" for name, each in {config.data.split: train, **evals}.items())
    return f"data      {config.data.name}: {amounts}{rule}"


def _lengths(batches: Sequence[Batch]) -> Iterator[str]:
    """Lengths of texts, or of their pieces in a row, and how much of a batch is padding."""
    for key, what in (("segments", "inputs"), ("decoder_segments", "targets")):
        if key not in batches[0]:
            continue
        segments = np.concatenate([batch[key] for batch in batches])
        rows = np.arange(len(segments))[:, None] * (int(segments.max()) + 1)
        length = np.unique((rows + segments)[segments > 0], return_counts=True)[1]
        least, median, long, most = np.quantile(length, (0, 0.5, 0.95, 1)).astype(int)
        yield (
            f"lengths   {what}: least {least}, median {median}, 95 % up to {long}, most {most} tokens; "
            f"{(segments == 0).mean():.1%} padding"
        )


def _labels(config: Config, batches: Sequence[Batch], names: Sequence[str]) -> Iterator[str]:
    """Counts of the classes, or the range of numbers."""
    keys = [key for key in ("label", "rating") if key in batches[0]]
    if not keys:
        return
    real = np.concatenate([batch["mask"] for batch in batches]) > 0
    label = np.concatenate([batch[keys[0]] for batch in batches])[real]
    kind = config.task.label_kind
    if kind not in ("class", "classes"):
        if "label_scale" in batches[0]:
            mean, deviation = batches[0]["label_scale"][0]
            label = label * deviation + mean
        least, median, most = np.quantile(label, (0, 0.5, 1))
        yield f"numbers   {keys[0]}: least {least:.4g}, median {median:.4g}, most {most:.4g}"
        return
    count = np.bincount(label) if kind == "class" else label.sum(0).astype(int)
    order = np.argsort(-count, kind="stable")
    listed = [f"{_name(names, n)} {count[n]:,} ({count[n] / len(label):.1%})" for n in order[:MOST_CLASSES]]
    others = f" and {len(count) - MOST_CLASSES} more" if len(count) > MOST_CLASSES else ""
    yield f"classes   {', '.join(listed)}{others}"


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _examples(config: Config, batch: Batch, names: Sequence[str]) -> Iterator[str]:
    """The first rows of a batch, as people read them."""
    readers = [read for key, read in READERS.items() if key in batch]
    parts = [read(config, batch) for read in readers[:1]]
    for row in range(min(EXAMPLES, len(batch["mask"]))):
        words = [part(row) for part in parts]
        if "label" in batch and batch["label"].ndim == 1:
            words.append(f"label {_name(names, int(batch['label'][row]))}")
        elif "label" in batch:
            words.append(f"label {batch['label'][row].tolist()}")
        yield ", ".join(words)


def _text(config: Config, batch: Batch) -> Callable[[int], str]:
    tokenizer = get_tokenizer(config)

    def decoded(key: str, segments: str, row: int) -> str:
        text = tokenizer.decode(batch[key][row][batch[segments][row] > 0])
        return repr(text if len(text) <= LONGEST else text[:LONGEST] + "...")

    def read(row: int) -> str:
        target = f" -> {decoded('targets', 'decoder_segments', row)}" if "decoder_segments" in batch else ""
        return decoded("tokens", "segments", row) + target

    return read


def _row(config: Config, batch: Batch) -> Callable[[int], str]:
    columns = tables.fitted(config)

    def read(row: int) -> str:
        cells = columns.decode({key: batch[key][row] for key in ("numeric", "categorical") if key in batch})
        return ", ".join(f"{name}={value}" for name, value in cells.items())

    return read


def _rating(config: Config, batch: Batch) -> Callable[[int], str]:
    ids = ratings.ids(config, Facts(config))
    names = {key: {0: "unknown"} | {number: name for name, number in ids[key].items()} for key in ids}

    def read(row: int) -> str:
        words = [f"{key} {names[key][int(batch[key][row])]}" for key in ("user", "item")]
        if "rating" in batch:
            words.append(f"rating {batch['rating'][row]:g}")
        if "negatives" in batch:
            words.append(f"not {', '.join(names['item'][n] for n in batch['negatives'][row].tolist())}")
        return ", ".join(words)

    return read


def _image(config: Config, batch: Batch) -> Callable[[int], str]:
    return lambda row: "image " + " x ".join(map(str, batch["image"][row].shape))


# The array that says of which kind a batch's examples are -> what makes a reader of its rows.
READERS = {"tokens": _text, "numeric": _row, "categorical": _row, "user": _rating, "image": _image}
