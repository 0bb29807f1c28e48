"""Texts that a model reads one at a time: labeled texts, and the inputs of predictions.

A batch holds `tokens`, `segments` and `positions` int32 [B, L].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import corpus, labels, objectives, pretrained, tokenizers, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.sizes import Size, short


def shapes(config: Config, facts: Facts) -> Shapes:
    """Returns the arrays of a batch of labeled texts but `mask`. Raises InputError as `labels.check`."""
    features = facts.features
    labels.require(config, features, config.data.text)
    labels.check(config, labels.numbered(config, features, facts.names))
    tokens: Shapes = dict.fromkeys(("tokens", "segments", "positions"), ((config.seq_len,), np.int32))
    return tokens | labels.shapes(config)


def special_ids(config: Config) -> int:
    """Returns how many ids the model's inputs need beyond the tokenizer's: [MASK] and [CLS], or none."""
    return 2 if config.model.starts == "cls" else 0


def vocabulary(config: Config, facts: Facts, special: int) -> Size:
    """Reads the ids that a tokenizer makes: from its name, or from its file; and `special` ones of the task.

    A byte-pair encoding need not be trained for that.
    """
    name = config.data.tokenizer
    kind, _, size = name.partition(":")
    least = {"bytes": 257, "bpe": int(size or 0) if kind == "bpe" else 0}.get(kind, 0)
    if kind == "hf":
        tokenizer = corpus.get_tokenizer(config, facts.workdir)
        least, special = tokenizer.vocab_size, 0 if getattr(tokenizer, "special", {}) else special
    others = f" and {special} special ones" if special else ""
    return Size(least + special, f"{least:,} of {name if kind != 'hf' else short(name)}{others}")


def fitting_tokenizer(config: Config, facts: Facts, special: int) -> tokenizers.Tokenizer:
    """Returns the tokenizer; its ids and `special` ones of the task have to fit the model's vocabulary."""
    tokenizer = corpus.get_tokenizer(config, facts.workdir)
    facts.get("tokenizer", lambda: tokenizer.fingerprint)
    own = getattr(tokenizer, "special", {})
    needed = getattr(tokenizer, "text_ids", tokenizer.vocab_size) + (0 if own else special)  # it has its own
    room = config.model.vocab_size or needed
    if needed > room:
        others = f" and task.name={config.task.name} needs {special} more" if special else ""
        raise InputError(
            f"model.vocab_size is {room}, but data.tokenizer={config.data.tokenizer} makes ids up to "
            f"{tokenizer.vocab_size - 1}{others}; set model.vocab_size to {needed} or more"
        )
    return tokenizer


def whole_texts(
    config: Config, tokenizer: tokenizers.Tokenizer
) -> Callable[[Sequence[bytes | np.ndarray]], transforms.Batch]:
    """Returns a function of UTF-8 texts, or ids of texts, that makes a batch's arrays, with the special
    tokens that the model was trained with."""
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
