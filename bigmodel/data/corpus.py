"""The tokenizer of a config, and documents packed into windows of token ids.

The documents form one stream, `SEP d1 SEP d2 ... dn SEP`. Example i is the window [i L, i L + L + 1): its
inputs are all but the last token, its targets all but the first. So every byte and every end of a document
is a target exactly once, and nothing is one twice. A separator belongs to the document that follows it.

Shape letters: B examples, L tokens an example, N tokens in the stream.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import fitted, labels, token_cache, tokenizer_files
from bigmodel.data.pretrained import Pretrained
from bigmodel.data.source import Source
from bigmodel.data.sources import open_source
from bigmodel.data.tokenizers import BPE, LONGEST_TOKEN_BYTES, Bytes, Tokenizer
from bigmodel.disk import cache_dir, locked

log = logging.getLogger("bigmodel")

CHUNK_BYTES = 4 << 20  # text encoded at once: bounds memory, keeps the cores busy
FORMAT = 2  # of the token files in the cache


def special_id(tokenizer: Tokenizer, vocab_size: int, role: str) -> int:
    """The id of `mask`, `cls`, `sentinel` (the first, others counting down) or `start` (of a decoder): a
    pretrained tokenizer's own, else counted down from the end of the model's vocabulary."""
    own = {
        "mask": vocab_size - 1,
        "cls": vocab_size - 2,
        "sentinel": vocab_size - 1,
        "start": tokenizer.separator,
    }
    return int(getattr(tokenizer, "special", {}).get(role, own[role]))


def get_tokenizer(config: Config, workdir: pathlib.Path | None = None) -> Tokenizer:
    """The tokenizer of `config.data.tokenizer`; BPE is trained on the training split, once.

    A trained one is kept as `tokenizer.json` in the workdir (and in the cache), and read from there later; of
    another's (hf:DIR) the workdir keeps a copy.

    Raises:
        InputError: a workdir with another tokenizer than training used, or bad data.
    """
    tokenizer = _tokenizer(config, workdir)
    used = fitted.read(workdir).get("tokenizer", tokenizer.fingerprint)
    if used != tokenizer.fingerprint:
        raise InputError(
            f"data.tokenizer={config.data.tokenizer!r} is {tokenizer.fingerprint}, but {workdir} was trained "
            f"with {used}; restore its tokenizer.json, or use a new --workdir"
        )
    return tokenizer


def _tokenizer(config: Config, workdir: pathlib.Path | None) -> Tokenizer:
    kind, _, size_text = config.data.tokenizer.partition(":")
    if kind == "bytes":
        return Bytes()
    saved = workdir and pathlib.Path(workdir) / "tokenizer.json"
    if kind == "hf":
        return _pretrained(pathlib.Path(size_text), saved)
    size = int(size_text)
    if size < 257:
        raise InputError(f"data.tokenizer='bpe:{size}' is too small: 256 bytes and a separator make 257")
    if saved and saved.is_file():
        tokenizer = BPE.load(saved)
        if tokenizer.vocab_size > size:
            raise InputError(
                f"data.tokenizer={config.data.tokenizer!r}, but {saved} has {tokenizer.vocab_size} tokens; "
                f"set data.tokenizer=bpe:{tokenizer.vocab_size} or use another workdir"
            )
        if tokenizer.vocab_size < size:
            log.warning("%s has %d tokens, fewer than %s", saved, tokenizer.vocab_size, config.data.tokenizer)
        return tokenizer
    tokenizer = _trained(config, size)
    if saved:
        tokenizer.save(saved)
    return tokenizer


def _pretrained(directory: pathlib.Path, saved: pathlib.Path | None) -> Pretrained:
    """The workdir's copy, so that a run can be moved; at first what is copied."""
    if saved and saved.is_file():
        return Pretrained.load(saved)
    file = directory / "tokenizer.json" if directory.suffix != ".json" else directory
    if not file.is_file():
        raise InputError(
            f"{file} does not exist, which data.tokenizer=hf:{directory} asks for; put the model's "
            "tokenizer.json there, or set data.tokenizer (bytes, bpe:VOCAB_SIZE, hf:DIR)"
        )
    tokenizer = Pretrained.load(file, borrowed=True)
    if saved:
        tokenizer_files.keep(tokenizer_files.home(file), saved.parent / tokenizer_files.ORIGIN)
        tokenizer.save(saved)
    return tokenizer


