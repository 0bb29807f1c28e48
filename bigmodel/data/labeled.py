"""Examples with one output each, whatever they are: images, texts or rows of a table.

Rare classes are drawn more often (data.balance) or weigh more (task.class_weights) as the config asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from bigmodel.config import Config, Data, InputError
from bigmodel.data import balance, images, labels, sources, tables, texts, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pipeline import Parts
from bigmodel.data.sizes import Size, short
from bigmodel.data.source import Source


def kind_of(config: Config, facts: Facts) -> str:
    """Returns image, text or table: the first that the model takes and the dataset has; if it has none, the
    last, whose error says what is missing."""
    takes = config.model.inputs
    features = {"image": "image", "text": config.data.text}
    return next((kind for kind in takes if features.get(kind) in facts.features), takes[-1])


def shapes(config: Config, facts: Facts) -> Shapes:
    """Returns the arrays of a batch but `mask`. Reads no data.

    Raises:
        InputError: an unknown dataset, or features that do not suit the task or the model.
    """
    kind = kind_of(config, facts)
    if kind == "image":
        return images.shapes(config, facts)
    return texts.shapes(config, facts) if kind == "text" else tables.shapes(config, facts)


def classes(config: Config, facts: Facts) -> Size:
    """Reads how many outputs the label asks for; the records too where its numbers are classes."""
    d, kind = config.data, config.task.label_kind
    read = {"image": ("image",), "text": (d.text,)}.get(kind_of(config, facts), ())
    labels.require(config, facts.features, *read)
    label = labels.numbered(config, facts.features, facts.names)
    labels.check_kind(config, label)
    of = f"of {short(d.name)}"
    if kind == "numbers" or (kind == "classes" and not label.num_classes):
        width = label.shape[0] if label.shape else 1
        if width is None:
            raise InputError(f"data.label={d.label!r} of data.name={d.name!r} varies; set model.num_classes")
        return Size(width, f"{'numbers' if kind == 'numbers' else 'classes'} {of}", rounded=False)
    if label.num_classes:
        return Size(label.num_classes, f"classes {of}", rounded=False)
    largest = labels.column(facts.open(d.split, (d.label,)), d.label).max()
    return Size(max(int(largest), 0) + 1, f"0 to {largest} in {d.label!r} {of}", rounded=False)


def examples(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    """Opens a split."""
    kind = kind_of(config, facts)
    if kind == "image":
        return of_images(config, split, facts, train)
    return (_of_texts if kind == "text" else _of_tables)(config, split, facts, train)


def of_images(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    """Opens a split of images."""
    d = config.data
    keys = tuple(filter(None, ("image", labels.name_of(config), d.group)))
    source = facts.open(split, keys)
    images.check(config, source.features)

    def label_of() -> np.ndarray:  # without decoding an image
        how = labels.reading(config)
        alone = sources.open_source(d.name, split, d.data_dir, keys=(d.label,), cache=False, **how)
        return labels.column(alone, d.label).astype(np.int64)

    where = labels.where(config, source, split)
    prepare = functools.partial(images.Prepare, config, train)
    parts = _balanced(config, train, source, where, prepare, label_of)
    if not train:
        return parts
    keys = ("image_size", "augment", "mixup", "cutmix")
    changed = {key: getattr(d, key) for key in keys if getattr(d, key) != getattr(Data, key)}
    mix = images.mixer(config) if images.mixes(config) else None
    return parts._replace(facts=parts.facts | changed, mix=mix)


def _of_texts(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    d = config.data
    tokenizer = texts.fitting_tokenizer(config, facts, special=texts.special_ids(config))
    arrange = texts.whole_texts(config, tokenizer)
    texts.shapes(config, facts)  # whatever is wrong with the features
    opened = facts.open(split, tuple(filter(None, (d.text, d.label, d.group))))
    where = labels.where(config, opened, split)
    source = labels.Numbered(config, opened, where, facts.names)

    def prepare(weights: np.ndarray | None) -> transforms.Transform:
        def finish(batch: Mapping[str, np.ndarray], positions: np.ndarray) -> transforms.Batch:
            rows = arrange(batch[d.text].tolist())
            return {**rows, **labels.finish(config, batch, weights)}

        return finish

    parts = _balanced(config, train, source, where, prepare, lambda: labels.column(source, d.label))
    return parts._replace(facts=parts.facts | {"tokenizer": tokenizer.fingerprint, "seq_len": config.seq_len})


def _of_tables(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    tables.shapes(config, facts)  # whatever is wrong with the columns
    columns = tables.fitted(config, facts=facts)
    source = facts.open(split)
    where = labels.where(config, source, split)
    rows = labels.Numbered(config, tables.Encoded(config, source, columns, where), where, facts.names)

    def label_of() -> np.ndarray:
        numbered = labels.Numbered(config, source, where, facts.names)
        return labels.column(numbered, config.data.label).astype(np.int64)

    parts = _balanced(
        config, train, rows, where, functools.partial(tables.prepare, config, columns), label_of
    )
    return parts._replace(facts=parts.facts | {"columns": columns.fingerprint})


def _balanced(
    config: Config,
    train: bool,
    source: Source,
    where: labels.Where,
    prepare: Callable[[np.ndarray | None], transforms.Transform],
    label_of: Callable[[], np.ndarray],
) -> Parts:
    """Checks the examples, and draws rare classes more often or weighs them more as the config asks.

    Args:
        prepare: class weights or None -> what makes a batch of records.
        label_of: the class of every training example, int (n,).
    """
    d, weigh = config.data, config.task.weighs_classes
    records, facts = labels.Records(source, config, where), {"source": source.fingerprint}
    parts = Parts(records, prepare(None), facts, split_rule=source.split_rule, where=where)
    if not train or (d.balance == "none" and not weigh):
        return parts
    label_N = label_of()
    counts = np.bincount(label_N, minlength=labels.classes_of(config))
    order = None if d.balance == "none" else balance.order(d.balance, label_N, config.seed)
    facts |= {"balance": d.balance} if order else {}
    finish = prepare(balance.class_weights(counts)) if weigh else parts.finish
    return parts._replace(finish=finish, facts=facts, order=order)
