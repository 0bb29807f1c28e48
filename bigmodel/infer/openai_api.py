"""Reads OpenAI's requests strictly: bytes -> checked dataclasses, or a Refusal of one line and a status.

400: not what the protocol says (no JSON, a wrong type). 422: well-formed, but beyond what is served.
A key of OpenAI's that is not served here is accepted where its value changes nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel.config import InputError, parsing
from bigmodel.infer import sampling
from bigmodel.infer.sampling import Sampling

STOPS, STOP_CHARS = 4, 256  # of one request
TOP_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_CHARS, PARAM_CHARS = 500, 100  # of an error


class Refusal(Exception):
    """A request that is not served: an HTTP status and one line that says why."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, _short(" ".join(message.split()), MESSAGE_CHARS)
        self.param = None if param is None else _short(param, PARAM_CHARS)

    def body(self) -> dict[str, Any]:
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
            503: "server_error",
        }
        kind = kinds.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": None}
        return {"error": error}


def _short(text: str, most: int) -> str:
    """Cut, and fit for UTF-8."""
    return text[:most].encode("utf-8", "backslashreplace").decode()[:most]


@dataclass(frozen=True)
class Completion:
    """A completion or a chat: `prompts` are texts or ids; for a chat there is one."""

    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    model: str | None
    settings: Sampling
    echo: bool = False
    plain: bool = False  # names of special tokens in the prompt are text
    usual_tokens: int | None = None  # the default of max_tokens, if so many fit
    logprobs: int | None = None  # how many of the likeliest ids go with each place; None: no scores


def parse(body: bytes) -> dict[str, Any]:
    """Parses a body -> a JSON object. Raises Refusal 400; NaN and infinities are not JSON."""

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


def completion(tree: Mapping[str, Any], most: int, drawing: Mapping[str, Any] | None = None) -> Completion:
    """Reads a request to /v1/completions. Raises Refusal.

    Args:
        most: answers that one request may want.
        drawing: defaults of sampling settings, from the model's authors.
    """
    tree = served(tree, {"prompt", "logprobs", "echo", "best_of", "suffix"})
    prompt = tree.get("prompt", "")
    several = isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt)
    prompts = tuple(_prompt(p) for p in prompt) if several else (_prompt(prompt),)
    echo = _value(tree, "echo", bool, False)
    made = _completion(tree, prompts, most, drawing or {}, default=16, least=0 if echo else 1)
    refuse_unserved(tree, {"suffix": ("",), "best_of": (1, made.n)})
    return dataclasses.replace(made, echo=echo, logprobs=_top(tree, "logprobs", None))


Template = Callable[[Sequence[Mapping[str, str]]], Sequence[int] | None]


def chat(
    tree: Mapping[str, Any], most: int, drawing: Mapping[str, Any] | None = None,
    template: Template = lambda messages: None,
) -> Completion:  # fmt: skip
    """Reads a request to /v1/chat/completions. Raises Refusal.

    The model's template turns the messages into a prompt; without one, they become a text, a line each, which
    the assistant continues.

    Args:
        most, drawing: as for `completion`.
        template: messages -> ids, or None. Raises InputError.
    """
    tree = served(tree, {"messages", "max_completion_tokens", "logprobs", "top_logprobs", *CHAT_NEUTRAL})
    refuse_unserved(tree, CHAT_NEUTRAL)
    messages = tree.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of one message or more", "messages")
    said = [_message(message) for message in messages]
    try:
        ids = template([{"role": role, "content": content} for role, content in said])
    except InputError as error:
        raise Refusal(400, str(error), "messages") from error
    text = "".join(f"{role}: {_line(content)}\n" for role, content in said) + "assistant:"
    prompt = text if ids is None else tuple(int(i) for i in ids)
    if tree.get("max_completion_tokens") is not None:
        tree = {**tree, "max_tokens": tree["max_completion_tokens"]}
    made = _completion(tree, (prompt,), most, drawing or {}, default=None)
    top = _top(tree, "top_logprobs", 0)
    logprobs = top if _value(tree, "logprobs", bool, False) else None
    if top and logprobs is None:
        raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")
    stop = made.stop if ids is not None else (*made.stop, "\nuser:", "\nsystem:")
    return dataclasses.replace(made, stop=stop, logprobs=logprobs, plain=True)


