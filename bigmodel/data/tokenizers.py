"""Tokenizers of this package: bytes, and byte-pair encodings that it trains."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from bigmodel.config import InputError
from bigmodel.disk import write_atomically

SEPARATOR = "<|endoftext|>"
LONGEST_TOKEN_BYTES = 128  # so that the bytes of a token fit uint8


class Tokenizer(Protocol):
    """Text <-> ids. Only `separator` marks the end of a document; no text encodes to it."""

    vocab_size: int
    token_bytes: np.ndarray  # uint8 (vocab_size,): the bytes of text an id stands for; separator 0
    fingerprint: str

    @property
    def first_bytes(self) -> np.ndarray:
        """Returns `token_bytes` for the first id of a document."""
        ...

    @property
    def separator(self) -> int:
        """Ends a document."""
        ...

    @property
    def first(self) -> int:
        """The id before a document's first one; mostly the separator."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (n,), without a separator. Raises InputError for lone surrogates."""
        ...

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Many UTF-8 documents -> their ids."""
        ...

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Ids -> text; what is no UTF-8, or no id, becomes U+FFFD."""
        ...

    def prompt(self, text: str, plain: bool = False) -> np.ndarray:
        """A text that an answer continues -> int32 ids, with what stands before a document.

        Args:
            plain: names of special tokens in it are text, whoever wrote it.
        """
        ...

    def written(self, ids: np.ndarray | Sequence[int], before: np.ndarray | Sequence[int] = ()) -> str:
        """An answer's ids -> its text, as it goes on after the ids `before`."""
        ...


class Own:
    """Base of the tokenizers of this package: one separator before, between and after documents."""

    separator: int
    token_bytes: np.ndarray

    @property
    def first(self) -> int:
        return self.separator

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.separator,)

    @property
    def first_bytes(self) -> np.ndarray:
        return self.token_bytes

    def prompt(self: Any, text: str, plain: bool = False) -> np.ndarray:
        return np.concatenate([[self.separator], self.encode(text)]).astype(np.int32)

    def written(self: Any, ids: np.ndarray | Sequence[int], before: np.ndarray | Sequence[int] = ()) -> str:
        numbers = np.asarray(ids).tolist()
        ended = self.separator in numbers
        return str(self.decode(numbers[: numbers.index(self.separator)] if ended else numbers))


class Bytes(Own):
    """Ids 0..255 are the bytes of UTF-8, 256 is the separator."""

    vocab_size = 257
    separator = 256
    fingerprint = "bytes"
    token_bytes = np.array([1] * 256 + [0], np.uint8)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        numbers = np.asarray(ids).tolist()
        return _join(bytes([i]) if 0 <= i < 256 else _special(i, self.separator) for i in numbers)


class BPE(Own):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2's pre-tokenizer), by `tokenizers`."""

    def __init__(self, text: str) -> None:
        """Args: text: the JSON of `tokenizers.Tokenizer`, as `save` writes it."""
        from tokenizers import Tokenizer as Model

        self.json = text
        self._model: Any = Model.from_str(text)
        self._model.encode_special_tokens = True  # "<|endoftext|>" inside a document is text like any other
        separator = self._model.token_to_id(SEPARATOR)
        if separator is None:
            raise ValueError(f"it has no token {SEPARATOR}")
        self.separator = separator
        self.vocab_size: int = self._model.get_vocab_size()
        self.fingerprint = f"bpe:{self.vocab_size} sha256={hashlib.sha256(text.encode()).hexdigest()[:16]}"
        # `tokenizers` writes each byte as one printable character.
        alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
        tokens = [self._model.id_to_token(i) or "" for i in range(self.vocab_size)]
        self._bytes = [b"" if t == SEPARATOR else bytes(alphabet[char] for char in t) for t in tokens]
        self.token_bytes = np.array([len(token) for token in self._bytes], np.uint8)

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> BPE:
        """Learns `vocab_size` tokens (fewer where the text is short), the separator being the last."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

        model: Any = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            show_progress=False,
            initial_alphabet=byte_alphabet(),
            max_token_length=LONGEST_TOKEN_BYTES,
        )
        model.train_from_iterator(texts, trainer)
        model.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
        return cls(model.to_str(pretty=True))

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.array(self._model.encode(text).ids, np.int32)

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encoded = self._model.encode_batch_fast([text.decode("utf-8") for text in texts])
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        known, separator, numbers = range(self.vocab_size), self.separator, np.asarray(ids).tolist()
        plain = (self._bytes[i] if i in known and i != separator else None for i in numbers)
        return _join(_special(i, separator) if b is None else b for i, b in zip(numbers, plain, strict=True))

    def bytes_at(self, index: int) -> bytes | None:
        """See `corpus.bytes_of`."""
        return self._bytes[index] if 0 <= index < self.vocab_size and index != self.separator else None

    def save(self, path: pathlib.Path) -> None:
        """Writes JSON that `tokenizers.Tokenizer.from_file` reads too."""
        write_atomically(path, lambda file: file.write(self.json.encode()))

    @classmethod
    def load(cls, path: pathlib.Path) -> BPE:
        """Raises InputError for a file that is no saved tokenizer."""
        try:
            return cls(path.read_text("utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise InputError(
                f"tokenizer file {path} cannot be read: {' '.join(str(error).split())[:200]}"
            ) from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds a lone surrogate at character {error.start}, which is not Unicode text"
        ) from None


def _special(index: int, separator: int) -> bytes:
    return (SEPARATOR if index == separator else "\ufffd").encode()


def _join(pieces: Any) -> str:
    return b"".join(pieces).decode("utf-8", errors="replace")


@functools.cache
def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte, in byte order (as in GPT-2's encoder.py)."""
    from tokenizers import pre_tokenizers

    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    chars = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(other)}
    assert set(chars.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [chars[byte] for byte in range(256)]
