"""A tokenizer that someone else trained: any `tokenizer.json` that the `tokenizers` library reads."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigmodel.config import InputError
from bigmodel.disk import write_atomically

# The names that families give to what ends a text, in order of preference, and to what a task needs.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
SPECIAL = {"mask": ("[MASK]", "<mask>"), "cls": ("[CLS]", "<s>"), "sentinel": ("<extra_id_0>",),
           "start": ("<pad>",)}  # fmt: skip


@functools.cache
def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte, in byte order (as in GPT-2's encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    chars = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(other)}
    return [chars[byte] for byte in range(256)]


class Pretrained:
    """As `text.Tokenizer`. A special token's name inside a text is text like any other.

    Bytes of text are counted token by token: exactly for byte-level BPE; for WordPiece, which drops spaces
    and may drop case, the letters'.

    Raises InputError for JSON that is no tokenizer, or has no token that ends a text.
    """

    def __init__(self, text: str, where: str) -> None:
        """Args: text: the JSON; where: its file, for messages."""
        from tokenizers import Tokenizer as Model

        try:
            self.model: Any = Model.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exception
            why = " ".join(str(error).split())[:200]
            raise InputError(f"tokenizer file {where} cannot be read: {why}") from error
        self._json = text
        self.model.no_padding()
        self.model.no_truncation()
        self.model.encode_special_tokens = True
        vocabulary: dict[str, int] = self.model.get_vocab(with_added_tokens=True)
        self.separator = next((vocabulary[name] for name in ENDS if name in vocabulary), -1)
        if self.separator < 0:
            raise InputError(f"tokenizer file {where} has none of {', '.join(ENDS)}, to end a text with")
        self.special = {
            role: vocabulary[name] for role, names in SPECIAL.items() for name in names if name in vocabulary
        }
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = f"hf:{self.vocab_size} sha256={hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._unwritten = {id for id, token in self.model.get_added_tokens_decoder().items() if token.special}
        self.token_bytes = np.zeros(self.vocab_size, np.uint8)
        for name, index in vocabulary.items():
            if index not in self._unwritten:
                self.token_bytes[index] = min(self._bytes_of(name), 255)

    def _bytes_of(self, name: str) -> int:
        decoder = type(self.model.decoder).__name__
        if decoder == "ByteLevel":  # writes each byte as one character
            return len(name)
        if decoder == "WordPiece":
            return len(name.removeprefix("##").encode())
        return 1 if name.startswith("<0x") and len(name) == 6 else len(name.replace("▁", " ").encode())

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids, without special tokens. Raises InputError for lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            at = f"text holds a lone surrogate at character {error.start}"
            raise InputError(f"{at}, which is not Unicode text") from None
        return np.array(self.model.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8") for text in texts]
        encoded = self.model.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Ids -> text; special tokens as they are named, what is no id as U+FFFD."""
        numbers, out, run = np.asarray(ids).tolist(), [], []
        for index in [*numbers, None]:
            if index is not None and index not in self._unwritten and 0 <= index < self.vocab_size:
                run.append(index)
                continue
            out.append(self.model.decode(run) if run else "")
            run = []
            if index is not None:
                out.append(self.model.id_to_token(index) or "\ufffd" if index >= 0 else "\ufffd")
        return "".join(out)

    def bytes_at(self, index: int) -> bytes | None:
        """As `text.bytes_of`."""
        name = self.model.id_to_token(index) if 0 <= index < self.vocab_size else None
        if name is None or index in self._unwritten:
            return None
        if type(self.model.decoder).__name__ == "ByteLevel":
            alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
            return bytes(alphabet[char] for char in name) if alphabet.keys() >= set(name) else None
        return bytes([int(name[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", name) else None

    def save(self, path: pathlib.Path) -> None:
        write_atomically(path, lambda file: file.write(self._json.encode()))

    @classmethod
    def load(cls, path: pathlib.Path) -> Pretrained:
        """Raises InputError if the file is missing, or as the class."""
        try:
            return cls(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"tokenizer file {path} cannot be read: {error}") from error