@dataclass(frozen=True)
class Embedding:
    """A request to /v1/embeddings."""

    inputs: list[str | list[int]]
    model: str | None
    base64: bool
    dimensions: int | None


def embedding(tree: Mapping[str, Any], most: int) -> Embedding:
    """Reads a request to /v1/embeddings of at most `most` inputs. Raises Refusal."""
    names = {"input", "model", "encoding_format", "dimensions", "user"}
    for key, value in tree.items():
        if value is not None and key not in names:
            raise Refusal(400, f"{key[:PARAM_CHARS]!r} is unknown; known: {', '.join(sorted(names))}", key)
    form = _value(tree, "encoding_format", str, "float")
    if form not in ("float", "base64"):
        raise Refusal(422, f"encoding_format is {form[:40]!r}: choose float or base64", "encoding_format")
    model, dimensions = _value(tree, "model", str, None), _value(tree, "dimensions", int, None)
    return Embedding(texts(tree, "input", most), model, form == "base64", dimensions)


def texts(tree: Mapping[str, Any], key: str, most: int) -> list[str | list[int]]:
    """One text, a list of them, a list of token ids or a list of such; at most `most`. Raises Refusal."""
    value = tree.get(key)
    found = [value] if isinstance(value, str) or _ids(value) else value
    if not isinstance(found, list) or not found:
        raise Refusal(400, f"{key} must be a text, a list of texts, or token ids", key)
    if len(found) > most:
        raise Refusal(422, f"{key} has {len(found)} texts; send at most {most}", key)
    for text in found:
        if isinstance(text, str):
            _utf8(text, key)
        elif not _ids(text):
            raise Refusal(400, f"{key} must be a text, a list of texts, or token ids", key)
    return found


# ------------------------------------------------------------------ keys of OpenAI's that are not served here


def anything(value: Any) -> bool:
    """Returns True, for keys that only label or route a request."""
    return True


Neutral = Mapping[str, "tuple[Any, ...] | Callable[[Any], bool]"]  # values that change nothing

SHARED_NEUTRAL: Neutral = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "user": anything,
    "store": (False,), "metadata": anything, "service_tier": ("auto", "default"),
    "safety_identifier": anything, "prompt_cache_key": anything, "prompt_cache_retention": anything,
    "prompt_cache_options": anything,
}  # fmt: skip
CHAT_NEUTRAL: Neutral = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": anything, "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "verbosity": ("medium",), "reasoning_effort": ("none",), "audio": (), "prediction": (), "moderation": (),
    "web_search_options": (),
}  # fmt: skip
SHARED = {
    "model", "max_tokens", "n", "stop", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "seed", *SHARED_NEUTRAL,
}  # fmt: skip


def served(tree: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The request without its nulls, which mean "not set".

    Raises Refusal: 400 for a key that neither OpenAI nor we have; 422 for one that is not served.
    """
    tree = {key: value for key, value in tree.items() if value is not None}
    for key in tree:
        if key not in SHARED | names:
            near = parsing.nearest(key, SHARED | names) if len(key) <= PARAM_CHARS else ""
            raise Refusal(400, f"{key[:PARAM_CHARS]!r} is unknown{near}", key)
    refuse_unserved(tree, SHARED_NEUTRAL)
    return tree


def refuse_unserved(tree: Mapping[str, Any], neutral: Neutral) -> None:
    """Raises Refusal 422 for a key that is not served here, unless its value changes nothing."""
    for key, values in neutral.items():
        if tree.get(key) is None:
            continue
        value = tree[key]
        right = values(value) if callable(values) else any(_same(value, each) for each in values)
        if not right:
            allowed = "" if callable(values) or not values else f", or set it to {json.dumps(values[0])}"
            raise Refusal(422, f"{key} is not served; leave it out{allowed}", key)


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


# ----------------------------------------------------------------------------------------------- one value


def _completion(
    tree: Mapping[str, Any], prompts: tuple[str | tuple[int, ...], ...], most: int,
    drawing: Mapping[str, Any], default: int | None, least: int = 1,
) -> Completion:  # fmt: skip
    usual = drawing.get("max_new_tokens")
    default = default if usual is None else None
    n = _value(tree, "n", int, 1)
    if n < 1 or n * len(prompts) > most:
        raise Refusal(422, f"n={n} for {len(prompts)} prompts: ask for 1 to {most} answers in all", "n")
    max_tokens = _value(tree, "max_tokens", int, default)
    if max_tokens is not None and max_tokens < least:
        raise Refusal(422, f"max_tokens is {max_tokens}: set it to {least} or more", "max_tokens")
    options = tree.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal(400, "stream_options must be an object", "stream_options")
    include_usage = _value(options, "include_usage", bool, False)
    model = _value(tree, "model", str, None)
    stream = _value(tree, "stream", bool, False)
    settings = _settings(tree, drawing)
    return Completion(
        prompts, max_tokens, n, _stop(tree), stream, include_usage, model, settings, usual_tokens=usual
    )


def _settings(tree: Mapping[str, Any], drawing: Mapping[str, Any]) -> Sampling:
    """Reads the sampling settings; without a seed, each request's answers differ."""
    given = {key: value for key, value in drawing.items() if key != "max_new_tokens"}
    defaults = Sampling(**({"temperature": 1.0} | given))
    kinds: dict[str, Any] = {"top_k": int}
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "seed"]
    values = {name: _value(tree, name, kinds.get(name, float), getattr(defaults, name)) for name in names}
    settings = Sampling(**values, seed=_seed(tree))
    for key, problem in settings.problems():
        raise Refusal(422, f"{key} {problem}", key)
    return settings


