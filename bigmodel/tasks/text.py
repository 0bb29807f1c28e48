"""Tasks on texts: next tokens (lm), masked words (mlm), a target for an input (seq2seq).

`lm` packs documents into windows of L tokens (data/corpus.py):

| name | shape | dtype | meaning |
|---|---|---|---|
| tokens | [B, L] | int32 | inputs |
| targets | [B, L] | int32 | the next token of each |
| target_bytes | [B, L] | uint8 | bytes of text that a target stands for |
| segments | [B, L] | int32 | document of the window, from 1; 0: padding |
| positions | [B, L] | int32 | place in the document |

`mlm` has tokens, segments and positions [B, L], and M words to predict:

| masked_positions | [B, M] | int32 | places of the masked words |
| masked_targets | [B, M] | int32 | the words that stood there |
| masked_bytes | [B, M] | uint8 | bytes of text of each |
| masked_real | [B, M] | float32 | 0: padding |
| types | [B, L] | int32 | task.next_sentence: first or second half |
| next_sentence | [B] | int32 | task.next_sentence: its class |

`seq2seq` has tokens, segments and positions [B, L] of inputs, and targets of M tokens; of pairs there are
several in a row, the input and the target of each with its own segment, from 1:

| decoder_tokens | [B, M] | int32 | each target, one to the right |
| decoder_segments | [B, M] | int32 | 0: padding |
| targets | [B, M] | int32 | tokens to predict |
| target_bytes | [B, M] | uint8 | bytes of text of each |

All have `mask` float32 [B]: 0 for rows that fill up a batch. Ids beyond the tokenizer's are special ones,
counted down from the end of the vocabulary: [MASK] and [CLS] of `mlm`, the sentinels of `seq2seq`. The
tokenizer's separator ends a document, a sentence, a target.

Legend: B batch, L length, M masked words or tokens of a target, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import config as keys
from bigmodel import units
from bigmodel.config import Config, InputError
from bigmodel.data import corpus, objectives, texts, tokenizers, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pairs import Rows
from bigmodel.data.pipeline import EVAL_SEED, Parts
from bigmodel.data.sizes import Sizes
from bigmodel.metrics import Metrics
from bigmodel.tasks.base import (
    Batch,
    K,
    Row,
    Task,
    cross_entropy,
    is_likeliest,
    with_losses,
)


class _Words(Task[K]):
    """Tasks that predict tokens."""

    def sizes(self, facts: Facts) -> Sizes:
        return {"vocab_size": lambda: texts.vocabulary(self.config, facts, self.special_ids(facts))}

    def special_ids(self, facts: Facts) -> int:
        """Returns how many ids a new model has for the task, beyond those of the tokenizer."""
        return texts.special_ids(self.config)

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        with np.errstate(over="ignore"):
            return {"perplexity": float(np.exp(np.float64(values["loss"])))}


class LM(_Words[keys.LM]):
    """Next tokens of packed documents."""

    def shapes(self, facts: Facts) -> Shapes:
        row = (self.config.seq_len,)
        return {
            **dict.fromkeys(("tokens", "targets", "segments", "positions"), (row, np.int32)),
            "target_bytes": (row, np.uint8),
        }

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        tokenizer = texts.fitting_tokenizer(self.config, facts, special=0)
        packed, about, amount, rule = _packed(self.config, split, tokenizer, self.config.seq_len)
        return Parts(packed, lambda batch, serials: dict(batch), about, amount=amount, split_rule=rule)

    def weight(self, batch: Batch) -> jax.Array:
        return self._weight(batch).sum()

    def _weight(self, batch: Batch) -> jax.Array:
        """1 for each target in a real document of a real example, [B, L]."""
        return jnp.where(batch["segments"] > 0, batch["mask"][:, None], 0.0)

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        weight_BL, smoothing = self._weight(batch), self.keys.label_smoothing * train
        metrics = _words(outputs["logits"], batch["targets"], batch["target_bytes"], weight_BL, smoothing)
        return with_losses(metrics, outputs.get("losses", {}), weight_BL, train)


class MLM(_Words[keys.MLM]):
    """Masked words, and whether two sentences follow each other (Devlin et al. 2018)."""

    def shapes(self, facts: Facts) -> Shapes:
        length = self.config.seq_len
        row, masked = (length,), (objectives.most_masked(length, self.keys.mask_rate),)
        shapes: Shapes = dict.fromkeys(("tokens", "segments", "positions"), (row, np.int32))
        if self.keys.next_sentence:
            shapes |= {"types": (row, np.int32), "next_sentence": ((), np.int32)}
        return shapes | {
            "masked_positions": (masked, np.int32), "masked_targets": (masked, np.int32),
            "masked_bytes": (masked, np.uint8), "masked_real": (masked, np.float32),
        }  # fmt: skip

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        config, task, seed = self.config, self.keys, self.config.seed if train else EVAL_SEED
        tokenizer = texts.fitting_tokenizer(config, facts, special=2)
        vocab_size: int = config.model.vocab_size or tokenizer.vocab_size + 2
        mask_id, cls = (corpus.special_id(tokenizer, vocab_size, role) for role in ("mask", "cls"))
        packed, about, amount, rule = _packed(
            config, split, tokenizer, config.seq_len - 3 if task.next_sentence else config.seq_len
        )
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
        return Parts(packed, finish, about, amount=amount, split_rule=rule)

    def weight(self, batch: Batch) -> jax.Array:
        return self._weight(batch).sum()

    def _weight(self, batch: Batch) -> jax.Array:
        """1 for each masked word of a real example, [B, M]."""
        return batch["masked_real"] * batch["mask"][:, None]

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """The next-sentence loss is weighed, example by example, by the words that are masked in it."""
        weight_BM, mask_B = self._weight(batch), batch["mask"]
        smoothing = self.keys.label_smoothing * train
        targets, bytes_each = batch["masked_targets"], batch["masked_bytes"]
        metrics = _words(outputs["logits"], targets, bytes_each, weight_BM, smoothing)
        if "next_sentence" in outputs:
            nats_B = cross_entropy(outputs["next_sentence"], batch["next_sentence"])
            correct_B = is_likeliest(outputs["next_sentence"], batch["next_sentence"])
            total, count = metrics["loss"]
            total = total + (nats_B * weight_BM.sum(1)).sum() if train else total
            metrics["loss"] = (total, count)
            metrics["next_sentence_loss"] = ((nats_B * mask_B).sum(), mask_B.sum())
            metrics["next_sentence_accuracy"] = (jnp.where(correct_B, mask_B, 0.0).sum(), mask_B.sum())
        real_BL = (batch["segments"] > 0).astype(jnp.float32)
        losses = {
            name: (x * real_BL).sum(1) / real_BL.sum(1).clip(1)
            for name, x in outputs.get("losses", {}).items()
        }
        return with_losses(metrics, losses, weight_BM.sum(1), train)

    def inferred(self, outputs: Any) -> dict[str, jax.Array]:
        return {}  # the mean of the hidden states, which every encoder has

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        return embedding(out, self.config)


class Seq2Seq(_Words[keys.Seq2Seq]):
    """A target text for an input text: pairs, or the spans that plain text lost (Raffel et al. 2020)."""

    def shapes(self, facts: Facts) -> Shapes:
        inputs, targets, _ = self._lengths(facts)
        return {
            **dict.fromkeys(("tokens", "segments", "positions"), ((inputs,), np.int32)),
            **dict.fromkeys(("decoder_tokens", "decoder_segments", "targets"), ((targets,), np.int32)),
            "target_bytes": ((targets,), np.uint8),
        }

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        config, task, seed = self.config, self.keys, self.config.seed if train else EVAL_SEED
        inputs, targets, window = self._lengths(facts)
        spans = self._spans(facts)
        tokenizer = texts.fitting_tokenizer(config, facts, special=spans)
        vocab_size: int = config.model.vocab_size or tokenizer.vocab_size + spans
        shape: dict[str, Any] = {"inputs": inputs, "targets": targets, "end": tokenizer.separator}
        shape["start"] = corpus.special_id(tokenizer, vocab_size, "start")
        shape["token_bytes"] = _all_bytes(tokenizer, vocab_size)
        if _is_paired(facts):
            source = facts.open(split, ("source", "target"))
            rows = Rows(config, source, tokenizer, inputs, targets, pack=task.pack, mixed=train)
            about: dict[str, Any] = {"source": source.fingerprint, "tokenizer": tokenizer.fingerprint}
            about |= {"lengths": [inputs, targets], "packed": task.pack}

            def finish(batch: Mapping[str, np.ndarray], serials: np.ndarray) -> transforms.Batch:
                return objectives.sequence_pairs(batch["pairs"].tolist(), **shape)

            amount = f"{len(source):,} pairs"
            return Parts(rows, finish, about, amount=amount, split_rule=source.split_rule)
        packed, about, amount, rule = _packed(config, split, tokenizer, window)
        corrupt = functools.partial(
            objectives.corrupt_spans,
            seed=seed,
            rate=task.mask_rate,
            mean_span=task.mean_span,
            last_sentinel=corpus.special_id(tokenizer, vocab_size, "sentinel"),
            **shape,
        )
        about |= {"mask_rate": task.mask_rate, "mean_span": task.mean_span, "draws": seed}
        return Parts(packed, corrupt, about, amount=amount, split_rule=rule)

    def special_ids(self, facts: Facts) -> int:
        """Returns as many sentinels as T5's own vocabulary has, or as a text loses spans."""
        return max(100, self._spans(facts))

    def _spans(self, facts: Facts) -> int:
        """Returns how many spans a text loses; 0 for pairs."""
        window = self._lengths(facts)[2]
        return objectives.span_counts(window, self.keys.mask_rate, self.keys.mean_span)[1] if window else 0

    def _lengths(self, facts: Facts) -> tuple[int, int, int]:
        """Tokens of inputs, of targets, and of the text that spans are cut from (pairs: 0)."""
        task, inputs = self.keys, self.config.seq_len
        if _is_paired(facts):
            return inputs, task.target_len or inputs, 0
        window, targets = objectives.span_lengths(inputs, task.mask_rate, task.mean_span)
        return inputs, targets, window

    def weight(self, batch: Batch) -> jax.Array:
        return self._weight(batch).sum()

    def _weight(self, batch: Batch) -> jax.Array:
        """1 for each token of a target of a real example, [B, M]."""
        return jnp.where(batch["decoder_segments"] > 0, batch["mask"][:, None], 0.0)

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        weight_BM, smoothing = self._weight(batch), self.keys.label_smoothing * train
        metrics = _words(outputs["logits"], batch["targets"], batch["target_bytes"], weight_BM, smoothing)
        return with_losses(metrics, outputs.get("losses", {}), weight_BM, train)


