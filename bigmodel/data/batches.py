"""What a batch holds, task by task: `KINDS` makes the examples and says how they will look.

Ids beyond the tokenizer's are special ones, counted down from the end of the model's vocabulary: [MASK] and
[CLS] of `mlm`, the sentinels of `seq2seq`. The tokenizer's separator ends a document, a sentence, a target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigmodel.config import Config, Data, InputError
from bigmodel.config.families import LABEL_TASKS
from bigmodel.data import (
    balance,
    corpus,
    images,
    labels,
    objectives,
    pretrained,
    ratings,
    sources,
    tables,
    tfds,
    tokenizers,
    transforms,
)
from bigmodel.data import boxes as box_data
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.source import Source


class Examples(Protocol):
    """Model-ready examples by index: packed windows, or a source of images."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


Mix = Callable[[transforms.Batch, transforms.Batch, np.ndarray], transforms.Batch]


class Order(Protocol):
    def __getitem__(self, position: int) -> int: ...


class Parts(NamedTuple):
    """What the examples of a task are, and how a batch is made of them."""

    examples: Examples
    finish: transforms.Transform
    facts: dict[str, Any]
    mix: Mix | None = None  # (rows, their partners, positions in the run) -> rows
    order: Order | None = None  # order[position] -> example, where it is not a shuffle of all


EVAL_SEED = 0  # evaluation draws the same whatever the run's seed, so that runs can be compared


class EncodedPairs:
    """`source_ids` and `target_ids` of a source's pairs, object arrays of int32 arrays."""

    def __init__(self, source: Source, tokenizer: tokenizers.Tokenizer) -> None:
        self._source, self._tokenizer = source, tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        records, out = self._source.read(indices), {}
        for key in ("source", "target"):
            out[f"{key}_ids"] = np.empty(len(indices), object)
            for row, ids in enumerate(self._tokenizer.encode_all(records[key].tolist())):
                out[f"{key}_ids"][row] = ids.astype(np.int32)
        return out


# -------------------------------------------------------------------------------------------------- tasks


