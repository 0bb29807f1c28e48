"""Predictions of a trained model for raw inputs: images, texts or rows of numbers in, plain values out.

What an input has to be follows from what the model's batches hold: `image` (a file, or base64 of one, or
nested lists of bytes), `tokens` (text), else numbers by name. Keys that only training needs are zeros.

Legend: B batch, L length, D width, V classes.
"""

from __future__ import annotations

import base64
import binascii
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import data, infer, mesh
from bigmodel import decoder as decoder_lib
from bigmodel.config import InputError
from bigmodel.data import objectives, transforms
from bigmodel.data.text import Tokenizer, special_id
from bigmodel.program import Program, State

Row = dict[str, Any]


class Predictor:
    """A model's compiled forward pass at the config's batch size; the last batch of many inputs is padded."""

    def __init__(
        self, program: Program, state: State, *, names: Sequence[str] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        """
        Args:
            names: of the classes; none: their numbers.
            tokenizer: of a model that reads text.
        """
        self.program, self.names, self.tokenizer = program, names, tokenizer
        self._state = (state.get("ema", state["params"]), state["rest"])
        here = mesh.replicated(program.mesh)
        self._forward = jax.jit(self._outputs, out_shardings=here)

    @classmethod
    def load(cls, directory: pathlib.Path, step: int | None = None) -> Predictor:
        """The run in `directory`. Raises InputError as `infer.load`."""
        return cls.of(*infer.load(directory, step), directory)

    @classmethod
    def of(cls, program: Program, state: State, directory: pathlib.Path) -> Predictor:
        """A run that is loaded already, with what its directory knows of names and tokens."""
        reads_text = "tokens" in program.batch_spec
        tokenizer = data.get_tokenizer(program.config, directory) if reads_text else None
        names = data.class_names(program.config) if "label" in program.batch_spec else ()
        return cls(program, state, names=names, tokenizer=tokenizer)

    def predict(self, inputs: Sequence[Any]) -> tuple[list[Row], int]:
        """-> (a row for each input, how many tokens were read).

        Raises:
            InputError: an input the model cannot read, by its number.
        """
        return self._run(inputs, WRITERS.get(self.program.config.task.name, _everything))

    def embed(self, inputs: Sequence[Any]) -> tuple[list[list[float]], int]:
        """-> (a vector of length 1 for each text, how many tokens were read): the mean over its hidden states
        (Reimers and Gurevych 2019). A text is cut at `seq_len`. Raises InputError for a model without any."""
        rows, count = self._run(inputs, _embedding)
        return [row["embedding"] for row in rows], count

    def _run(self, inputs: Sequence[Any], write: Callable[..., Row]) -> tuple[list[Row], int]:
        rows: list[Row] = []
        tokens, size = 0, self.program.config.batch_size
        for first in range(0, len(inputs), size):
            part = inputs[first : first + size]
            batch = self._batch(part, first)
            tokens += int((batch["segments"] > 0).sum()) if "segments" in batch else 0
            outputs = jax.device_get(self._forward(*self._state, self.program.put(batch)))
            each = {key: value for key, value in _flat(outputs) if value.ndim and len(value) == size}
            rows += [
                write(self, {key: value[index] for key, value in each.items()}) for index in range(len(part))
            ]
        return rows, tokens

    def _outputs(self, params: Any, rest: Any, batch: Any) -> Any:
        with jax.sharding.use_abstract_mesh(self.program.mesh.abstract_mesh):
            outputs, _ = self.program.model.apply(params, rest, batch, key=None, train=False)
        out = dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs}
        out.pop("losses", None)
        if "hidden" in out:  # one vector a text: the mean of its tokens
            real_BL1 = (batch["segments"] > 0).astype(jnp.float32)[..., None]
            hidden_BLD = out.pop("hidden").astype(jnp.float32)
            out["mean"] = (hidden_BLD * real_BL1).sum(1) / jnp.maximum(real_BL1.sum(1), 1.0)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), out)
        if self.program.config.task.name == "mlm":
            wide.pop("logits", None)
        return wide

    def _batch(self, inputs: Sequence[Any], first: int) -> dict[str, np.ndarray]:
        """The arrays of a batch; inputs are numbered from `first` in messages."""
        spec = self.program.batch_spec
        read = next((READERS[key] for key in READERS if key in spec), _read_numbers)
        batch = {key: np.zeros(s.shape, s.dtype) for key, s in spec.items()}
        batch["mask"] = (np.arange(self.program.config.batch_size) < len(inputs)).astype(np.float32)
        for row, item in enumerate(inputs):
            try:
                arrays = read(self, item)
            except (InputError, ValueError, TypeError, KeyError) as error:
                raise InputError(f"input {first + row}: {error}") from error
            for key, value in arrays.items():
                batch[key][row] = value
        return batch