def _words(
    logits_BLV: jax.Array, targets: jax.Array, bytes_each: jax.Array, weight: jax.Array, smoothing: float
) -> Metrics:
    """Metrics of predicted tokens: logits [B, L, V]; the others [B, L]."""
    count = weight.sum()
    nats = (cross_entropy(logits_BLV, targets, smoothing) * weight).sum()
    correct = is_likeliest(logits_BLV, targets)
    bytes_count = (bytes_each.astype(jnp.float32) * weight).sum()
    return {
        "loss": (nats, count),
        "accuracy": (jnp.where(correct, weight, 0.0).sum(), count),
        "bits_per_byte": (nats / jnp.log(2.0), bytes_count),
    }


def embedding(out: Mapping[str, np.ndarray], config: Config) -> Row:
    """A text's vector of length 1: the mean of its tokens' hidden states (Reimers and Gurevych 2019)."""
    if "mean" not in out:
        raise InputError(f"model.name={config.model.name} gives no embeddings; use an encoder's run")
    vector = out["mean"] / max(float(np.sqrt((out["mean"] ** 2).sum())), 1e-12)
    return {"embedding": vector.tolist()}


# ----------------------------------------------------------------------------------------------- examples


def _packed(
    config: Config, split: str, tokenizer: tokenizers.Tokenizer, length: int
) -> tuple[corpus.Packed, dict[str, Any], str, str]:
    """Returns packed text, its part of a fingerprint, and how much it is and how it was divided."""
    source = corpus.open_text(config, split)
    stream = corpus.token_stream(source, tokenizer, cache=config.data.cache)
    about = {"source": source.fingerprint, "tokenizer": tokenizer.fingerprint, "seq_len": config.seq_len}
    amount = f"{units.quantity(source.num_bytes)}B"
    return corpus.Packed(stream, tokenizer, length), about, amount, source.split_rule


def _all_bytes(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """uint8 (vocab_size,): bytes of text by id; special ids stand for none."""
    return np.pad(tokenizer.token_bytes, (0, max(vocab_size - len(tokenizer.token_bytes), 0)))[:vocab_size]


def _is_paired(facts: Facts) -> bool:
    return {"source", "target"} <= set(facts.features)
