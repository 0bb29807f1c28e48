"""Stop strings, texts that grow, and clients that take turns, without a model."""

from __future__ import annotations

import threading
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, pre_tokenizers

from bigmodel.data.pretrained import Pretrained
from bigmodel.data.tokenizers import BPE, Bytes
from bigmodel.infer import stops
from bigmodel.infer.detokenize import Detokenizer
from bigmodel.infer.engine import Request, TokenEvent
from bigmodel.infer.worker import Late, Subscriber, Worker


def test_stop_strings_are_found_as_by_looking_at_every_end():
    rng = np.random.default_rng(0)

    def letters(most: int) -> str:
        return "".join(rng.choice(["a", "b"], rng.integers(0, most + 1)))

    for _ in range(3000):
        words, text = [letters(4) for _ in range(rng.integers(0, 4))], letters(12)
        ends = [
            (end, end - len(w)) for end in range(len(text) + 1) for w in words if w and text[:end].endswith(w)
        ]
        search, found, at = stops.Stops(words), None, 0
        while found is None and at < len(text):
            size = int(rng.integers(1, 4))
            found = search.read(text[at : at + size])
            at += size
            if found is None:
                starts = [n for w in words for n in range(1, len(w)) if text[:at].endswith(w[:n])]
                assert search.pending == max(starts, default=0)
        assert found == (min(ends)[1] if ends else None)


def test_a_stop_string_costs_no_more_than_the_text():
    """In a text that is one long near miss, each character is compared a few times at most."""

    class Counted(str):
        compared = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.compared += 1
            return str.__getitem__(self, at)

    search = stops.Stops(["a" * 255 + "b"] * 4)
    for _ in range(100):
        assert search.read(Counted("a" * 100)) is None
    assert Counted.compared < 4 * 10_000 * 3


def pretrained(kind: str) -> Pretrained:
    """A tokenizer of words with their spaces (and bytes for what is no word), or of pieces as BERT's."""
    words = ["<unk>", "</s>", "▁the", "▁mesh", "▁é", "s", "▁", ",", *(f"<0x{i:02X}>" for i in range(256))]
    if kind == "metaspace":
        model = Model(
            models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
        )
        parts = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        model.decoder = decoders.Sequence(parts)
    else:
        pieces = ["[UNK]", "[SEP]", "the", "mesh", "##s", "é", ","]
        model = Model(models.WordPiece({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
        model.pre_tokenizer, model.decoder = (
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(cleanup=False),
        )
    model.add_special_tokens(["</s>" if kind == "metaspace" else "[SEP]"])
    return Pretrained(model.to_str(), kind)


class Writer:
    """Like `infer.Writer`, but with a tokenizer alone; counts the ids that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, bool]:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids), False


def grown(writer: Writer, ids: Sequence[int], sizes: Sequence[int], stop: Sequence[str] = ()) -> Detokenizer:
    """A text that got its ids in pieces of these sizes, over and over."""
    text, out, at, turn = Detokenizer(writer, stop), "", 0, 0  # type: ignore[arg-type]
    while at < len(ids) and text.reason is None:
        size = sizes[turn % len(sizes)]
        out += text.add(ids[at : at + size], at + size >= len(ids))
        at, turn = at + size, turn + 1
    text.all = out  # type: ignore[attr-defined]
    return text


SAMPLE = "the meshes — ü, 🎈🎈 the mesh\n日本語 " * 20


@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace", "wordpiece"])
def test_a_text_that_grows_is_the_text_of_all_ids(name):
    made = {"bytes": Bytes, "bpe": lambda: BPE.train(iter([SAMPLE]), 300)}
    tokenizer: Any = made.get(name, lambda: pretrained(name))()
    sane = tokenizer.encode(SAMPLE).tolist()
    rng = np.random.default_rng(1)
    noise = rng.integers(0, min(tokenizer.vocab_size, 257), 500).tolist()
    broken = [tokenizer.encode("é").tolist()[0]] * 300  # of bytes: always the first of two
    for ids in (sane, noise, broken):
        if name == "metaspace" and ids is not sane:
            continue  # its decoder reads runs of bytes as one: a later byte changes what came before
        for sizes in ((1,), (4,), (3, 1, 7)):
            assert grown(Writer(tokenizer), ids, sizes).all == tokenizer.decode(ids)
    stop = ["mesh\n日本", "🎈the"]
    expected = stops.cut(tokenizer.decode(sane), stop)
    text = grown(Writer(tokenizer), sane, (4,), stop)
    assert text.all == (tokenizer.decode(sane) if expected is None else expected)
    assert text.cut == (expected is not None)


def test_a_long_text_costs_no_more_than_its_length():
    fallback = pretrained("metaspace")
    many = fallback.encode("日本語" * 700).tolist()
    for tokenizer, ids in (
        (Bytes(), list(b"the mesh ") * 2000), (Bytes(), [0xFF] * 18_000), (Bytes(), list("ü".encode()) * 9000),  # noqa: E501
        (fallback, many), (fallback, many[:1] * 4000),
    ):  # fmt: skip
        writer = Writer(tokenizer)
        grown(writer, ids, (4,))
        assert writer.decoded < 150 * len(ids)


class FakeEngine:
    """Takes two requests at a time and ends each at the next step."""

    def __init__(self) -> None:
        self.sizes = types.SimpleNamespace(slots=2)
        self.waiting: list[tuple[int, Request]] = []
        self.running: list[tuple[int, Request]] = []
        self.begun: list[Any] = []
        self.go = threading.Event()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def load(self) -> dict[str, int]:
        return {"running": len(self.running), "waiting": len(self.waiting)}

    def add(self, request: Request) -> int:
        self.waiting.append((len(self.begun) + 1, request))
        self.begun.append(request.prompt[0])
        return len(self.begun)

    def cancel(self, number: int) -> None:
        self.waiting = [entry for entry in self.waiting if entry[0] != number]

    def step(self) -> list[TokenEvent]:
        self.go.wait(10)
        done, self.running = self.running, self.waiting[:2]
        del self.waiting[:2]
        return [TokenEvent(number, [1], True) for number, _ in done]


def test_clients_take_turns_and_who_waits_too_long_is_told():
    engine = FakeEngine()
    worker, told = Worker(engine, queue_s=5.0), []  # type: ignore[arg-type]
    ended = threading.Semaphore(0)

    def submit(number: int, client: str) -> Any:
        def listen(piece: Any) -> None:
            told.append((number, piece))
            ended.release()

        text = Detokenizer(Writer(Bytes()), ())  # type: ignore[arg-type]
        return worker.submit(Request([number], 1), Subscriber(listen, text, True), client)

    cancels = [submit(number, "greedy") for number in range(10)]
    cancels[9]()
    submit(100, "small")
    submit(200, "other")
    worker.start()
    engine.go.set()
    for _ in range(11):
        assert ended.acquire(timeout=20)
    assert {100, 200} <= set(engine.begun[:6])
    assert 9 not in engine.begun
    assert [n for n in engine.begun if n < 10] == list(range(9))
    worker.queue_s = -1.0  # whoever comes now is too late
    submit(300, "small")
    assert ended.acquire(timeout=20)
    assert told[-1][0] == 300
    assert isinstance(told[-1][1], Late)
    worker.stop()
    assert worker.waiting == 0