def _trained(config: Config, size: int) -> BPE:
    """Trains, or reads what an earlier run trained on the same text."""
    source = open_text(config, config.data.split)
    if not config.data.cache:
        return BPE.train(_texts(source), size)
    path = cache_dir() / f"tokenizer-{_digest('bpe', size, LONGEST_TOKEN_BYTES, source.fingerprint)}.json"
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            log.info("training a tokenizer of %d tokens on %s", size, source.fingerprint)
            BPE.train(_texts(source), size).save(path)
    return BPE.load(path)


def open_text(config: Config, split: str) -> Source:
    """The source of documents, each as `text`. Raises InputError for a dataset without text."""
    d = config.data
    how = labels.reading(config)
    how["only"], how["required"] = (), (d.text,) if d.name.startswith("text:") else ()
    source = open_source(d.name, split, d.data_dir, keys=(d.text,), **how)
    if d.text not in source.features:
        raise InputError(
            f"data.name={d.name!r} has no feature {d.text!r}, which task.name={config.task.name} needs; set "
            f"data.text to one of {', '.join(source.features)}"
        )
    return source if d.text == "text" else _Column(source, d.text)


class _Column:
    """One text column of a source, as `text`."""

    def __init__(self, source: Source, key: str) -> None:
        self._source, self._key, self.features = source, key, {"text": source.features[key]}
        self.fingerprint, self.num_bytes = f"{source.fingerprint} text={key}", source.num_bytes
        self.split_rule = source.split_rule

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"text": self._source.read(indices)[self._key]}


# ------------------------------------------------------------------------------------------- token stream


def token_stream(source: Source, tokenizer: Tokenizer, *, cache: bool = True) -> np.ndarray:
    """All documents as one array of ids (N,), uint16 or uint32: `SEP d1 SEP ... dn SEP`.

    With `cache` it is a file mapped into memory, encoded once for each (source, tokenizer); one that is not
    as it was written is made anew.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    if not cache:
        return np.concatenate([chunk.astype(dtype) for chunk in _encoded(source, tokenizer)])
    path = cache_dir() / f"tokens-{_digest(FORMAT, source.fingerprint, tokenizer.fingerprint)}.bin"
    with locked(path.with_suffix(".lock")):
        found = token_cache.open_checked(path, dtype)
        if isinstance(found, str):
            if found:
                log.warning("%s is not used: %s; it is made anew", path, found)
            token_cache.write(path, (chunk.astype(dtype) for chunk in _encoded(source, tokenizer)))
            found = token_cache.open_checked(path, dtype)
        if isinstance(found, str):
            raise InputError(f"{path} cannot be read back: {found or 'it is gone'}; check the disk")
    return found


def _encoded(source: Source, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Pieces of the stream, in order; one piece of text is in memory at a time."""
    separator = np.array([tokenizer.separator])
    done, reported = 0, time.monotonic()
    log.info("encoding %s with %s", source.fingerprint, tokenizer.fingerprint)
    yield separator
    for texts in _chunks(source):
        parts = [part for ids in tokenizer.encode_all(texts) for part in (ids, separator)]
        yield np.concatenate(parts)
        done += len(texts)
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            log.info("encoding: %d of %d documents", done, len(source))


