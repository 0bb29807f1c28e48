"""Learning objectives on text: masked words, corrupted spans, sentence pairs; pure functions on batches.

What is drawn depends on the seed and a row's serial number alone (its place in the endless order of training;
in evaluation the example's index), so a run resumes exactly, on any number of hosts.

Legend: B batch, L tokens, M masked tokens or targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bigmodel.config import InputError
from bigmodel.data.transforms import Batch, generator

MASKS, PAIRS, OTHERS, SPANS = 4, 5, 6, 7  # streams of `generator`; images have the others


# ------------------------------------------------------------------------------------------- masked words


def most_masked(length: int, rate: float) -> int:
    """M: how many tokens of an example of `length` are predicted at most."""
    return max(round(length * rate), 1)


def mask_words(
    batch: Mapping[str, np.ndarray], serials: np.ndarray, *, seed: int, rate: float, mask_id: int, words: int,
    fixed: Sequence[int], token_bytes: np.ndarray,
) -> Batch:  # fmt: skip
    """BERT's objective (Devlin et al. 2018, section 3.1): `rate` of the tokens are predicted; of these 80 %
    become `mask_id`, 10 % a random word, 10 % stay.

    Args:
        batch: `tokens`, `segments` int32 [B, L]; segment 0 is padding.
        words: random words are drawn from ids 0..words - 1.
        fixed: ids that are never predicted, such as separators.
        token_bytes: uint8, the bytes of text that an id stands for.

    -> the batch with tokens masked, and `masked_positions`, `masked_targets` int32, `masked_bytes` uint8,
    `masked_real` float32 (1 where there is one), each [B, M].
    """
    tokens_BL = batch["tokens"].copy()
    free_BL = (batch["segments"] > 0) & ~np.isin(tokens_BL, fixed)
    rows, length = tokens_BL.shape
    most = most_masked(length, rate)
    positions_BM = np.zeros((rows, most), np.int32)
    real_BM = np.zeros((rows, most), np.float32)
    targets_BM = np.zeros((rows, most), np.int32)
    for row, serial in enumerate(serials):
        random = generator(seed, int(serial), MASKS)
        free = np.flatnonzero(free_BL[row])
        count = min(max(round(len(free) * rate), 1), most, len(free))
        at = np.sort(random.permutation(free)[:count])
        positions_BM[row, :count], real_BM[row, :count] = at, 1
        targets_BM[row, :count] = tokens_BL[row, at]
        fate, other = random.random(count), random.integers(0, words, count)
        tokens_BL[row, at] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, other, tokens_BL[row, at]))
    out = {key: value for key, value in batch.items() if key not in ("targets", "target_bytes")}
    return {
        **out,
        "tokens": tokens_BL,
        "masked_positions": positions_BM,
        "masked_targets": targets_BM,
        "masked_bytes": token_bytes[targets_BM] * (real_BM > 0),
        "masked_real": real_BM,
    }


def elsewhere(serials: np.ndarray, *, seed: int, count: int) -> np.ndarray:
    """int64 (B,): for each row one of `count` windows of text."""
    return np.array([generator(seed, int(serial), OTHERS).integers(count) for serial in serials], np.int64)


def sentence_pairs(
    first_BN: np.ndarray, other_BN: np.ndarray, serials: np.ndarray, *, seed: int, cls: int, separator: int,
    goes_on: int = 0,
) -> Batch:  # fmt: skip
    """`[CLS] a [SEP] b [SEP]`: b goes on where a ends, or (one in two) comes from elsewhere.

    Args:
        first_BN, other_BN: windows of text, N = L - 3 tokens each; a is a random part of the first one's
            beginning, b its rest, or as much of the end of the other one.

    -> `tokens`, `segments`, `positions`, `types` int32 [B, L]; `next_sentence` int32 [B],
    `goes_on` where b goes on.
    """
    rows, n = first_BN.shape
    tokens_BL = np.full((rows, n + 3), separator, np.int32)
    tokens_BL[:, 0] = cls
    types_BL = np.zeros_like(tokens_BL)
    follows_B = np.zeros(rows, np.int32)
    for row, serial in enumerate(serials):
        random = generator(seed, int(serial), PAIRS)
        cut, follows_B[row] = int(random.integers(1, n)), int(random.random() < 0.5)
        tokens_BL[row, 1 : cut + 1] = first_BN[row, :cut]
        tokens_BL[row, cut + 2 : -1] = (first_BN if follows_B[row] else other_BN)[row, cut:]
        types_BL[row, cut + 2 :] = 1
    positions_BL = np.tile(np.arange(n + 3, dtype=np.int32), (rows, 1))
    return {
        "tokens": tokens_BL,
        "segments": np.ones_like(tokens_BL),
        "positions": positions_BL,
        "types": types_BL,
        "next_sentence": np.where(follows_B, goes_on, 1 - goes_on).astype(np.int32),
    }


# ---------------------------------------------------------------------------------------- corrupted spans


def span_counts(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Returns how many of `length` tokens are noise, and in how many spans."""
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def span_lengths(inputs: int, rate: float, mean_span: float) -> tuple[int, int]:
    """-> (tokens of text that make `inputs` tokens once corrupted, tokens of their target), ends included.

    As T5's `random_spans_helper`: as much text as fits.
    """

    def lengths(text: int) -> tuple[int, int]:
        noise, spans = span_counts(text, rate, mean_span)
        return text - noise + spans + 1, noise + spans + 1

    text = 2
    while lengths(text + 1)[0] <= inputs:
        text += 1
    return text, lengths(text)[1]


