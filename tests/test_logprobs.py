"""Log-probabilities over HTTP against the model's own full forward pass; lm-evaluation-harness's requests."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from conftest import compiles, saved, tiny
from fastapi.testclient import TestClient

from bigmodel.data.tokenizers import BPE, Bytes
from bigmodel.infer import loading, server
from bigmodel.infer.generate import Writer
from bigmodel.infer.scoring import Scorer, Tokens

CONTEXT = 80  # more than a chunk of the scorer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    config = tiny("gpt", model__depth=1, model__vocab_size=264, seq_len=CONTEXT, batch_size=1)
    return saved(tmp_path_factory.mktemp("logprobs") / "tiny", config)


@pytest.fixture(scope="module")
def client(run_dir: pathlib.Path) -> Iterator[TestClient]:
    service = server.load(run_dir, name="tiny", limits=server.Limits(), slots=4, cache_dtype="")
    with TestClient(server.app(service)) as it:
        yield it


@pytest.fixture(scope="module")
def offline(run_dir: pathlib.Path) -> Any:
    """ids -> log-softmax [N, V] by one pass over all of them, without a cache."""
    program, state = loading.load(run_dir)

    @jax.jit
    def logits(params: Any, batch: Any) -> Any:
        return program.model.apply(params, state["rest"], batch, key=None, train=False)[0]["logits"]

    def scores(ids: list[int]) -> np.ndarray:
        tokens = np.zeros((1, CONTEXT), np.int32)
        tokens[0, : len(ids)] = ids
        at = np.arange(CONTEXT, dtype=np.int32)[None]
        batch = {"tokens": tokens, "segments": (at < len(ids)).astype(np.int32), "positions": at}
        x = np.asarray(logits(state["params"], batch), np.float64)[0, : len(ids)]
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    return scores


def test_no_request_compiles_anything(client):
    with compiles() as compiled:
        for length in (1, 20, 66):
            for keys in ({}, {"n": 4, "logprobs": 3, "temperature": 1, "top_k": 3, "top_p": 0.5}):
                ask(client, prompt=[7] * length, max_tokens=9, echo=True, **keys)
    assert not compiled


def ask(client: TestClient, path: str = "completions", **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_echoed_prompt_has_the_scores_of_a_full_forward_pass(client, offline):
    prompts = [list(b"def main("), [7, 255, 3, 256, 9], [5], [i % 250 for i in range(70)]]
    answer = ask(client, prompt=prompts, echo=True, max_tokens=1, logprobs=3, temperature=0)
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        told, expected = choice["logprobs"], offline(ids)
        assert len({len(told[key]) for key in told}) == 1
        assert len(told["tokens"]) == len(ids) + 1
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        right = expected[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(told["token_logprobs"][1:-1], right, atol=2e-5)
        np.testing.assert_allclose(told["token_logprobs"][-1], expected[-1].max(), atol=2e-5)
        for row, top in zip(expected, told["top_logprobs"][1:], strict=True):
            np.testing.assert_allclose(list(top.values())[:3], np.sort(row)[::-1][:3], atol=2e-5)
            assert 3 <= len(top) <= 4
    plain = answer["choices"][0]
    assert plain["logprobs"]["tokens"][:9] == list("def main(")
    assert plain["logprobs"]["text_offset"] == list(range(10))
    assert plain["text"].startswith("def main(")
    assert answer["choices"][1]["logprobs"]["tokens"][1] == "bytes:\\xff"


def test_a_prompt_is_scored_alone(client, offline):
    """max_tokens 0: nothing is written; a text's separator is read, but not told."""
    answer = ask(client, prompt="step by step", echo=True, max_tokens=0, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "step by step"
    assert answer["usage"]["completion_tokens"] == 0
    told, ids = choice["logprobs"], [256, *b"step by step"]
    assert told["tokens"] == list("step by step")
    np.testing.assert_allclose(told["token_logprobs"][1:], offline(ids)[np.arange(1, 12), ids[2:]], atol=2e-5)
    assert [len(top) for top in told["top_logprobs"][1:]] == [1] * 11
    full = ask(client, prompt=[1] * CONTEXT, echo=True, max_tokens=0, logprobs=1)["choices"][0]["logprobs"]
    assert len(full["tokens"]) == CONTEXT
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}).status_code == 422
    too_long = {"prompt": [1] * (CONTEXT + 1), "max_tokens": 0, "echo": True}
    assert client.post("/v1/completions", json=too_long).status_code == 422