def _chunks(source: Source) -> Iterator[list[bytes]]:
    """Documents in order, about `CHUNK_BYTES` at once."""
    chunk: list[bytes] = []
    step = max(1, min(256, len(source) * CHUNK_BYTES // max(source.num_bytes, 1)))
    for start in range(0, len(source), step):
        chunk += source.read(np.arange(start, min(start + step, len(source))))["text"].tolist()
        if sum(map(len, chunk)) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _texts(source: Source) -> Iterator[str]:
    for chunk in _chunks(source):
        yield from (text.decode("utf-8") for text in chunk)


# ------------------------------------------------------------------------------------------------ packing


class Packed:
    """The windows of a token stream, by index."""

    def __init__(self, stream: np.ndarray, tokenizer: Tokenizer, seq_len: int) -> None:
        """Args: stream: (N,) ids; a file's are checked as they are read; seq_len: L."""
        self._file = stream if isinstance(stream, token_cache.TokenFile) else None
        if self._file is not None:
            self._file.check(np.array([len(stream) // seq_len * seq_len]), np.array([len(stream) - 1]))
        self._separator, self._first = tokenizer.separator, tokenizer.first
        self._token_bytes, self._first_bytes = tokenizer.token_bytes, tokenizer.first_bytes
        self._seq_len = seq_len
        targets = len(stream) - 1
        self._len, self._full = -(-targets // seq_len), targets // seq_len
        rest = stream[self._full * seq_len :]
        self._last_valid = len(rest) - 1  # targets in the last window, when it is not full
        self._last = np.zeros(seq_len + 1, stream.dtype)
        self._last[: len(rest)] = rest
        self._windows = (
            np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len] if self._full else None
        )

    def __len__(self) -> int:
        return self._len

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """(B,) window numbers -> arrays (B, L).

        `tokens`, `targets` int32; `segments` int32, which document of the window (1, 2, ...), 0 is padding;
        `positions` int32 within the segment; `target_bytes` uint8, bytes of text a target stands for.

        Raises:
            InputError: an id that the tokenizer does not have, from a damaged token file.
        """
        window = np.tile(self._last, (len(indices), 1))
        full = np.asarray(indices) < self._full
        if self._file is not None:
            first = np.asarray(indices)[full] * self._seq_len
            self._file.check(first, first + self._seq_len)
        if self._windows is not None:
            window[full] = self._windows[indices[full]]
        if (largest := window.max(initial=0)) >= len(self._token_bytes):
            # Unnoticed, it would clamp or turn into NaN on the device.
            raise InputError(
                f"token id {largest} is not one of data.tokenizer's {len(self._token_bytes)}: "
                f"the token files in {cache_dir()} are damaged; remove them"
            )
        tokens, targets = window[:, :-1].astype(np.int32), window[:, 1:].astype(np.int32)
        starts = tokens == self._separator
        segments = np.cumsum(starts, axis=1, dtype=np.int32) + ~starts[:, :1]
        offset = np.arange(self._seq_len, dtype=np.int32)
        positions = offset - np.maximum.accumulate(np.where(starts, offset, 0), axis=1)
        valid = full[:, None] | (offset < self._last_valid)
        target_bytes = np.where(starts, self._first_bytes[targets], self._token_bytes[targets])
        tokens = np.where(starts, np.int32(self._first), tokens)  # after the separator as the model knows it
        out = {"tokens": tokens, "targets": targets, "target_bytes": target_bytes}
        out |= {"segments": segments.astype(np.int32), "positions": positions}
        return {key: np.where(valid, value, value.dtype.type(0)) for key, value in out.items()}


# --------------------------------------------------------------------------------------------------- files


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def is_byte_level(tokenizer: object) -> bool:
    """True if each id is a string of bytes, whatever the ids next to it."""
    return isinstance(tokenizer, Bytes | BPE) or (isinstance(tokenizer, Pretrained) and tokenizer.byte_level)


def bytes_of(tokenizer: Tokenizer, index: int) -> bytes | None:
    """An id's bytes of UTF-8, which may be a part of a character; None for special ids, and where the
    tokenizer writes no bytes."""
    if isinstance(tokenizer, Bytes):
        return bytes([index]) if 0 <= index < 256 else None
    return tokenizer.bytes_at(index) if isinstance(tokenizer, BPE | Pretrained) else None