def noise_spans(length: int, rate: float, mean_span: float, random: np.random.Generator) -> np.ndarray:
    """bool (length,): spans of noise, the first token being none (T5's `random_spans_noise_mask`)."""
    if length < 2:
        return np.zeros(length, bool)
    noise, spans = span_counts(length, rate, mean_span)

    def parts(total: int) -> np.ndarray:
        """`total` as a sum of `spans` positive numbers, each way equally likely."""
        cuts = np.sort(random.permutation(total - 1)[: spans - 1]) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    lengths = np.stack([parts(length - noise), parts(noise)], 1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def corrupt(ids: np.ndarray, noise: np.ndarray, last_sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """T5's objective (Raffel et al. 2020, figure 2): `Thank you <X> me to your party <Y> week` and
    `<X> for inviting <Y> last <Z>`.

    Args:
        noise: bool, which tokens the targets hold.
        last_sentinel: <X>; the next ones count down from it.

    -> (inputs: each span of noise becomes a sentinel, targets: each span of the rest does).
    """

    def replaced(spans: np.ndarray) -> np.ndarray:
        starts = spans & ~np.concatenate([[False], spans[:-1]])
        marked = np.where(starts, last_sentinel + 1 - np.cumsum(starts), ids)
        return marked[starts | ~spans].astype(np.int32)

    return replaced(noise), replaced(~noise)


def corrupt_spans(
    batch: Mapping[str, np.ndarray], serials: np.ndarray, *, seed: int, rate: float, mean_span: float,
    inputs: int, targets: int, last_sentinel: int, end: int, start: int, token_bytes: np.ndarray,
) -> Batch:  # fmt: skip
    """`tokens`, `segments` [B, N] -> what `sequence_pairs` gives, from corrupted spans of each row.

    A window is one text whatever documents meet in it, as T5's are.
    """
    pairs = []
    for row, serial in enumerate(serials):
        ids = batch["tokens"][row][batch["segments"][row] > 0]
        noise = noise_spans(len(ids), rate, mean_span, generator(seed, int(serial), SPANS))
        pairs.append([corrupt(ids, noise, last_sentinel)])
    return sequence_pairs(
        pairs, inputs=inputs, targets=targets, end=end, start=start, token_bytes=token_bytes
    )


def sequence_pairs(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], *, inputs: int, targets: int, end: int,
    start: int, token_bytes: np.ndarray,
) -> Batch:  # fmt: skip
    """Rows of pairs, ids of an input and its target, -> arrays; what is too long is cut, and `end` ends each.

    -> `tokens`, `segments`, `positions` int32 [B, inputs]; `decoder_tokens` (`start`, then the target),
    `decoder_segments`, `targets` int32, `target_bytes` uint8, [B, targets]. A row's first pair is segment 1
    of both; 0 is padding.
    """
    sizes = dict.fromkeys(("tokens", "segments", "positions"), inputs)
    sizes |= dict.fromkeys(("decoder_tokens", "decoder_segments", "targets"), targets)
    out = {key: np.zeros((len(rows), size), np.int32) for key, size in sizes.items()}
    for row, pairs in enumerate(rows):
        at = to = 0
        for segment, (source, target) in enumerate(pairs, 1):
            source, target = np.append(source[: inputs - 1], end), np.append(target[: targets - 1], end)
            read, written = slice(at, at + len(source)), slice(to, to + len(target))
            at, to = read.stop, written.stop
            out["tokens"][row, read], out["segments"][row, read] = source, segment
            out["positions"][row, read] = np.arange(len(source))
            out["targets"][row, written], out["decoder_segments"][row, written] = target, segment
            out["decoder_tokens"][row, written] = np.append(start, target[:-1])
    out["target_bytes"] = token_bytes[out["targets"]] * (out["decoder_segments"] > 0)
    return out


# ------------------------------------------------------------------------------------------- whole texts


def whole_texts(texts: Sequence[np.ndarray], *, length: int, first: Sequence[int], end: int) -> Batch:
    """Ids -> `tokens`, `segments`, `positions` int32 [B, L]: `first`, the text (cut to fit), `end`."""
    tokens_BL, segments_BL = np.zeros((2, len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        ids = np.concatenate([np.array(first, np.int32), ids[: length - 1 - len(first)], [end]])
        tokens_BL[row, : len(ids)], segments_BL[row, : len(ids)] = ids, 1
    positions_BL = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))
    return {"tokens": tokens_BL, "segments": segments_BL, "positions": positions_BL}


def given_texts(texts: Sequence[np.ndarray], *, length: int, pad: int | None = None) -> Batch:
    """Ids that are complete -> `tokens`, `segments`, `positions` int32 [B, L], cut to fit.

    Args:
        pad: an id that transformers takes for padding at a text's end; of a text of nothing else one stays.

    Raises:
        InputError: a text without ids.
    """
    tokens_BL, segments_BL = np.zeros((2, len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        ids = ids[:length]
        while pad is not None and len(ids) > 1 and ids[-1] == pad:
            ids = ids[:-1]
        if not len(ids):
            raise InputError(f"text {row} is empty, and this tokenizer puts nothing around it; give a text")
        tokens_BL[row, : len(ids)], segments_BL[row, : len(ids)] = ids, 1
    positions_BL = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))
    return {"tokens": tokens_BL, "segments": segments_BL, "positions": positions_BL}
