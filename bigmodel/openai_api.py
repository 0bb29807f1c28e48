"""OpenAI's requests, read strictly: bytes -> checked dataclasses, or a Refusal of one line and a status.

400: not what the protocol says (no JSON, a wrong type). 422: well-formed, but beyond what is served.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel import typed
from bigmodel.sampling import Sampling


class Refusal(Exception):
    """A request that is not served: an HTTP status and one line that says why."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, " ".join(message.split())[:500], param

    def body(self) -> dict[str, Any]:
        kinds = {
            401: "authentication_error",
            404: "not_found_error",
            429: "rate_limit_error",
            503: "server_error",
        }
        kind = kinds.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": None}
        return {"error": error}


@dataclass(frozen=True)
class Ask:
    """A completion or a chat: `prompts` are texts or ids; for a chat there is one."""

    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    model: str | None
    settings: Sampling


def parse(body: bytes) -> dict[str, Any]:
    """Raises Refusal 400 for what is no JSON object; NaN and infinities are no JSON."""

    def no_number(text: str) -> None:
        raise Refusal(400, f"the body is no JSON: {text} is no number of it")

    try:
        tree = json.loads(body.decode("utf-8"), parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is no UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise Refusal(400, f"the body is a JSON {type(tree).__name__}; send an object")
    return tree


def completion(tree: Mapping[str, Any], most: int) -> Ask:
    """Raises Refusal. `most`: answers that one request may ask for."""
    known(tree, {"prompt", "logprobs", "echo", "best_of", "suffix"})
    refuse_unserved(tree, {"echo": False, "suffix": "", "best_of": 1, "logprobs": 0})
    prompt = tree.get("prompt", "")
    several = isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt)
    prompts = tuple(_prompt(p) for p in prompt) if several else (_prompt(prompt),)
    return _ask(tree, prompts, most, default=16)


def chat(tree: Mapping[str, Any], most: int) -> Ask:
    """Raises Refusal. The messages become one text, a line each, which the assistant continues."""
    known(tree, {"messages", "max_completion_tokens", "tools", "response_format", "logprobs"})
    refuse_unserved(tree, {"tools": [], "logprobs": False, "response_format": {"type": "text"}})
    messages = tree.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of one message or more", "messages")
    text = "".join(f"{role}: {content}\n" for role, content in map(_message, messages)) + "assistant:"
    if tree.get("max_completion_tokens") is not None:
        tree = {**tree, "max_tokens": tree["max_completion_tokens"]}
    ask = _ask(tree, (text,), most, default=None)
    return dataclasses.replace(ask, stop=(*ask.stop, "\nuser:", "\nsystem:"))


def texts(tree: Mapping[str, Any], key: str, most: int) -> list[str]:
    """One text or a list of them, at most `most`. Raises Refusal."""
    value = tree.get(key)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise Refusal(400, f"{key} must be a text or a list of texts", key)
    if len(found) > most:
        raise Refusal(422, f"{key} has {len(found)} texts; send at most {most}", key)
    for text in found:
        _utf8(text, key)
    return found


SHARED = {
    "model", "max_tokens", "n", "stop", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "seed", "user", "presence_penalty", "frequency_penalty", "logit_bias",
}  # fmt: skip


def known(tree: Mapping[str, Any], more: set[str]) -> None:
    """Raises Refusal 400 for a key that is none of OpenAI's, or of ours."""
    for key in tree:
        if key not in SHARED | more:
            raise Refusal(400, f"{key!r} is unknown{typed.nearest(key, SHARED | more)}", key)


def refuse_unserved(tree: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Raises Refusal 422 for what OpenAI has and we have not, unless it is set to change nothing."""
    neutral = {**neutral, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
    for key, value in neutral.items():
        if tree.get(key) is not None and tree[key] != value:
            raise Refusal(422, f"{key} is not served; leave it out", key)


def _ask(
    tree: Mapping[str, Any], prompts: tuple[str | tuple[int, ...], ...], most: int, default: int | None
) -> Ask:
    n = _value(tree, "n", int, 1)
    if n < 1 or n * len(prompts) > most:
        raise Refusal(422, f"n={n} for {len(prompts)} prompts: ask for 1 to {most} answers in all", "n")
    max_tokens = _value(tree, "max_tokens", int, default)
    if max_tokens is not None and max_tokens < 1:
        raise Refusal(422, f"max_tokens is {max_tokens}: set it to 1 or more", "max_tokens")
    stop = tree.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and s for s in stop):
        raise Refusal(400, "stop must be a text or a list of up to four", "stop")
    options = tree.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal(400, "stream_options must be an object", "stream_options")
    defaults = Sampling(temperature=1.0)
    fields = {f.name: f for f in dataclasses.fields(Sampling)}
    kinds: dict[str, Callable[..., Any]] = {"top_k": int, "seed": int}
    values = {k: _value(tree, k, kinds.get(k, float), getattr(defaults, k)) for k in fields}
    settings = Sampling(**values)
    for key, problem in settings.problems():
        raise Refusal(422, f"{key} {problem}", key)
    model = tree.get("model")
    if model is not None and not isinstance(model, str):
        raise Refusal(400, "model must be a text", "model")
    stream = _value(tree, "stream", bool, False)
    return Ask(
        prompts, max_tokens, n, tuple(stop), stream, bool(options.get("include_usage")), model, settings
    )


def _value(tree: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = tree.get(key)
    if value is None:
        return default
    right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false"}
        raise Refusal(400, f"{key} must be {names[kind]}, not {str(value)[:40]!r}", key)
    try:
        return kind(value)
    except OverflowError as error:
        raise Refusal(422, f"{key} is too large", key) from error


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return _utf8(value, "prompt")
    if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return tuple(value)
    raise Refusal(400, "prompt must be a text, a list of token ids, or a list of such", "prompt")


def _message(message: Any) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "developer", "user", "assistant"):
        raise Refusal(400, "a message has a role: system, user or assistant", "messages")
    content: Any = message.get("content")
    if isinstance(content, list):
        parts: Sequence[Any] = content
        content = "".join(
            part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str) else "\0"
            for part in parts
        )
        content = None if "\0" in content else content
    if not isinstance(content, str):
        raise Refusal(400, "a message has a content: a text, or a list of parts of type text", "messages")
    return role, _utf8(content, "messages")


def _utf8(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{key} has a lone surrogate, which no UTF-8 holds", key) from error
    return text


def packed(vector: Sequence[float]) -> str:
    """A vector as OpenAI's clients ask for it: base64 of little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