@pytest.mark.parametrize("stream", [False, True])
def test_an_answers_own_scores(client, offline, stream):
    body = {"prompt": "ab", "max_tokens": 9, "logprobs": 2, "temperature": 0.9, "seed": 4, "n": 2}
    plain = ask(client, **body)["choices"]
    if stream:
        lines = client.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
        events = [line[6:] for line in lines if line.startswith("data: {")]
        chunks = [c for event in events for c in json.loads(event)["choices"]]
        assert sorted(chunks, key=lambda c: c["index"]) == plain
        return
    ids_of = {text: index for index in range(264) for text in [Tokens(Bytes()).text(None, index)]}
    for choice in plain:
        told = choice["logprobs"]
        ids = [256, *b"ab"]
        for token, value, top in zip(
            told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
        ):
            row = offline(ids)[-1]
            np.testing.assert_allclose(value, row[ids_of[token]], atol=2e-5)
            np.testing.assert_allclose(max(top.values()), row.max(), atol=2e-5)
            ids.append(ids_of[token])
    assert plain[0]["logprobs"]["tokens"] != plain[1]["logprobs"]["tokens"]


def test_a_chats_scores(client):
    messages = [{"role": "user", "content": "hi"}]
    keys = {"messages": messages, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    choice = ask(client, "chat/completions", **keys)["choices"][0]
    content = choice["logprobs"]["content"]
    assert (
        bytes(b for entry in content for b in entry["bytes"]).decode(errors="replace")
        == choice["message"]["content"]
    )
    for entry in content:
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
        assert len(entry["top_logprobs"]) == 4
    assert ask(client, "chat/completions", **{**keys, "logprobs": False, "top_logprobs": None})
    wrong = {**keys, "logprobs": False}
    assert client.post("/v1/chat/completions", json=wrong).status_code == 400
    assert client.post("/v1/chat/completions", json={**keys, "top_logprobs": 21}).status_code == 422


def test_what_a_stop_string_cut_off_has_no_scores(client):
    body = {"prompt": "ab", "max_tokens": 12, "logprobs": 0, "temperature": 1, "seed": 2}
    free = ask(client, **body)["choices"][0]
    text = free["text"]
    stop = next(c for c in text[3:] if c != "\ufffd" and c not in text[:3])
    cut = ask(client, **body, stop=stop)["choices"][0]
    assert cut["text"] == text[: text.index(stop)]
    count = len(cut["logprobs"]["tokens"])
    assert cut["logprobs"]["tokens"] == free["logprobs"]["tokens"][:count]
    assert all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
    assert free["logprobs"]["text_offset"][count] == len(cut["text"])


def test_the_scorer_reads_any_length(run_dir, offline):
    scorer = Scorer(Writer.load(run_dir).decoder)
    ids = np.random.default_rng(0).integers(0, 257, CONTEXT).tolist()
    expected = offline(ids)
    for length in (2, 3, 63, 64, 65, 66, CONTEXT):
        scores = scorer.score(ids[:length])
        right = expected[np.arange(length - 1), ids[1:length]]
        np.testing.assert_allclose(scores.logprob, right, atol=2e-5)
        assert (scores.top_ids[:, 0] == expected[: length - 1].argmax(-1)).all()


def test_tokens_join_to_their_text():
    bpe = BPE.train(iter(["the theme of then — über ünder"] * 9), 300)
    ids = bpe.encode("the über— theme").tolist()
    tokens = Tokens(bpe)
    assert b"".join(tokens.raw(None, i) for i in ids).decode() == "the über— theme"
    offsets = tokens.offsets(ids)
    for index, offset in enumerate(offsets):
        before = b"".join(tokens.raw(None, i) for i in ids[:index]).decode(errors="ignore")
        assert offset == len(before)
