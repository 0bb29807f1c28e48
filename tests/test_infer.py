"""Generation: the cache changes nothing, nor do a row's neighbors; each setting does what it says."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, mesh_keys, start, tiny

from bigmodel.config import InputError
from bigmodel.infer import decode, engine, generate, sampling, speculative
from bigmodel.infer import decoder as decoder_lib
from bigmodel.infer.beam import BeamSearch
from bigmodel.infer.engine import Engine, Request, Sizes
from bigmodel.infer.sampling import Sampling
from bigmodel.infer.speculative import Speculative
from bigmodel.models import attention, cache

LLAMA = {
    "model__position": "rope", "model__kv_heads": 2, "model__norm": "rmsnorm", "model__mlp": "swiglu",
    "model__mlp_width": 64, "model__bias": False, "model__tie_embeddings": False,
}  # fmt: skip
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("gpt", {}),
    "llama": ("gpt", LLAMA),
    "window": ("gpt", {**LLAMA, "model__window": 5}),
    "scanned": ("gpt", {"model__scan": True}),
    "moe": ("moe", {"model__capacity_factor": 4.0}),
    "t5": ("t5", {}),
    "int8": ("gpt", {"quantize__weights": "int8"}),
    "t5_moe": ("t5", {"model__experts": 4, "model__capacity_factor": 4.0}),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


@functools.cache
def decoder(name: str) -> tuple[decoder_lib.Decoder, Any, Any]:
    """-> (a decoder, its program and state), made once for all tests."""
    family, keys = SETTINGS[name]
    built = build(tiny(family, seq_len=32, **keys))
    state = start(built)
    # Random weights of some size, so that the answers are not one id again and again.
    state["params"] = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, state["params"])
    return decoder_lib.Decoder(built, state), built, state


@functools.cache
def by_full_forward(name: str, prompt: tuple[int, ...], length: int) -> list[int]:
    """Greedy, each id by a pass over everything before it."""
    _, built, state = decoder(name)

    @jax.jit
    def logits(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        outputs, _ = built.model.apply(params, state["rest"], batch, key=None, train=False)
        return outputs["logits"]

    def row(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        real = (np.arange(32) < len(ids))[None].astype(np.int32)
        return np.pad(ids, (0, 32 - len(ids)))[None].astype(np.int32), real

    answer: list[int] = []
    for _ in range(length):
        text = [*prompt, *answer]
        batch = dict(zip(("tokens", "segments"), row(text), strict=True))
        if built.config.task.name == "seq2seq":
            text = [0, *answer]
            batch = dict(zip(("tokens", "segments"), row(list(prompt)), strict=True))
            batch |= dict(zip(("decoder_tokens", "decoder_segments"), row(text), strict=True))
        batch["positions"] = np.arange(32, dtype=np.int32)[None]
        answer.append(int(logits(state["params"], batch)[0, len(text) - 1].argmax()))
    return answer


@pytest.mark.parametrize(
    "name",
    [
        "learned",
        "llama",
        "t5",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("window", "moe", "int8", "t5_moe")),
    ],
)
def test_the_cache_changes_no_token(name):
    made, _, _ = decoder(name)
    answers = generate.generate(made, PROMPTS, 20)
    for prompt, ids in zip(PROMPTS, answers, strict=True):
        assert ids.tolist() == by_full_forward(name, tuple(prompt), 20)
    assert len({i for ids in answers for i in ids.tolist()}) > 3


def test_a_row_does_not_see_its_neighbors():
    made, _, _ = decoder("llama")
    each = [Sampling(temperature=1.0, top_k=5, seed=7), Sampling(temperature=0.8, top_p=0.9), Sampling()]
    together = generate.generate(made, PROMPTS, [12, 3, 20], each)
    assert [len(ids) for ids in together] == [12, 3, 20]
    alone = generate.generate(made, [PROMPTS[0], [1], [1]], [12, 1, 1], each[0])
    assert alone[0].tolist() == together[0].tolist()
    other = generate.generate(made, PROMPTS, 12, Sampling(temperature=1.0, top_k=5, seed=8))
    assert other[0].tolist() != alone[0].tolist()


def test_past_the_window_half_of_it_is_kept():
    made, _, _ = decoder("learned")
    answers = generate.generate(made, PROMPTS, 40)
    first = by_full_forward("learned", tuple(PROMPTS[0]), 27)  # with the prompt 32 ids: a full window
    half = tuple([*PROMPTS[0], *first][-16:])
    assert answers[0].tolist() == first + by_full_forward("learned", half, 13)


def test_an_answer_ends_with_the_end_id_or_when_told():
    made, _, _ = decoder("learned")
    ids = generate.generate(made, PROMPTS, 20)[0].tolist()
    told = generate.generate(made, PROMPTS, 20, ended=lambda row, ids: row == 0 and len(ids) > 2)
    assert told[0].tolist() == ids[: len(told[0])]
    assert 2 < len(told[0]) <= 1 + decode.CHUNK
    assert len(told[1]) == 20
    made = decoder_lib.Decoder(*decoder("learned")[1:], end=ids[6])
    assert generate.generate(made, PROMPTS, 20)[0].tolist() == ids[: ids.index(ids[6]) + 1]


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}])
def test_a_mesh_changes_no_token(axes):
    made, _, state = decoder("llama")
    sharded = build(tiny("gpt", seq_len=32, **LLAMA, **mesh_keys(axes)))
    placed = jax.tree.map(lambda s: s.sharding, sharded.state_spec["params"])
    params = jax.device_put(jax.device_get(state["params"]), placed)
    over = decoder_lib.Decoder(sharded, {"params": params, "rest": {}})
    k = over.empty_cache(4)["k"][0]
    assert k.sharding.shard_shape(k.shape) == (2, 1, 32, 8)
    expected = generate.generate(made, PROMPTS, 20)
    for a, b in zip(generate.generate(over, [*PROMPTS, [7, 7]], 20), expected, strict=False):
        assert a.tolist() == b.tolist()


@pytest.mark.slow
def test_a_mesh_changes_no_token_of_int8_weights():
    made, _, state = decoder("int8")
    sharded = build(tiny("gpt", seq_len=32, quantize__weights="int8", **mesh_keys({"data": 2, "tensor": 4})))
    parts = {part: jax.device_get(state[part]) for part in ("params", "rest")}
    placed = jax.tree.map(
        lambda s, x: jax.device_put(x, s.sharding), {p: sharded.state_spec[p] for p in parts}, parts
    )
    over = decoder_lib.Decoder(sharded, placed)
    expected = generate.generate(made, PROMPTS, 20)
    for a, b in zip(generate.generate(over, [*PROMPTS, [7, 7]], 20), expected, strict=False):
        assert a.tolist() == b.tolist()


def test_an_int8_cache_is_small_and_near():
    made, built, state = decoder("llama")
    small = decoder_lib.Decoder(built, state, cache_dtype="int8")
    bytes_of = [sum(x.nbytes for x in jax.tree.leaves(d.empty_cache(4))) for d in (made, small)]
    assert bytes_of[1] < 0.4 * bytes_of[0]  # heads of 8: a byte each, and a scale of four
    answers = [generate.generate(d, PROMPTS, 12) for d in (made, small)]
    same = [(a[:4] == b[:4]).all() for a, b in zip(*answers, strict=True)]
    assert sum(same) >= 2


# ---------------------------------------------------------------------------------------- continuous batching


def test_pages_answer_where_they_lie():
    rng, page = np.random.default_rng(0), 4
    k, v = rng.normal(size=(2, 12, 2, page, 8)).astype(np.float32)
    q = rng.normal(size=(3, 1, 4, 8)).astype(np.float32)
    pages = np.array([[3, 1, 12, 12], [0, 12, 12, 12], [7, 8, 2, 5]], np.int32)  # 12: none
    at = np.array([[6], [-1], [13]], np.int32)  # the second row is idle
    row, first = np.zeros(12, np.int32), np.full(12, engine.NOWHERE, np.int32)
    for b, t in np.argwhere(pages < 12):
        row[pages[b, t]], first[pages[b, t]] = b, t * page
    kv = cache.read({"k": jnp.asarray(k), "v": jnp.asarray(v)}, jnp.float32, jnp.asarray(pages))
    for window in (0, 5):
        expected = attention.attend_cached(q, *kv, jnp.asarray(at), window=window)
        for count in (12, 9):  # of the pages, those that are looked at
            owners = attention.Owners(*(jnp.asarray(x[:count]) for x in (row, first)))
            y = attention.attend_paged(*map(jnp.asarray, (q, k, v, at, pages)), owners, window=window)
            assert np.isfinite(y).all()
            np.testing.assert_allclose(y[::2], expected[::2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", pytest.param("window", marks=pytest.mark.slow)])
def test_what_joins_and_leaves_changes_no_answer(name):
    made, _, _ = decoder(name)
    rng = np.random.default_rng(0)
    mixed = [Sampling(), Sampling(temperature=1.0, top_k=7, seed=3), Sampling(repetition_penalty=1.5)]
    requests = [
        Request(rng.integers(0, 60, rng.integers(1, 15)).tolist(), int(rng.integers(1, 17)), mixed[i % 3])
        for i in range(9)
    ]
    batch = Engine(made, Sizes(slots=3, page=4, pages=12, chunk=6, prompts=2))
    answers = engine.run(batch, requests)
    assert batch.load == {"running": 0, "waiting": 0, "pages_used": 0, "pages": 12}
    for first in (0, 3, 6):  # offline, three at once
        three = requests[first : first + 3]
        settings = [r.settings for r in three]
        offline = generate.generate(made, [r.prompt for r in three], [r.length for r in three], settings)
        assert answers[first : first + 3] == [ids.tolist() for ids in offline]


def test_a_request_that_is_cancelled_gives_its_pages_back():
    made, _, _ = decoder("llama")
    batch = Engine(made, Sizes(slots=3, page=4, pages=12, chunk=6, prompts=2))
    numbers = [batch.add(Request([1, 2, 3], 20)) for _ in range(4)]
    assert not batch.load["pages_used"]
    batch.step()
    assert batch.load["running"] == 2
    batch.cancel(numbers[0])
    batch.cancel(numbers[3])
    left = set()
    while batch.busy:
        left |= {news.number for news in batch.step()}
    assert left == {numbers[1], numbers[2]}
    assert batch.load["pages_used"] == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "one id of a prompt"),
        (Request([1], 0), "a length of 1"),
        (Request([1] * 30, 3), "33, more than the model's context of 32"),
        (Request([64], 3), "must lie in 0 to 63"),
    ],
)
def test_a_request_that_never_fits_is_refused(request_, message):
    with pytest.raises(InputError, match=message):
        Engine(decoder("llama")[0], Sizes(slots=3, page=4, pages=12)).add(request_)


# -------------------------------------------------------------------------------- drafts, and search


@pytest.mark.slow
def test_a_draft_changes_no_greedy_token_and_saves_passes():
    made, _, _ = decoder("llama")
    other, _, _ = decoder("learned")
    expected = [ids.tolist() for ids in generate.generate(made, PROMPTS, 12)]
    itself = Speculative(made, made, proposals=3).generate(PROMPTS, 12)
    assert [ids.tolist() for ids in itself.ids] == expected
    assert itself.passes == 3  # 1 id of the prompt, then 4 a pass
    assert itself.accepted == 1
    drafted = Speculative(made, other, proposals=2).generate(PROMPTS, 12)
    assert [ids.tolist() for ids in drafted.ids] == expected


def test_judged_proposals_follow_the_large_models_distribution():
    rng, rows, n = np.random.default_rng(0), 40_000, 2
    p, q = rng.dirichlet(np.ones(4), n + 1), rng.dirichlet(np.ones(4), n)
    x = np.stack([rng.choice(4, rows, p=q[i]) for i in range(n)], 1).astype(np.int32)
    wide = [np.broadcast_to(a, (rows, *a.shape)).astype(np.float32) for a in (p, q)]
    keys = jax.random.split(jax.random.key(1))
    ids, count = jax.device_get(jax.jit(speculative.judge)(*wide, x, *keys))
    for place in range(n + 1):  # p does not depend on what came before: neither may the ids
        drawn = ids[count > place, place]
        expected = len(drawn) * p[place]
        counts = np.bincount(drawn, minlength=4)
        assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees: 1 in 1,000
    kept = np.minimum(p[0], q[0]).sum()
    assert abs((count > 1).mean() - kept) < 4 * (kept * (1 - kept) / rows) ** 0.5


@pytest.mark.slow
def test_speculative_answers_are_distributed_as_the_models_own():
    made, _, _ = decoder("llama")
    other, _, _ = decoder("learned")
    rows = 512
    draft = Speculative(made, other, proposals=2)
    counts: list[dict[int, int]] = [{}, {}]
    for seed in range(4):
        each = [Sampling(temperature=0.7, top_k=4, seed=seed * rows + i) for i in range(rows)]
        plain = generate.generate(made, [PROMPTS[0]] * rows, 3, each)
        drafted = draft.generate([PROMPTS[0]] * rows, 3, each).ids
        for count, answers in zip(counts, (plain, drafted), strict=True):
            for ids in answers:
                count[int(ids[2])] = count.get(int(ids[2]), 0) + 1
    a, b = (np.array([count.get(i, 0) for i in range(64)], float) for count in counts)
    often = a + b >= 20
    freedom = int(often.sum()) - 1
    chi = ((a - b) ** 2 / np.maximum(a + b, 1))[often].sum()
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["learned", "t5"])
def test_as_many_beams_as_ids_find_the_likeliest_answer(name):
    """With two ids, 64 beams see all answers: the best is that of an exhaustive search."""
    made, built, state = decoder(name)
    prompt = PROMPTS[0]
    ids, scores = BeamSearch(made, beams=64, penalty=0.0).generate([prompt], 2)
    pad = np.zeros((64, 32), np.int32)
    at = np.broadcast_to(np.arange(32, dtype=np.int32), (64, 32))
    batch = {"tokens": pad.copy(), "positions": at}
    start = len(prompt) - 1
    batch["tokens"][:, : len(prompt)] = prompt
    batch["segments"] = (at <= start).astype(np.int32)
    key = "tokens"
    if name == "t5":
        key, start = "decoder_tokens", 0
        batch |= {"decoder_tokens": pad.copy(), "decoder_segments": (at < 2).astype(np.int32)}
    else:
        batch["segments"] = (at <= start + 1).astype(np.int32)
    batch[key][:, start + 1] = np.arange(64)
    outputs, _ = jax.jit(lambda p, b: built.model.apply(p, {}, b, key=None, train=False))(
        state["params"], batch
    )
    share = np.asarray(jax.nn.log_softmax(jnp.asarray(outputs["logits"], jnp.float32)))
    both = share[0, start][:, None] + share[:, start + 1]
    best = np.unravel_index(both.argmax(), both.shape)
    assert ids[0][0].tolist() == list(best)
    np.testing.assert_allclose(scores[0, 0], both.max(), rtol=1e-4)
    np.testing.assert_allclose(scores[0], np.sort(both.ravel())[::-1][:64], rtol=1e-3)


def test_one_beam_is_greedy():
    made, _, _ = decoder("learned")
    ids, _ = BeamSearch(made, beams=1).generate(PROMPTS, 12)
    assert [beams[0].tolist() for beams in ids] == [a.tolist() for a in generate.generate(made, PROMPTS, 12)]


# ------------------------------------------------------------------------------------------------ sampling


def shares(logits: np.ndarray, settings: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    row = jnp.asarray(logits, jnp.float32)[None]
    seen_BV = jnp.zeros(row.shape, bool) if seen is None else jnp.asarray(seen)[None]
    return np.asarray(jax.jit(sampling.probabilities)(row, seen_BV, sampling.draw([settings]))[0])


def test_each_setting_keeps_what_it_says():
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(shares(logits, Sampling(temperature=1.0)), np.exp(logits), **close)
    assert shares(logits, Sampling()).tolist() == [1, 0, 0, 0, 0]
    top_k = shares(logits, Sampling(temperature=1.0, top_k=2))
    np.testing.assert_allclose(top_k, np.array([4, 3, 0, 0, 0]) / 7, **close)
    top_p = shares(logits, Sampling(temperature=1.0, top_p=0.75))
    np.testing.assert_allclose(top_p, np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85, **close)
    both = shares(logits, Sampling(temperature=1.0, top_k=3, top_p=0.8))  # 0.7 / 0.85 of the three
    np.testing.assert_allclose(both, np.array([4, 3, 0, 0, 0]) / 7, **close)
    min_p = shares(logits, Sampling(temperature=1.0, min_p=0.3))
    np.testing.assert_allclose(min_p, np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85, **close)
    heat = shares(logits, Sampling(temperature=0.5))
    np.testing.assert_allclose(heat, np.exp(2 * logits) / np.exp(2 * logits).sum(), **close)
    seen = shares(
        np.array([2.0, -1.0, 0.5]),
        Sampling(temperature=1.0, repetition_penalty=2.0),
        np.array([True, True, False]),
    )
    x = np.exp([1.0, -2.0, 0.5])
    np.testing.assert_allclose(seen, x / x.sum(), **close)


def test_the_largest_are_found_without_sorting():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 501)).astype(np.float32) * [[1], [30], [1e-6]]
    for k in (1, 7, 500, 501):
        rows = [Sampling(temperature=1.0, top_k=k)] * 3
        kept = np.isfinite(jax.jit(sampling.filtered)(logits.astype(np.float32), sampling.draw(rows)))
        assert (kept.sum(1) == k).all()
        assert (np.where(kept, logits, np.inf).min(1) >= np.where(kept, -np.inf, logits).max(1)).all()


def test_what_is_drawn_follows_the_probabilities():
    logits = np.tile(np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32)), (20_000, 1))
    settings = sampling.draw([Sampling(temperature=1.0, seed=3)] * len(logits))
    ids = jax.jit(sampling.pick)(
        logits, np.zeros(logits.shape, bool), settings, np.arange(20_000, dtype=np.int32)
    )
    counts = np.bincount(np.asarray(ids), minlength=4)
    expected = 20_000 * np.exp(logits[0])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees: 1 in 1,000


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan: give a finite number"),
        ({"top_p": 0.0}, "top_p is 0.0: choose a value above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_bad_settings_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        Sampling(**keys).check()


def test_a_model_without_text_is_refused():
    built = build(tiny("mlp"))
    with pytest.raises(InputError, match=r"model\.name=mlp with task\.name=classify generates no text"):
        decoder_lib.Decoder(built, {"params": {}, "rest": {}})
