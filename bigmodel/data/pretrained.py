"""A tokenizer that someone else trained: tokenizer.json and what the files beside it say."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel.config import InputError
from bigmodel.data import backends, chat, generation, tokenizer_files
from bigmodel.data.tokenizer_files import TokenizerFiles
from bigmodel.data.tokenizers import byte_alphabet
from bigmodel.disk import write_atomically

# The names that families give to what ends a text, in order of preference, and to what a task needs.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
SPECIAL = {"mask": ("[MASK]", "<mask>"), "cls": ("[CLS]", "<s>"), "sentinel": ("<extra_id_0>",),
           "start": ("<pad>",)}  # fmt: skip
ALPHABET = {char: byte for byte, char in enumerate(byte_alphabet())}
CONTEXT = 8  # ids before an answer that its first characters may depend on


class Pretrained:
    """A tokenizer from Hugging Face's files.

    Inside a document a special token's name is plain text; prompts and a classifier's texts are read as
    transformers reads them.

    Bytes of text are counted token by token: exactly for byte-level BPE and sentencepiece; for WordPiece,
    which drops spaces and may drop case, the letters'.

    Raises InputError for JSON that is no tokenizer, and for what the files say that is not supported.
    """

    def __init__(self, text: str, where: str, files: TokenizerFiles | None = None) -> None:
        """
        Args:
            text: the JSON.
            where: its file, for messages.
            files: those beside it; None: there are none.
        """
        self._json, self.where, self.files = text, where, files or TokenizerFiles()
        made = backends.build(text, where, self.files)
        self.model, self.named = made.pipeline, made.named
        self.model.no_padding()
        self.model.no_truncation()
        self.model.encode_special_tokens = True
        self._vocabulary: dict[str, int] = self.model.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise InputError(f"tokenizer file {where} has no tokens; fetch it again")
        self.vocab_size = max(self._vocabulary.values()) + 1
        self._end = self._find_end()
        self.special = self._roles()
        self.ends = self._answer_ends()
        self._front, self._back = self._around()
        self._unwritten = {id for id, token in self.model.get_added_tokens_decoder().items() if token.special}
        self.token_bytes, self.first_bytes = self._bytes()
        self.fingerprint = self._fingerprint(made.rebuilt)

    @property
    def imported(self) -> bool:
        """It came with the model, which therefore reads texts as transformers gives them."""
        return self.files.imported

    @property
    def separator(self) -> int:
        """The id that ends a document. Raises InputError where the files name none."""
        if self._end is None:
            raise InputError(
                f"tokenizer file {self.where} names nothing that ends a text; write its eos_token into "
                "tokenizer_config.json beside it"
            )
        return self._end

    @property
    def first(self) -> int:
        """The id before a document's first: what the tokenizer puts before a text, else the separator."""
        return self._front[0] if self._follows_files and len(self._front) == 1 else self.separator

    @property
    def _follows_files(self) -> bool:
        """False in workdirs that kept tokenizer.json alone: a separator stood before their documents."""
        return bool(self.files.where)

    def name(self, id: int) -> str | None:
        """A token's text in tokenizer.json."""
        found: str | None = self.model.id_to_token(id)
        return found

    @property
    def text_ids(self) -> int:
        """One more than the largest id of a document's text and its ends; special tokens may lie beyond."""
        ends = [] if self._end is None else [self._end, self.first]
        return 1 + max([*ends, *(id for id in self._vocabulary.values() if id not in self._unwritten)])

    @property
    def trailing_pad(self) -> int | None:
        """The id that transformers' classifiers skip at a text's end."""
        pad = self.files.model.get("pad_token_id")
        return pad if isinstance(pad, int) else None

    # ------------------------------------------------------------------------------------------- what it says

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._vocabulary.get(token)

    def _find_end(self) -> int | None:
        found = self._id(self.named.get("eos_token"))
        found = self._id(self.named.get("sep_token")) if found is None else found
        if found is None and (ids := _ids(self.files.model.get("eos_token_id"))) and ids[0] < self.vocab_size:
            found = ids[0]
        known = (self._vocabulary[name] for name in ENDS if name in self._vocabulary)
        return next(known, None) if found is None else found

    def _roles(self) -> dict[str, int]:
        vocabulary = self._vocabulary
        out = {
            role: vocabulary[name] for role, names in SPECIAL.items() for name in names if name in vocabulary
        }
        for role in ("mask", "cls"):
            if (found := self._id(self.named.get(f"{role}_token"))) is not None:
                out[role] = found
        for source in (self.files.model, self.files.generation):
            if isinstance(start := source.get("decoder_start_token_id"), int):
                out["start"] = start
        return out

    def _answer_ends(self) -> tuple[int, ...]:
        """The ids that end an answer, as transformers' generate finds them; else the separator."""
        for source in (self.files.generation, self.files.model):
            if ids := _ids(source.get("eos_token_id")):
                return tuple(ids)
        return () if self._end is None else (self._end,)

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before a text and after it."""
        text = next((name for name in ("a", "e", ".", "0") if self._plain(name)), "a")
        inner = self._plain(text)
        ids = self.model.encode(text, add_special_tokens=True).ids
        at = next((i for i in range(len(ids) - len(inner) + 1) if ids[i : i + len(inner)] == inner), len(ids))
        return (ids[:at], ids[at + len(inner) :]) if inner else (ids, [])

    def _fingerprint(self, rebuilt: bool) -> str:
        known = [self._vocabulary[name] for name in ENDS if name in self._vocabulary]
        as_before = not rebuilt and self._end == next(iter(known), None)
        text = self._json if as_before else f"{self.model.to_str()} {self._end}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        first = f" first={self.first}" if self._end is not None and self.first != self._end else ""
        return f"hf:{self.vocab_size} sha256={digest}{first}"

    # ------------------------------------------------------------------------------------------------- bytes

    def _bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (vocab_size,) twice: bytes of text that an id stands for; and where it is a text's first."""
        anywhere, first = np.zeros((2, self.vocab_size), np.uint8)
        decoder = json.loads(self.model.to_str()).get("decoder") or {}
        parts = list(_parts(decoder))
        kinds = self._decoders = {str(part.get("type")) for part in parts}
        added = {id: token.content for id, token in self.model.get_added_tokens_decoder().items()}
        strips = any(part.get("type") == "Strip" and part.get("start") for part in parts) or any(
            part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
            for part in parts
        )
        for name, index in self._vocabulary.items():
            if index in self._unwritten:
                continue
            size = len(name.encode()) if index in added else _bytes_of(name, kinds)
            anywhere[index] = min(size, 255)
            starts = strips and index not in added and name.startswith(("▁", " "))
            first[index] = anywhere[index] - starts
        return anywhere, first

    # ---------------------------------------------------------------------------------------------- encoding

    def _plain(self, text: str) -> list[int]:
        return list(self.model.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids, without special tokens. Raises InputError for lone surrogates."""
        return np.array(self._plain(_checked(text)), np.int32)

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8") for text in texts]
        encoded = self.model.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    @functools.cached_property
    def _reader(self) -> Any:
        """The pipeline that knows special tokens inside a text, as transformers does."""
        from tokenizers import Tokenizer

        made: Any = Tokenizer.from_str(self.model.to_str())
        made.encode_special_tokens = bool(self.files.config.get("split_special_tokens", False))
        return made

    def prompt(self, text: str, plain: bool = False) -> np.ndarray:
        """A text that an answer continues -> transformers' ids; of a model that was trained here, with what
        stood before a document in training. `plain`: special tokens' names in it are text."""
        reader = self.model if plain else self._reader
        ids = reader.encode(_checked(text), add_special_tokens=self.imported).ids
        if not self.imported:
            return np.array([self.first, *ids], np.int32)
        return np.array(ids or [self._start_of_nothing()], np.int32)

    def _start_of_nothing(self) -> int:
        """The id with which transformers' generate starts an empty prompt: bos, else the separator."""
        sources = (self.files.generation, self.files.model)
        ids = [source["bos_token_id"] for source in sources if isinstance(source.get("bos_token_id"), int)]
        return ids[0] if ids else self.separator

    def texts(self, texts: Sequence[str | bytes | np.ndarray], length: int) -> list[np.ndarray]:
        """Texts that stand alone, or the ids inside of them -> transformers' ids, cut to `length`."""
        reader, room = self._cut(length), length - len(self._front) - len(self._back)
        out = []
        for text in texts:
            if isinstance(text, np.ndarray):
                out.append(np.array([*self._front, *text[: max(room, 0)], *self._back], np.int32)[:length])
                continue
            plain = _checked(text.decode("utf-8") if isinstance(text, bytes) else text)
            out.append(np.array(reader.encode(plain).ids, np.int32))
        return out

    @functools.lru_cache(maxsize=2)  # noqa: B019 -- a tokenizer lives as long as its run
    def _cut(self, length: int) -> Any:
        from tokenizers import Tokenizer

        made: Any = Tokenizer.from_str(self.model.to_str())
        made.encode_special_tokens = self._reader.encode_special_tokens
        made.enable_truncation(length, direction=str(self.files.config.get("truncation_side") or "right"))
        return made

    # ------------------------------------------------------------------------------------------------- chats

    @functools.cached_property
    def chats(self) -> chat.Chats | None:
        """The chat template; None where the files have none. Raises InputError if it is no template."""
        return (
            chat.Chats(self.files.templates, self.named, self.files.where) if self.files.templates else None
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> np.ndarray:
        """Messages -> ids, as transformers' `apply_chat_template` with a generation prompt and
        `sanitize_control_tokens`: only the template itself writes special tokens.

        Raises:
            InputError: the template refuses the messages.
        """
        assert self.chats is not None
        added = self.model.get_added_tokens_decoder().values()
        listed = self.files.config.get("chat_control_tokens")
        control = self.chats.control_tokens(added, listed)
        text = self.chats.render(messages, control, **variables)
        return np.array(chat.encode_marked(self._reader, _checked(text)), np.int32)

    def drawing(self) -> dict[str, Any]:
        """Returns the authors' settings of sampling (generation.py); {} if the model came without them."""
        return generation.defaults(self.files.generation, self.files.where) if self.imported else {}

    # ---------------------------------------------------------------------------------------------- decoding

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Ids -> text; special tokens as they are named, what is no id as U+FFFD."""
        numbers = np.asarray(ids).tolist()
        if all(0 <= i < self.vocab_size and self.model.id_to_token(i) is not None for i in numbers):
            return str(self.model.decode(numbers, skip_special_tokens=False))
        out, run = [], list[int]()
        for index in [*numbers, None]:
            if (
                index is not None
                and 0 <= index < self.vocab_size
                and self.model.id_to_token(index) is not None
            ):
                run.append(index)
                continue
            out.append(self.model.decode(run, skip_special_tokens=False) if run else "")
            out.append("" if index is None else "\ufffd")
            run = []
        return "".join(out)

    @property
    def byte_level(self) -> bool:
        """True if its tokens are written in the characters that stand for bytes."""
        return "ByteLevel" in self._decoders

    def bytes_at(self, index: int) -> bytes | None:
        """See `corpus.bytes_of`."""
        name = self.model.id_to_token(index) if 0 <= index < self.vocab_size else None
        if name is None or index in self._unwritten:
            return None
        if self.byte_level:
            return bytes(ALPHABET[char] for char in name) if ALPHABET.keys() >= set(name) else None
        return bytes([int(name[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", name) else None

    def written(self, ids: np.ndarray | Sequence[int], before: np.ndarray | Sequence[int] = ()) -> str:
        """An answer's text without its special tokens, as it goes on after the ids `before`."""
        numbers = [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < self.vocab_size]
        lead = [i for i in np.asarray(before, np.int64).tolist()[-CONTEXT:] if 0 <= i < self.vocab_size]
        head = self._display(lead).rstrip("\ufffd") if lead else ""
        text = self._display([*lead, *numbers])
        return text[len(head) :] if text.startswith(head) else self._display(numbers)

    def _display(self, ids: list[int]) -> str:
        text = str(self.model.decode(ids, skip_special_tokens=True))
        config = self.files.config
        forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        if config.get("clean_up_tokenization_spaces") and (
            type(self.model.model).__name__ != "BPE" or forced
        ):
            for spaced, close in CLEAN_UP.items():
                text = text.replace(spaced, close)
        return text

    # ------------------------------------------------------------------------------------------------- files

    def save(self, path: pathlib.Path) -> None:
        """Writes tokenizer.json as it came; the files beside it are kept by `tokenizer_files.keep`."""
        write_atomically(path, lambda file: file.write(self._json.encode()))

    @classmethod
    def load(cls, path: pathlib.Path, borrowed: bool = False) -> Pretrained:
        """A workdir's tokenizer.json, with the files in its `huggingface/`; or one of another directory.

        Args:
            borrowed: for a model that did not come with it.

        Raises InputError if the file is missing, or as the class.
        """
        files = tokenizer_files.read(tokenizer_files.home(path), with_model=not borrowed)
        try:
            return cls(path.read_text("utf-8"), str(path), files)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"tokenizer file {path} cannot be read: {error}") from error


CLEAN_UP = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
    " 've": "'ve", " 're": "'re",
}  # fmt: skip


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = f"text holds a lone surrogate at character {error.start}"
        raise InputError(f"{at}, which is not Unicode text") from None
    return text


def _ids(value: Any) -> list[int]:
    """An id, or a list of them, as config.json and generation_config.json have them."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _parts(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        for part in decoder.get("decoders", []):
            yield from _parts(part)
    else:
        yield decoder


def _bytes_of(name: str, kinds: set[str]) -> int:
    """Bytes of text that a token of the vocabulary stands for, by its name and the decoder's parts."""
    if "ByteLevel" in kinds:  # writes each byte as one character
        return len(name)
    if "WordPiece" in kinds:
        return len(name.removeprefix("##").encode())
    if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return 1
    return len(name.replace("</w>", " " if "BPEDecoder" in kinds else "</w>").replace("▁", " ").encode())
