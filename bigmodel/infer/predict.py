"""Predictions of a trained model for raw inputs: images, texts or rows of numbers in, plain values out.

What an input has to be follows from what the model's batches hold: `image` (a file, or base64 of one, or
nested lists of bytes), `tokens` (text), a table's columns, `user` and `item` as the ratings call them, the
`serial` number of a GAN's image. Keys that only training needs are zeros.

Legend: B batch, L length, D width, V classes.
"""

from __future__ import annotations

import base64
import binascii
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import data, mesh, tasks, trees
from bigmodel.config import Config, InputError
from bigmodel.data import boxes as box_data
from bigmodel.data import cells, labels, ratings, tables, transforms
from bigmodel.data.tables import Columns
from bigmodel.data.tokenizers import Tokenizer
from bigmodel.infer import decode, generate, image_files, loading
from bigmodel.infer.sampling import GREEDY
from bigmodel.program import Program, State
from bigmodel.tasks.base import Row
from bigmodel.tasks.text import embedding

TABLE = {"numeric", "categorical"}


class Predictor:
    """A model's compiled forward pass at the config's batch size; the last batch of many inputs is padded."""

    def __init__(
        self, program: Program, state: State, *, names: Sequence[str] = (),
        tokenizer: Tokenizer | None = None, columns: Columns | None = None,
        ids: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            names: of the classes; none: their numbers.
            tokenizer: of a model that reads text.
            columns: of a model that reads rows of a table.
            ids: of users and items by name, of a model that reads those.

        Raises:
            InputError: the model writes text, which `infer.Writer` does.
        """
        if program.config.task.generates:
            raise InputError(
                f"model.name={program.config.model.name} with task.name={program.config.task.name} writes "
                "text; use scripts/generate.py"
            )
        self.program, self.names, self.tokenizer = program, names, tokenizer
        self.columns, self.ids = columns, ids
        self._task = program.task
        self.decode_image: Callable[[bytes, int], np.ndarray] = image_files.decode
        self._state = (program.evaluated(state), state["rest"])
        here = mesh.replicated(program.mesh)
        self._forward = jax.jit(program.on_mesh(self._outputs), out_shardings=here)

    @classmethod
    def load(cls, directory: pathlib.Path, step: int | None = None) -> Predictor:
        """The run in `directory`. Raises InputError as `infer.load`."""
        return cls.of(*loading.load(directory, step), directory)

    @classmethod
    def of(cls, program: Program, state: State, directory: pathlib.Path) -> Predictor:
        """A run that is loaded already, with what its directory knows of names and tokens."""
        config, spec = program.config, program.batch_spec
        return cls(
            program, state,
            names=tasks.class_names(config, directory) if spec.keys() & {"label", "labels"} else (),
            tokenizer=data.get_tokenizer(config, directory) if "tokens" in spec else None,
            columns=tables.fitted(config, directory) if spec.keys() & TABLE else None,
            ids=ratings.ids(config, data.Facts(config, directory)) if "user" in spec else None,
        )  # fmt: skip

    @property
    def reads(self) -> str:
        """`text`, `image` or `row`."""
        spec = self.program.batch_spec
        if "serial" in spec:  # a GAN's batch has images too
            return "row"
        return "image" if "image" in spec else "text" if "tokens" in spec else "row"

    @property
    def rows(self) -> int:
        """The most inputs that one pass takes."""
        return self.program.config.batch_size

    def warm(self) -> None:
        """Compiles the forward pass, so that no input waits for it."""
        self._outputs_of([])

    def predict(self, inputs: Sequence[Any]) -> tuple[list[Row], int]:
        """-> (a row for each input, how many tokens were read).

        Raises:
            InputError: an input the model cannot read or has no finite answer for, by its number.
        """
        return self._in_batches(inputs, self.predicted)

    def embed(self, inputs: Sequence[Any]) -> tuple[list[list[float]], int]:
        """-> (a vector of length 1 for each text, how many tokens were read): the mean over its hidden states
        (Reimers and Gurevych 2019). A text, or its ids, is cut at `seq_len`.

        Raises:
            InputError: as `predict`, or for a model without any.
        """
        return self._in_batches(inputs, self.embedded)

    def _in_batches(self, inputs: Sequence[Any], run: Callable[..., tuple[list[Any], int]]) -> Any:
        rows: list[Any] = []
        tokens, size = 0, self.rows
        for first in range(0, len(inputs), size):
            part = [self.read(item, first + row) for row, item in enumerate(inputs[first : first + size])]
            new, count = run(part, first)
            rows, tokens = rows + new, tokens + count
        return rows, tokens

    def top(self, user: str, count: int, apart_from: Collection[int] = ()) -> list[Row]:
        """Returns the `count` items with the highest scores for a user, the best first: {"item", "score"}.

        Args:
            apart_from: ids of items to leave out; see `rated`.

        Raises:
            InputError: no recommender of items, a user whom training did not know, or a score that is not
                finite.
        """
        if self.ids is None:
            raise InputError(
                f"task.name={self.program.config.task.name} has no items for users; use --inputs"
            )
        user_id = labels.id_of(user, self.ids["user"], 0)
        if not user_id:
            raise InputError(f"--user={user} is not among the training ratings; give one who is")
        every = {"seen": np.zeros((self.rows, 1), np.int32)}  # scores of all items, as in evaluation
        outputs, _ = self._outputs_of([{"user": user_id}], every)
        score_V = outputs["all"][0]
        names = {at: name for name, at in self.ids["item"].items() if at not in set(apart_from)}
        ids_N = np.array(sorted(names), np.int64)
        if not np.isfinite(score_V[ids_N]).all():
            raise InputError(f"--user={user}: some scores are not finite; the run has diverged")
        best = ids_N[np.argsort(-score_V[ids_N], kind="stable")[:count]].tolist()
        return [{"item": names[at], "score": float(score_V[at])} for at in best]

    def read(self, item: Any, number: int = 0) -> dict[str, Any]:
        """One input -> its arrays of a batch. Raises InputError with its number."""
        try:
            return self._reader()(self, item)
        except (InputError, ValueError, TypeError, KeyError, OverflowError, cv2.error) as error:
            raise InputError(f"input {number}: {error}") from error

    def _reader(self) -> Callable[[Predictor, Any], dict[str, Any]]:
        spec = self.program.batch_spec
        if "serial" in spec:
            return _read_serial
        if "user" in spec:
            return _read_pair
        return {"image": _read_image, "text": _read_text, "row": _read_row}[self.reads]

    def predicted(self, read: Sequence[dict[str, Any]], first: int = 0) -> tuple[list[Row], int]:
        """`predict` of inputs that `read` gave, at most a batch's; numbered from `first` in messages."""
        return self._written(read, first, self._answer)

    def embedded(self, read: Sequence[dict[str, Any]], first: int = 0) -> tuple[list[list[float]], int]:
        """`embed` of inputs that `read` gave, at most a batch's."""
        rows, count = self._written(read, first, lambda out: embedding(out, self.program.config))
        return [row["embedding"] for row in rows], count

    def _answer(self, out: Mapping[str, np.ndarray]) -> Row:
        return self._task.answer(out, self.names, self.columns)

    def _written(
        self, read: Sequence[dict[str, Any]], first: int, write: Callable[..., Row]
    ) -> tuple[list[Row], int]:
        each, tokens = self._outputs_of(read)
        rows: list[Row] = []
        for index, arrays in enumerate(read):
            out = {key: value[index] for key, value in each.items()}
            for key, value in out.items():
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise InputError(
                        f"input {first + index}: the model's {key} is not finite; mend the input if its "
                        "numbers are far from the training data's, else the run has diverged"
                    )
            out |= {key: value for key, value in arrays.items() if key not in self.program.batch_spec}
            rows.append(write(out))
        return rows, tokens

    def _outputs_of(
        self, read: Sequence[dict[str, Any]], extra: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> tuple[dict[str, np.ndarray], int]:
        """-> (the model's outputs for a batch of inputs, how many tokens it read); `more`: other arrays."""
        size, spec = self.program.config.batch_size, self.program.batch_spec
        batch = {key: np.zeros(s.shape, s.dtype) for key, s in spec.items()} | dict(extra)
        batch["mask"] = (np.arange(size) < len(read)).astype(np.float32)
        for row, arrays in enumerate(read):
            for key in arrays.keys() & spec.keys():
                batch[key][row] = arrays[key]
        tokens = int((batch["segments"] > 0).sum()) if "segments" in batch else 0
        outputs = jax.device_get(self._forward(*self._state, self.program.put(batch)))
        return {key: value for key, value in _flat(outputs) if value.ndim and len(value) == size}, tokens

    def _outputs(self, params: Any, rest: Any, batch: Any) -> Any:
        outputs, _ = self.program.model.apply(params, rest, batch, key=None, train=False)
        out = dict(self._task.inferred(outputs))
        if "hidden" in outputs:  # one vector a text: the mean of its tokens
            real_BL1 = (batch["segments"] > 0).astype(jnp.float32)[..., None]
            hidden_BLD = outputs["hidden"].astype(jnp.float32)
            out["mean"] = (hidden_BLD * real_BL1).sum(1) / jnp.maximum(real_BL1.sum(1), 1.0)
        return jax.tree.map(lambda x: x.astype(jnp.float32), out)


class Answerer:
    """A model that writes text, asked for entire answers: greedy, up to what its context holds.

    Answers are written `rows` at a time, prompts padded to one of two lengths: so four programs are compiled.
    """

    reads, rows = "text", 4

    def __init__(self, writer: generate.Writer) -> None:
        self.writer = writer
        most = decode.context(writer.decoder.program.config)
        self.length = max(most // 2, 1) if writer.continues else most
        seq_len = writer.decoder.program.config.seq_len
        self.paddings = (-(-seq_len // 4), seq_len)

    def warm(self) -> None:
        """Compiles what `predicted` calls."""
        decoder = self.writer.decoder
        for padding in self.paddings:
            prompts = [[0] * padding] * (self.rows + 1)
            state = decoder.prefill(prompts, [self.length] * len(prompts), [GREEDY] * len(prompts))
            decoder.decode(state, 1)

    def read(self, item: Any, number: int = 0) -> dict[str, Any]:
        """A text, or a row with a column `text` -> its ids. Raises InputError with its number."""
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise InputError(f"input {number}: a text is needed, or a row with a column `text`")
        try:
            return {"ids": self.writer.encode(text)}
        except (InputError, ValueError) as error:
            raise InputError(f"input {number}: {error}") from error

    def predicted(self, read: Sequence[dict[str, Any]], first: int = 0) -> tuple[list[Row], int]:
        """At most `rows` inputs that `read` gave -> ({"text"} for each, how many tokens were read)."""
        prompts = [arrays["ids"] for arrays in read]
        longest = max(map(len, prompts))
        padding = next((p for p in self.paddings if p >= longest), self.paddings[-1])
        unused = self.rows + 1 - len(prompts)  # of which one makes the prompts' padding
        lengths = [self.length] * len(prompts) + [0] * unused
        filled = prompts + [np.zeros(padding, np.int32)] * unused
        answers = generate.generate(self.writer.decoder, filled, lengths)
        rows = [{"text": self.writer.decode(ids)[0]} for ids in answers[: len(prompts)]]
        return rows, sum(map(len, prompts))

    def embedded(self, read: Sequence[dict[str, Any]], first: int = 0) -> tuple[list[list[float]], int]:
        """Raises InputError."""
        name = self.writer.decoder.program.config.model.name
        raise InputError(f"model.name={name} gives no embeddings; use an encoder's run")


def _flat(outputs: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    return list(trees.by_path(dict(outputs)).items())


# ------------------------------------------------------------------------------------------------ reading


def _read_image(predictor: Predictor, item: Any) -> dict[str, Any]:
    """A path, base64 of a PNG or JPEG, or nested lists [H, W, C] of 0..255."""
    config, shape = predictor.program.config, predictor.program.batch_spec["image"].shape[1:]
    item = item.get("image") if isinstance(item, Mapping) else item
    if isinstance(item, str | pathlib.Path):
        image = predictor.decode_image(_bytes_of(item), shape[-1])
    else:
        image = np.asarray(item)
        if image.ndim != 3 or image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
            raise InputError("an image must be a file, base64 of one, or lists [H, W, C] of 0..255")
        image = image.astype(np.uint8)
    size = np.array(image.shape[:2], np.float32)
    scale = size / shape[:2]
    if config.data.image_size and "boxes" in predictor.program.batch_spec:  # as in training
        entire = np.array([[0, 0, *size]], np.float32)
        image, inner = box_data.letterbox(image, entire, config.data.image_size)
        scale = size / inner[0, 2:]
    elif config.data.image_size:
        image = transforms.fitted(image, config.data, config.data.eval_crop)
    elif image.shape[:2] != shape[:2]:
        image = cv2.resize(image, (shape[1], shape[0]), interpolation=cv2.INTER_AREA).reshape(*shape[:2], -1)
    if image.shape != shape:
        raise InputError(f"an image of shape {image.shape}, but the model reads {shape}")
    batch = transforms.normalize({"image": image[None]}, config.data.mean, config.data.std)
    return {"image": batch["image"][0], "size": size, "scale": scale}


def _bytes_of(item: str | pathlib.Path) -> bytes:
    if isinstance(item, pathlib.Path):
        try:
            return item.read_bytes()
        except OSError as error:
            raise InputError(f"{item}: {error.strerror}") from error
    try:
        return base64.b64decode(item.rpartition("base64,")[2], validate=True)
    except binascii.Error as error:
        raise InputError("no base64 of an image") from error


def _read_text(predictor: Predictor, item: Any) -> dict[str, Any]:
    """Reads a text as labeled texts are read in training; or its ids, without special ones."""
    assert predictor.tokenizer is not None
    program, tokenizer = predictor.program, predictor.tokenizer
    name = program.config.data.text
    text = item.get(name, item.get("text")) if isinstance(item, Mapping) else item
    ids: bytes | np.ndarray
    if isinstance(text, str):
        ids = _utf8(text)
    elif isinstance(text, list) and text and all(type(i) is int for i in text):
        if not 0 <= min(text) <= max(text) < tokenizer.vocab_size:
            raise InputError(f"token ids must lie in 0 to {tokenizer.vocab_size - 1}")
        ids = np.array(text, np.int32)
    else:
        also = f" or `{name}`" if name != "text" else ""
        raise InputError(f"a text is needed, or a row with a column `text`{also}")
    rows = data.whole_texts(program.config, tokenizer)([ids])
    return {key: value[0] for key, value in rows.items() if key in program.batch_spec}


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text holds a lone surrogate at character {error.start}") from None


def _read_serial(predictor: Predictor, item: Any) -> dict[str, Any]:
    """Which image is drawn: a number, or a row with `serial` and, of a GAN with classes, `label`."""
    spec = predictor.program.batch_spec
    row = item if isinstance(item, Mapping) else {"serial": item}
    if row.get("serial") is None:
        raise InputError("a row with a column `serial` is needed, or a number")
    most = {"serial": 2**31, "label": predictor.program.config.model.num_classes}
    out = {key: _number(key, row[key]) for key in most if key in spec and row.get(key) is not None}
    for key, value in out.items():
        if not 0 <= value < most[key] or value % 1:
            raise InputError(f"{key} is {row[key]}: give a whole number from 0 to {most[key] - 1}")
    return out


def _number(key: str, value: Any) -> float:
    """A finite number that float32 holds; as text with a decimal point, for a comma may mean either."""
    number = value
    if isinstance(value, str):
        number = None if "," in value else cells.number(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InputError(f"{key} is {value!r}, no number; write it like 1234.5")
    if not abs(number) <= cells.LARGEST:
        raise InputError(f"{key} is {value!r}, no finite number or more than float32 holds")
    return float(number)


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and cells.is_missing(value))


def _read_row(predictor: Predictor, item: Any) -> dict[str, Any]:
    """Returns a row of the model's table as numbers or text; null, NaN and what training reads as missing
    become a missing number."""
    assert predictor.columns is not None
    wanted = (*predictor.columns.numeric, *predictor.columns.categories)
    missing = [key for key in wanted if not isinstance(item, Mapping) or key not in item]
    if missing:
        raise InputError(f"no column {missing[0]!r}; a row with {', '.join(wanted)} is needed")
    row: dict[str, np.ndarray] = {
        key: np.array([item[key] if item[key] is not None else ""], object)
        for key in predictor.columns.categories
    }
    for key in predictor.columns.numeric:
        row[key] = np.array([np.nan if _is_missing(item[key]) else _number(key, item[key])])
    return {key: value[0] for key, value in predictor.columns.encode(row).items()}


def _read_pair(predictor: Predictor, item: Any) -> dict[str, Any]:
    """A user and an item, by name; whoever is not among the ratings is the unknown one, and not `known`."""
    assert predictor.ids is not None
    if not isinstance(item, Mapping) or any(item.get(key) is None for key in predictor.ids):
        raise InputError(f"a row with columns {' and '.join(predictor.ids)} is needed")
    found = {key: labels.id_of(item[key], ids, 0) for key, ids in predictor.ids.items()}
    return {**found, "known": all(found.values())}


def rated(config: Config, directory: pathlib.Path, user: str) -> list[int]:
    """Returns the ids of the items that a user rated in the training data, which are read."""
    found = ratings.load(config, data.Facts(config, directory))
    mine = found.user == labels.id_of(user, found.names["user"], 0)
    return found.item[mine & ~found.is_test].tolist()
