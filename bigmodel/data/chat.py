"""Chat templates: messages -> a prompt, rendered by jinja2 in its sandbox as transformers does.

A template comes from a stranger's file and messages from strangers: the template sees plain data alone, and
the names of special tokens inside a message stay text.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel.config import InputError

START, END = "\U000f0000", "\U000f0001"  # private-use characters around a control token that a message holds


class Chats:
    """The templates of one tokenizer by name; `default` is the one that is used."""

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str], where: str) -> None:
        """
        Args:
            templates: by name.
            tokens: `bos_token` and so on, which a template may write.
            where: their directory, for messages.

        Raises:
            InputError: there is no default one, or it is no template.
        """
        import jinja2

        if "default" not in templates:
            raise InputError(
                f"{where}: of the chat templates {', '.join(sorted(templates))} none is called default"
            )
        self._tokens = {key: value for key, value in tokens.items() if key in PASSED}
        self._where = where
        try:
            environment = _environment()
            self._template = environment.from_string(templates["default"])
            self._literals = _literals(environment, templates["default"])
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: the chat template is no jinja2 template ({_line(error)})") from error

    def control_tokens(self, added: Iterable[Any], listed: Sequence[str] | None = None) -> list[str]:
        """Special tokens, and added ones that the template writes: inside a message they are text."""
        return [
            token.content for token in added
            if token.special or (
                token.content in listed if listed is not None
                else token.content in self._literals and not token.content.isspace()
            )
        ]  # fmt: skip

    def render(self, messages: Sequence[Mapping[str, Any]], control: Sequence[str], **variables: Any) -> str:
        """The prompt, with marks around what of `control` the messages hold.

        Raises:
            InputError: the template refuses the messages, or fails on them.
        """
        import jinja2

        pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        chat = [{key: value for key, value in each.items() if value is not None} for each in messages]
        marked = _marked([chat, variables], pattern)
        given = {"tools": None, "documents": None, **self._tokens, **marked[1]}
        try:
            return self._template.render(messages=marked[0], add_generation_prompt=True, **given)
        except (
            jinja2.TemplateError,
            TypeError,
            KeyError,
            ValueError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise InputError(f"the model's chat template refuses these messages: {_line(error)}") from error


PASSED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@functools.cache
def _environment() -> Any:
    """jinja2's sandbox with what transformers puts into it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which mark an assistant's words for training."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, rest = args[0], args[1:]
            given = dict(*rest, **kwargs)
            for name in given:
                _public(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _public(name)
            super().__setitem__(name, value)

    def _public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class Dict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
                sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(), "namespace": Namespace,
    }  # fmt: skip
    return made


def _literals(environment: Any, template: str) -> str:
    """Strings that the template itself writes or compares with, separated by NUL."""
    from jinja2 import nodes

    tree = environment.parse(template)
    found = {node.data for node in tree.find_all(nodes.TemplateData)}
    found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(found)


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
    if isinstance(value, Mapping):
        return {key: _marked(x, pattern) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(x, pattern) for x in value]
    return value


# ----------------------------------------------------------------------------------------------- encoding


def encode_marked(pipeline: Any, text: str) -> list[int]:
    """A rendered prompt -> ids: marked control tokens as plain text, all else with its special tokens.

    Raises:
        InputError: the vocabulary itself makes a control token of plain text.
    """
    names = sorted(
        (token.content for token in pipeline.get_added_tokens_decoder().values()), key=len, reverse=True
    )
    inner = "|".join(map(re.escape, names)) or "(?!)"
    pieces = re.split(f"{START}({inner}){END}|[{START}{END}]", text)
    newline = _encode(pipeline, "\n")
    ids = _encode(pipeline, pieces[0])
    for number, piece in enumerate(pieces[1:], start=1):
        if not piece:
            continue
        as_text = number % 2 == 1
        new = _middle(pipeline, piece, as_text, newline)
        if as_text and pipeline.token_to_id(piece) in new:
            raise InputError(
                f"a message holds {piece!r}, which is a token of the model's chat template; leave it out"
            )
        ids += new
    return ids


def _encode(pipeline: Any, text: str) -> list[int]:
    return list(pipeline.encode(text, add_special_tokens=False).ids)


def _middle(pipeline: Any, piece: str, as_text: bool, newline: list[int]) -> list[int]:
    """Ids of a piece that does not begin the text. It is encoded after a newline, whose ids are taken off, so
    that no sentencepiece model puts its first space."""
    encode = _encode_plain if as_text else _encode
    ids = encode(pipeline, "\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(pipeline, piece)


def _encode_plain(pipeline: Any, text: str) -> list[int]:
    """Ids without any added token."""
    if pipeline.normalizer is not None:
        text = pipeline.normalizer.normalize_str(text)
    parts = [text]
    if pipeline.pre_tokenizer is not None:
        parts = [part for part, _ in pipeline.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for part in parts for token in pipeline.model.tokenize(part)]