class Answerer:
    """A model that writes text, asked for whole answers: greedy, up to what its context holds."""

    def __init__(self, writer: infer.Writer) -> None:
        self.writer = writer

    def predict(self, inputs: Sequence[Any]) -> tuple[list[Row], int]:
        """Texts, or rows with a column `text` -> ({"text"} for each, how many tokens were read)."""
        texts: list[str] = []
        for number, item in enumerate(inputs):
            text = item.get("text") if isinstance(item, Mapping) else item
            if not isinstance(text, str):
                raise InputError(f"input {number}: a text is needed, or a row with a column `text`")
            texts.append(text)
        most = decoder_lib.context(self.writer.decoder.program.config)
        ids = [self.writer.encode(text) for text in texts]
        answers = self.writer.write(texts, most if not self.writer.continues else max(most // 2, 1))
        return [{"text": text} for text in answers], sum(map(len, ids))

    def embed(self, inputs: Sequence[Any]) -> tuple[list[list[float]], int]:
        """Raises InputError."""
        name = self.writer.decoder.program.config.model.name
        raise InputError(f"model.name={name} gives no embeddings; use an encoder's run")


def _flat(outputs: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    return [(mesh.path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(dict(outputs))]


# ------------------------------------------------------------------------------------------------ reading


def _read_image(predictor: Predictor, item: Any) -> dict[str, Any]:
    """A path, base64 of a PNG or JPEG, or nested lists [H, W, C] of 0..255."""
    config, shape = predictor.program.config, predictor.program.batch_spec["image"].shape[1:]
    item = item.get("image") if isinstance(item, Mapping) else item
    if isinstance(item, str | pathlib.Path):
        image = decode_image(_bytes_of(item), shape[-1])
    else:
        image = np.asarray(item)
        if image.ndim != 3 or image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
            raise InputError("an image must be a file, base64 of one, or lists [H, W, C] of 0..255")
        image = image.astype(np.uint8)
    if config.data.image_size:
        image = transforms.center(image, config.data.image_size, config.data.eval_crop)
    elif image.shape[:2] != shape[:2]:
        image = cv2.resize(image, (shape[1], shape[0]), interpolation=cv2.INTER_AREA).reshape(*shape[:2], -1)
    if image.shape != shape:
        raise InputError(f"an image of shape {image.shape}, but the model reads {shape}")
    return transforms.normalise({"image": image[None]}, config.data.mean, config.data.std)


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


def decode_image(content: bytes, channels: int) -> np.ndarray:
    """A PNG's or JPEG's bytes -> uint8 [H, W, C] (RGB, or grey). Raises InputError for anything else."""
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    raw = np.frombuffer(content, np.uint8)
    image = cv2.imdecode(raw, flag) if len(raw) else None
    if image is None:
        raise InputError("no image that can be decoded; give a PNG or a JPEG")
    return image[..., None] if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_text(predictor: Predictor, item: Any) -> dict[str, Any]:
    """As labelled texts are read in training (data/batches.py)."""
    assert predictor.tokenizer is not None
    text = item.get("text") if isinstance(item, Mapping) else item
    if not isinstance(text, str):
        raise InputError("a text is needed, or a row with a column `text`")
    spec, tokenizer = predictor.program.batch_spec, predictor.tokenizer
    first = special_id(tokenizer, getattr(predictor.program.config.model, "vocab_size", 0), "cls")
    length = spec["tokens"].shape[1]
    rows = objectives.whole_texts([tokenizer.encode(text)], length, first=first, end=tokenizer.separator)
    return {key: value[0] for key, value in rows.items() if key in spec}


def _read_numbers(predictor: Predictor, item: Any) -> dict[str, Any]:
    """A row's columns by name, of those that a batch holds; a lone number is a `serial`."""
    spec = predictor.program.batch_spec
    if isinstance(item, int) and "serial" in spec:
        item = {"serial": item}
    if not isinstance(item, Mapping):
        raise InputError(f"a row with columns among {', '.join(spec)} is needed")
    known = {key: value for key, value in item.items() if key in spec and key != "mask"}
    if not known:
        raise InputError(f"none of its columns is one of {', '.join(spec)}")
    out = {key: np.asarray(value).astype(spec[key].dtype) for key, value in known.items()}
    for key, value in out.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"{key} is no finite number")
    return out


READERS: dict[str, Callable[[Predictor, Any], dict[str, Any]]] = {
    "serial": _read_numbers,  # before image: a GAN's batch has both
    "image": _read_image,
    "tokens": _read_text,
}


# ------------------------------------------------------------------------------------------------ writing


def _class_of(predictor: Predictor, out: Mapping[str, np.ndarray]) -> Row:
    share_V = np.exp(out["logits"] - out["logits"].max())
    share_V = share_V / share_V.sum()
    best = np.argsort(-share_V)[:5]
    names = [predictor.names[i] if i < len(predictor.names) else str(i) for i in best]
    top = {name: round(float(share_V[i]), 6) for name, i in zip(names, best, strict=True)}
    return {"label": int(best[0]), "name": names[0], "probability": float(share_V[best[0]]), "top": top}


def _labels_of(predictor: Predictor, out: Mapping[str, np.ndarray]) -> Row:
    share_V = 1 / (1 + np.exp(-out["logits"]))
    return {"labels": np.flatnonzero(share_V > 0.5).tolist(), "probabilities": share_V.tolist()}


def _value(predictor: Predictor, out: Mapping[str, np.ndarray]) -> Row:
    return {"value": out["logits"].tolist()}


def _embedding(predictor: Predictor, out: Mapping[str, np.ndarray]) -> Row:
    """A text's vector of length 1: the mean of its tokens' hidden states."""
    if "mean" not in out:
        raise InputError(
            f"model.name={predictor.program.config.model.name} gives no embeddings; use an encoder's run"
        )
    vector = out["mean"] / max(math.sqrt(float((out["mean"] ** 2).sum())), 1e-12)
    return {"embedding": vector.tolist()}


def _picture(predictor: Predictor, out: Mapping[str, np.ndarray]) -> Row:
    """A generated image in -1..1 as base64 of a PNG."""
    image = np.clip((out["image"] + 1) * 127.5, 0, 255).round().astype(np.uint8)
    _, png = cv2.imencode(".png", image if image.shape[-1] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return {"image": base64.b64encode(png.tobytes()).decode()}


def _everything(predictor: Predictor, out: Mapping[str, np.ndarray]) -> Row:
    return {key: value.tolist() for key, value in out.items()}


WRITERS: dict[str, Callable[[Predictor, Mapping[str, np.ndarray]], Row]] = {
    "classify": _class_of, "multilabel": _labels_of, "regress": _value, "mlm": _embedding, "gan": _picture,
}  # fmt: skip