def _lm(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    tokenizer = _tokenizer(config, facts, special=0)
    packed, about = _packed(config, split, tokenizer, config.seq_len)
    return Parts(packed, lambda batch, serials: dict(batch), about)


def _lm_shapes(config: Config, _: Facts) -> Shapes:
    row = (config.seq_len,)
    return {
        **dict.fromkeys(("tokens", "targets", "segments", "positions"), (row, np.int32)),
        "target_bytes": (row, np.uint8),
    }


def _mlm(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    task, seed = config.task, config.seed if train else EVAL_SEED
    tokenizer = _tokenizer(config, facts, special=2)
    vocab_size: int = config.model.vocab_size or tokenizer.vocab_size + 2
    mask_id, cls = (corpus.special_id(tokenizer, vocab_size, role) for role in ("mask", "cls"))
    length = config.seq_len - 3 if task.next_sentence else config.seq_len
    packed, about = _packed(config, split, tokenizer, length)
    mask = functools.partial(
        objectives.mask_words,
        seed=seed,
        rate=task.mask_rate,
        mask_id=mask_id,
        words=tokenizer.vocab_size,
        fixed=(tokenizer.separator, cls),
        token_bytes=_all_bytes(tokenizer, vocab_size),
    )

    def finish(batch: Mapping[str, np.ndarray], serials: np.ndarray) -> transforms.Batch:
        if task.next_sentence:
            other = packed.read(objectives.elsewhere(serials, seed=seed, count=len(packed)))["tokens"]
            batch = objectives.sentence_pairs(
                batch["tokens"],
                other,
                serials,
                seed=seed,
                cls=cls,
                separator=tokenizer.separator,
                goes_on=task.goes_on,
            )
        return mask(batch, serials)

    pairs = task.next_sentence and (bool(task.goes_on) or "0 goes on")
    about |= {"mask_rate": task.mask_rate, "next_sentence": pairs, "draws": seed}
    return Parts(packed, finish, about)


def _mlm_shapes(config: Config, _: Facts) -> Shapes:
    row, masked = (config.seq_len,), (objectives.most_masked(config.seq_len, config.task.mask_rate),)
    shapes: Shapes = dict.fromkeys(("tokens", "segments", "positions"), (row, np.int32))
    if config.task.next_sentence:
        shapes |= {"types": (row, np.int32), "next_sentence": ((), np.int32)}
    return shapes | {
        "masked_positions": (masked, np.int32), "masked_targets": (masked, np.int32),
        "masked_bytes": (masked, np.uint8), "masked_real": (masked, np.float32),
    }  # fmt: skip


def _seq2seq(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    task, seed = config.task, config.seed if train else EVAL_SEED
    paired = _is_paired(facts)
    inputs, targets, window = _lengths(config, facts)
    spans = 0 if paired else objectives.span_counts(window, task.mask_rate, task.mean_span)[1]
    tokenizer = _tokenizer(config, facts, special=spans)
    vocab_size: int = config.model.vocab_size or tokenizer.vocab_size + spans
    shape: dict[str, Any] = {"inputs": inputs, "targets": targets, "end": tokenizer.separator}
    shape["start"] = corpus.special_id(tokenizer, vocab_size, "start")
    token_bytes = _all_bytes(tokenizer, vocab_size)
    if paired:
        source = facts.open(split, ("source", "target"))

        def finish_pairs(batch: Mapping[str, np.ndarray], serials: np.ndarray) -> transforms.Batch:
            pairs = list(zip(batch["source_ids"], batch["target_ids"], strict=True))
            return objectives.sequence_pairs(pairs, token_bytes=token_bytes, **shape)

        about = {
            "source": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "lengths": [inputs, targets],
        }
        return Parts(EncodedPairs(source, tokenizer), finish_pairs, about)
    packed, more = _packed(config, split, tokenizer, window)
    corrupt = functools.partial(
        objectives.corrupt_spans,
        seed=seed,
        rate=task.mask_rate,
        mean_span=task.mean_span,
        last_sentinel=corpus.special_id(tokenizer, vocab_size, "sentinel"),
        token_bytes=token_bytes,
        **shape,
    )
    more |= {"mask_rate": task.mask_rate, "mean_span": task.mean_span, "draws": seed}
    return Parts(packed, corrupt, more)


def _seq2seq_shapes(config: Config, facts: Facts) -> Shapes:
    inputs, targets, _ = _lengths(config, facts)
    return {
        **dict.fromkeys(("tokens", "segments", "positions"), ((inputs,), np.int32)),
        **dict.fromkeys(("decoder_tokens", "decoder_segments", "targets"), ((targets,), np.int32)),
        "target_bytes": ((targets,), np.uint8),
    }


def _labelled(
    config: Config,
    train: bool,
    source: Source,
    where: labels.Where,
    prepare: Callable[[np.ndarray | None], transforms.Transform],
    label_of: Callable[[], np.ndarray],
) -> Parts:
    """Examples with one output each, rare classes drawn more often or weighed more as the config asks.

    Args:
        prepare: class weights or None -> what makes a batch of records.
        label_of: the class of every training example, int (n,).
    """
    d, weigh = config.data, config.task.class_weights != "none"
    records, facts = labels.Records(source, config, where), {"source": source.fingerprint}
    if not train or (d.balance == "none" and not weigh):
        return Parts(records, prepare(None), facts)
    label_N = label_of()
    counts = np.bincount(label_N, minlength=labels.classes_of(config))
    order = None if d.balance == "none" else balance.order(d.balance, label_N, config.seed)
    facts |= {"balance": d.balance} if order else {}
    return Parts(records, prepare(balance.class_weights(counts) if weigh else None), facts, order=order)


def _images(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    d = config.data
    keys = tuple(filter(None, ("image", labels.name_of(config), d.group)))
    source = facts.open(split, keys)
    images.check(config, source.features)

    def label_of() -> np.ndarray:  # without decoding an image
        alone = sources.open_source(d.name, split, d.data_dir, keys=(d.label,), cache=False)
        return labels.column(alone, d.label).astype(np.int64)

    def where(index: int) -> str:
        return f"data.name={d.name!r} split {split!r} record {index}"

    prepare = functools.partial(images.Prepare, config, train)
    parts = _labelled(config, train, source, where, prepare, label_of)
    if not train:
        return parts
    keys = ("image_size", "augment", "mixup", "cutmix")
    more = {key: getattr(d, key) for key in keys if getattr(d, key) != getattr(Data, key)}
    mix = images.mixer(config) if images.mixes(config) else None
    return parts._replace(facts=parts.facts | more, mix=mix)


def _gan(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    """Images, each with its serial number, from which evaluation draws the latent of the fake beside it."""
    parts = _images(config, split, facts, train)

    def finish(batch: Mapping[str, np.ndarray], serials: np.ndarray) -> transforms.Batch:
        return {**parts.finish(batch, serials), "serial": (serials % 2**31).astype(np.int32)}

    return parts._replace(finish=finish)


def _gan_shapes(config: Config, facts: Facts) -> Shapes:
    return {**images.shapes(config, facts), "serial": ((), np.int32)}


def _objects(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    d = config.data
    source = facts.open(split, [key for key in (*box_data.KEYS, tfds.CROWDS) if key in facts.features])
    box_data.check(config, source.features)

    def where(index: int) -> str:
        return f"data.name={d.name!r} split {split!r} record {index}"

    about: dict[str, Any] = {"source": source.fingerprint}
    keys = ("image_size", "augment") if train else ()
    about |= {key: getattr(d, key) for key in keys if getattr(d, key) != getattr(Data, key)}
    return Parts(box_data.Records(source, config, where), box_data.Prepare(config, train), about)


def _texts(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    d = config.data
    tokenizer = _tokenizer(config, facts, special=2 if config.model.starts == "cls" else 0)
    arrange = whole_texts(config, tokenizer)
    _texts_shapes(config, facts)  # whatever is wrong with the features
    opened = facts.open(split, tuple(filter(None, (d.text, d.label, d.group))))
    where = labels.where(config, opened, split)
    source = labels.Numbered(config, opened, where, facts.names)

    def prepare(weights: np.ndarray | None) -> transforms.Transform:
        def finish(batch: Mapping[str, np.ndarray], positions: np.ndarray) -> transforms.Batch:
            rows = arrange(batch[d.text].tolist())
            return {**rows, **labels.finish(config, batch, weights)}

        return finish

    parts = _labelled(config, train, source, where, prepare, lambda: labels.column(source, d.label))
    return parts._replace(facts=parts.facts | {"tokenizer": tokenizer.fingerprint, "seq_len": config.seq_len})


def whole_texts(
    config: Config, tokenizer: tokenizers.Tokenizer
) -> Callable[[Sequence[bytes | np.ndarray]], transforms.Batch]:
    """UTF-8 texts, or ids of texts -> a batch's arrays, with what the model was taught to see around them."""
    starts, vocab_size = config.model.starts, config.model.vocab_size or tokenizer.vocab_size + 2
    if isinstance(tokenizer, pretrained.Pretrained) and tokenizer.imported:
        pad = tokenizer.trailing_pad if starts == "separator" else None
        return lambda texts: objectives.given_texts(
            tokenizer.texts(texts, config.seq_len), length=config.seq_len, pad=pad
        )
    first = {"separator": [tokenizer.separator], "cls": [corpus.special_id(tokenizer, vocab_size, "cls")]}
    arrange = functools.partial(
        objectives.whole_texts,
        length=config.seq_len,
        first=first.get(starts, []),
        end=tokenizer.separator,
    )

    def encoded(texts: Sequence[bytes | np.ndarray]) -> transforms.Batch:
        given = [x for x in texts if isinstance(x, bytes)]
        one = len(given) == 1  # as in predictions, where a batch's threads cost more than they bring
        plain = iter([tokenizer.encode(given[0].decode())] if one else tokenizer.encode_all(given))
        return arrange([next(plain) if isinstance(x, bytes) else x for x in texts])

    return encoded


def _texts_shapes(config: Config, facts: Facts) -> Shapes:
    features = facts.features
    labels.require(config, features, config.data.text)
    labels.check(config, labels.numbered(config, features, facts.names))
    tokens: Shapes = dict.fromkeys(("tokens", "segments", "positions"), ((config.seq_len,), np.int32))
    return tokens | labels.shapes(config)


def _tables(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    tables.shapes(config, facts)  # whatever is wrong with the columns
    columns = tables.fitted(config, facts=facts)
    source = facts.open(split)
    where = labels.where(config, source, split)
    rows = labels.Numbered(config, tables.Encoded(config, source, columns, where), where, facts.names)

    def label_of() -> np.ndarray:
        numbered = labels.Numbered(config, source, where, facts.names)
        return labels.column(numbered, config.data.label).astype(np.int64)

    parts = _labelled(
        config, train, rows, where, functools.partial(tables.prepare, config, columns), label_of
    )
    return parts._replace(facts=parts.facts | {"columns": columns.fingerprint})


def _rank(config: Config, split: str, facts: Facts, train: bool) -> Parts:
    """The ratings of `data.split`, the last one of each user held out for evaluation."""
    found, task = ratings.load(config, facts), config.task
    about: dict[str, Any] = {"source": found.fingerprint, "loss": task.rank_loss}
    about |= {"held_out": "validation"} if config.data.eval_split == "validation" else {}
    if train and task.rank_loss == "binary":
        about |= {"negatives": task.negatives, "draws": config.seed}
    return Parts(ratings.Split(found, not train), ratings.finisher(config, found, train), about)


class Kind(NamedTuple):
    """How a task's batches are made, from (config, split, facts, train), and their shapes."""

    parts: Callable[[Config, str, Facts, bool], Parts]
    shapes: Callable[[Config, Facts], Shapes]
    classes: str = ""  # the feature whose classes have names; label: the one of data.label


KINDS = {
    "lm": Kind(_lm, _lm_shapes),
    "mlm": Kind(_mlm, _mlm_shapes),
    "seq2seq": Kind(_seq2seq, _seq2seq_shapes),
    **dict.fromkeys(
        LABEL_TASKS,
        Kind(
            lambda config, split, facts, train: _content(config, facts).parts(config, split, facts, train),
            lambda config, facts: _content(config, facts).shapes(config, facts),
            "label",
        ),
    ),
    "gan": Kind(_gan, _gan_shapes),
    "detect": Kind(_objects, box_data.shapes, "objects/label"),
    "rank": Kind(_rank, ratings.shapes),
}
CONTENTS = {  # of what one output is made from
    "image": Kind(_images, images.shapes),
    "text": Kind(_texts, _texts_shapes),
    "table": Kind(_tables, tables.shapes),
}


def _content(config: Config, facts: Facts) -> Kind:
    """The first that the model takes and the dataset has; if it has none, the last, whose error tells."""
    takes, shown = config.model.inputs, {"image": "image", "text": config.data.text}
    return CONTENTS[next((kind for kind in takes if shown.get(kind) in facts.features), takes[-1])]


def class_names(config: Config, facts: Facts) -> tuple[str, ...]:
    """What the classes are called; nothing where they have no names."""
    key = KINDS[config.task.name].classes
    key = labels.name_of(config) if key == "label" else key
    if not key:
        return ()
    if (named := facts.stored("class names")) is not None:
        return tuple(named)
    feature = facts.features[key]
    return tuple(facts.names(key)) if feature.dtype == "text" else feature.names


# ------------------------------------------------------------------------------------------------- shared


def _tokenizer(config: Config, facts: Facts, special: int) -> tokenizers.Tokenizer:
    """The tokenizer, whose ids and `special` more have to fit the model's vocabulary."""
    tokenizer = corpus.get_tokenizer(config, facts.workdir)
    facts.get("tokenizer", lambda: tokenizer.fingerprint)
    own = getattr(tokenizer, "special", {})
    needed = getattr(tokenizer, "text_ids", tokenizer.vocab_size) + (0 if own else special)  # it has its own
    room = config.model.vocab_size or needed
    if needed > room:
        more = f" and task.name={config.task.name} needs {special} more" if special else ""
        raise InputError(
            f"model.vocab_size is {room}, but data.tokenizer={config.data.tokenizer} makes ids up to "
            f"{tokenizer.vocab_size - 1}{more}; set model.vocab_size to {needed} or more"
        )
    return tokenizer


def _packed(
    config: Config, split: str, tokenizer: tokenizers.Tokenizer, length: int
) -> tuple[corpus.Packed, dict[str, Any]]:
    source = corpus.open_text(config, split)
    stream = corpus.token_stream(source, tokenizer, cache=config.data.cache)
    about = {"source": source.fingerprint, "tokenizer": tokenizer.fingerprint, "seq_len": config.seq_len}
    return corpus.Packed(stream, tokenizer, length), about


def _all_bytes(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """uint8 (vocab_size,): bytes of text by id; special ids stand for none."""
    return np.pad(tokenizer.token_bytes, (0, max(vocab_size - len(tokenizer.token_bytes), 0)))[:vocab_size]


def _is_paired(facts: Facts) -> bool:
    return {"source", "target"} <= set(facts.features)


def _lengths(config: Config, facts: Facts) -> tuple[int, int, int]:
    """Tokens of inputs, of targets, and of the text that spans are cut from (pairs: 0)."""
    task, inputs = config.task, config.seq_len
    if _is_paired(facts):
        return inputs, task.target_len or inputs, 0
    window, targets = objectives.span_lengths(inputs, task.mask_rate, task.mean_span)
    return inputs, targets, window