def _seed(tree: Mapping[str, Any]) -> int:
    """Reads the seed, any integer of 64 bits; those below 2**31 stay as they are."""
    seed = _value(tree, "seed", int, None)
    if seed is None:
        return sampling.fresh_seed()
    if not -(2**63) <= seed < 2**64:
        raise Refusal(422, "seed must be an integer of 64 bits", "seed")
    return seed if 0 <= seed < 2**31 else sampling.folded(seed)


def _stop(tree: Mapping[str, Any]) -> tuple[str, ...]:
    stop = tree.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > STOPS or not all(isinstance(s, str) for s in stop):
        raise Refusal(400, f"stop must be a text or a list of up to {STOPS}", "stop")
    for text in stop:
        if not text:
            raise Refusal(400, "a stop string is empty; leave it out", "stop")
        if len(text) > STOP_CHARS:
            said = f"a stop string has {len(text)} characters; at most {STOP_CHARS} are served"
            raise Refusal(422, said, "stop")
        _utf8(text, "stop")
    return tuple(stop)


def _top(tree: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = _value(tree, key, int, default)
    if value is not None and not 0 <= value <= TOP_LOGPROBS:
        raise Refusal(422, f"{key} is {value}: choose 0 to {TOP_LOGPROBS}", key)
    return value


def _value(tree: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = tree.get(key)
    if value is None:
        return default
    right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        said = value if isinstance(value, str | int | float) else type(value).__name__
        raise Refusal(400, f"{key} must be {names[kind]}, not {str(said)[:40]!r}", key)
    try:
        return kind(value)
    except OverflowError as error:
        raise Refusal(422, f"{key} is too large", key) from error


def _ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    )


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return _utf8(value, "prompt")
    if value == [] or _ids(value):
        return tuple(value)
    raise Refusal(400, "prompt must be a text, a list of token ids, or a list of such", "prompt")


def _message(message: Any) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise Refusal(400, f"a message has a role: {', '.join(ROLES)}", "messages")
    for key in ("tool_calls", "function_call", "audio"):
        if message.get(key):
            raise Refusal(422, f"a message's {key} is not served; leave it out", "messages")
    content: Any = message.get("content")
    if isinstance(content, list):
        parts: Sequence[Any] = content
        found = [part.get("text") if isinstance(part, dict) else None for part in parts]
        content = "".join(found) if all(isinstance(text, str) for text in found) else None  # type: ignore
    if not isinstance(content, str):
        raise Refusal(400, "a message has a content: a text, or a list of parts of type text", "messages")
    return role, _utf8(content, "messages")


def _line(content: str) -> str:
    """A message's text, none of whose lines reads as the beginning of another message."""
    for role in ROLES:
        content = content.replace(f"\n{role}:", f"\n {role}:")
    return content


def _utf8(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{key} has a lone surrogate, which no UTF-8 holds", key) from error
    return text


def packed(vector: Sequence[float]) -> str:
    """A vector as OpenAI's clients ask for it: base64 of little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
