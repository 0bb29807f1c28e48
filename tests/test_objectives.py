"""Objectives of text: the papers' recipes, drawn for each row, the same on any number of hosts."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import build, by_path, start, steps, tiny

from bigmodel import evaluate
from bigmodel.config import InputError
from bigmodel.data import objectives, open_source, transforms
from bigmodel.tasks import batch_spec, make_pipeline

BYTES = np.array([1] * 256 + [0] * 128, np.uint8)


def mask(batch, serials, **changes):
    keys = {"seed": 0, "rate": 0.15, "mask_id": 383, "words": 256, "fixed": (256,), "token_bytes": BYTES}
    return objectives.mask_words(batch, np.asarray(serials), **{**keys, **changes})


def rows(count, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, (count, length)).astype(np.int32)
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": np.zeros_like(tokens)}


# ------------------------------------------------------------------------------------------- masked words


def test_eighty_ten_ten():
    batch = rows(400, 200)
    out = mask(batch, np.arange(400))
    real = out["masked_real"] > 0
    assert real.all()
    assert real.shape == (400, 30)
    original = np.take_along_axis(batch["tokens"], out["masked_positions"], 1)
    np.testing.assert_array_equal(out["masked_targets"], original)
    now = np.take_along_axis(out["tokens"], out["masked_positions"], 1)
    # Of 12,000; a random word is the old one in 1 of 256.
    assert (now == 383).mean() == pytest.approx(0.8, abs=0.015)
    assert (now == original).mean() == pytest.approx(0.1, abs=0.012)
    assert ((now != original) & (now != 383)).mean() == pytest.approx(0.1, abs=0.012)
    elsewhere = np.ones((400, 200), bool)
    np.put_along_axis(elsewhere, out["masked_positions"], False, 1)
    np.testing.assert_array_equal(out["tokens"][elsewhere], batch["tokens"][elsewhere])
    counts = np.bincount(out["masked_positions"].ravel(), minlength=200)
    assert counts.min() > 25  # every position, 60 times on average


def test_padding_and_separators_are_not_predicted():
    batch = rows(50, 40)
    batch["tokens"][:, ::4] = 256
    batch["segments"][:, 20:] = 0
    batch["segments"][7] = 0  # a row of padding alone
    out = mask(batch, np.arange(50))
    real = out["masked_real"] > 0
    assert (real.sum(1) == np.where(np.arange(50) == 7, 0, 2)).all()  # 15 % of 15 words
    assert (out["masked_positions"][real] < 20).all()
    assert (out["masked_positions"][real] % 4 != 0).all()
    assert (out["masked_bytes"] == real).all()


def test_a_row_is_drawn_by_seed_and_serial_alone():
    batch = rows(6, 64)
    whole = mask(batch, np.arange(6))
    part = mask({key: value[4:] for key, value in batch.items()}, [4, 5])
    for key, value in part.items():
        np.testing.assert_array_equal(value, whole[key][4:])
    assert (mask(batch, np.arange(6), seed=1)["tokens"] != whole["tokens"]).any()
    assert (mask(batch, np.arange(6) + 6)["tokens"] != whole["tokens"]).any()


def test_sentence_pairs():
    first, other = np.zeros((200, 13), np.int32), np.ones((200, 13), np.int32)
    out = objectives.sentence_pairs(first, other, np.arange(200), seed=0, cls=98, separator=99)
    assert 60 < out["next_sentence"].sum() < 140
    for row in range(200):
        tokens, types = out["tokens"][row], out["types"][row]
        (middle, end) = np.flatnonzero(tokens == 99)
        assert (tokens[0], end) == (98, 15)
        assert (tokens[1:middle] == 0).all()
        assert (tokens[middle + 1 : end] == out["next_sentence"][row]).all()  # transformers: 0 goes on
        np.testing.assert_array_equal(types, np.arange(16) > middle)


# ---------------------------------------------------------------------------------------- corrupted spans


def test_the_example_of_the_paper():
    """Raffel et al. 2020, figure 2."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    names = {100: "<X>", 99: "<Y>", 98: "<Z>"} | dict(enumerate(words))
    noise = np.isin(words, ["for", "inviting", "last"])
    inputs, targets = objectives.corrupt(np.arange(10), noise, last_sentinel=100)
    assert " ".join(names[i] for i in inputs) == "Thank you <X> me to your party <Y> week"
    assert " ".join(names[i] for i in targets) == "<X> for inviting <Y> last <Z>"


def test_the_lengths_are_those_of_t5():
    # "t5/data/preprocessors.py", random_spans_helper: 512 inputs come from 568 tokens, targets are 114.
    assert objectives.span_lengths(512, 0.15, 3.0) == (568, 114)


@pytest.mark.parametrize(("length", "rate", "span"), [(568, 0.15, 3.0), (40, 0.5, 1.0), (2, 0.15, 3.0)])
def test_spans_of_noise(length, rate, span):
    noise, spans = objectives.span_counts(length, rate, span)
    starts = []
    for seed in range(50):
        drawn = objectives.noise_spans(length, rate, span, np.random.default_rng(seed))
        begins = drawn & ~np.concatenate([[False], drawn[:-1]])
        assert (len(drawn), drawn.sum(), begins.sum(), drawn[0]) == (length, noise, spans, False)
        starts.append(np.flatnonzero(begins)[0])
    assert len(set(starts)) > (20 if length > 500 else 0)


def test_corrupted_rows_fill_their_shapes_and_lose_nothing():
    window, targets = objectives.span_lengths(64, 0.15, 3.0)
    batch = rows(20, window)
    out = objectives.corrupt_spans(
        batch, np.arange(20), seed=0, rate=0.15, mean_span=3.0, inputs=64, targets=targets,
        last_sentinel=383, end=256, start=256, token_bytes=BYTES,
    )  # fmt: skip
    assert (out["segments"] == 1).all()
    assert (out["decoder_segments"] == 1).all()
    assert (out["tokens"][:, -1] == 256).all()
    assert (out["targets"][:, -1] == 256).all()
    np.testing.assert_array_equal(out["decoder_tokens"][:, 1:], out["targets"][:, :-1])
    for row in range(20):
        np.testing.assert_array_equal(joined(out["tokens"][row], out["targets"][row]), batch["tokens"][row])


def joined(inputs, targets):
    """The text again: each sentinel of the inputs replaced by what follows it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token > 256:
            spans[token] = []
        else:
            spans[max(spans, key=lambda key: -key)].append(token)
    return [t for token in inputs[:-1] for t in spans.get(token, [token])]


# --------------------------------------------------------------------------------------- through pipelines

TEXT = {"model__vocab_size": 384, "seq_len": 32}


@pytest.mark.parametrize("family", ["bert", "t5", "pairs"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_batches_are_as_planned_and_the_same_on_two_hosts(family, split, corpus, tmp_path):
    keys = {**TEXT, "data__name": corpus}
    if family == "pairs":
        lines = [f"line {i} of it\tligne {i} de cela" for i in range(300)]
        (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
        keys |= {"data__name": f"pairs:{tmp_path}/*.tsv", "task__target_len": 24}
    config = tiny("bert" if family == "bert" else "t5", **keys)
    whole = make_pipeline(config, split)
    assert whole.spec() == batch_spec(config)
    halves = [make_pipeline(config, split, process_index=i, process_count=2) for i in range(2)]
    for step in (0, 2):
        batch, again = whole[step], whole[step]
        parts = [half[step] for half in halves]
        for key, value in batch.items():
            np.testing.assert_array_equal(value, again[key])
            np.testing.assert_array_equal(value, np.concatenate([part[key] for part in parts]), key)
    assert whole[0].keys() == whole[2].keys()


def test_pairs_come_through_whole(tmp_path):
    lines = [f"source {i}\ttarget {i}" for i in range(50)]
    (tmp_path / "a.tsv").write_text("\r\n".join(lines) + "\n\n")
    name = f"pairs:{tmp_path}/a.tsv"
    parts = [open_source(name, split) for split in ("train", "test")]
    records = [part.read(np.arange(len(part))) for part in parts]
    both = sorted(
        f"{s.decode()}\t{t.decode()}" for r in records for s, t in zip(r["source"], r["target"], strict=True)
    )
    assert both == sorted(lines)
    keys = {**TEXT, "task__pack": False, "eval__batches": -1, "batch_size": len(parts[1])}
    (batch,) = make_pipeline(tiny("t5", **keys, data__name=name), "eval")
    for row, source in enumerate(records[1]["source"]):
        text = batch["tokens"][row][batch["segments"][row] > 0]
        assert bytes(text[:-1].tolist()) == source
        assert text[-1] == 256
    assert batch["target_bytes"].sum() == sum(map(len, records[1]["target"]))


# ------------------------------------------------------------------------------------------- packed pairs


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """400 pairs of 1 to 20 letters; some targets have 40."""
    rng = np.random.default_rng(0)
    sizes = np.stack(
        [rng.integers(1, 21, 400), np.where(rng.random(400) < 0.05, 40, rng.integers(1, 21, 400))], 1
    )
    texts = [["".join(map(chr, rng.integers(97, 123, size))) for size in both] for both in sizes.tolist()]
    path = tmp_path_factory.mktemp("pairs") / "unequal.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in texts))
    return f"pairs:{path}"


def packing(name, **keys):
    given = {"model__vocab_size": 384, "seq_len": 32, "batch_size": 8}
    return tiny("t5", data__name=name, **given | keys)


def pairs_in(batch):
    """(input, target, what the decoder reads) of each pair of a batch, in order."""
    out = []
    for row, segments in enumerate(batch["segments"]):
        assert segments.max() == batch["decoder_segments"][row].max() >= 1
        for segment in range(1, segments.max() + 1):
            at, to = segments == segment, batch["decoder_segments"][row] == segment
            np.testing.assert_array_equal(batch["positions"][row][at], np.arange(at.sum()))
            ids = (batch["tokens"][row][at], batch["targets"][row][to], batch["decoder_tokens"][row][to])
            out.append(tuple(map(tuple, ids)))
    return out


def test_packed_rows_hold_each_pair_once(unequal, caplog):
    caplog.set_level("INFO", "bigmodel")
    found = {}
    for pack in (True, False):
        pipeline = make_pipeline(packing(unequal, task__pack=pack, data__shuffle=False), "train")
        batches = [pipeline[step] for step in range(pipeline.num_examples // 8)]
        last = pipeline[len(batches)]
        rest = pipeline.num_examples % 8
        batches.append({key: value[:rest] for key, value in last.items()})
        found[pack] = [pair for batch in batches for pair in pairs_in(batch)]
        assert all(reads[1:] == target[:-1] for _, target, reads in found[pack])
        assert len({reads[0] for *_, reads in found[pack]}) == 1
        assert all(source[-1] == target[-1] == 256 for source, target, _ in found[pack])
        filled = np.mean([(batch["decoder_segments"] > 0).mean() for batch in batches])
        assert (filled > 0.85) == pack
    assert sorted(found[True]) == sorted(found[False])
    assert found[True] != found[False]  # mixed
    cut = sum(len(target) == 32 for _, target, _ in found[False])
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pairs ")]
    assert len(said) == 2
    assert all(f"; {cut} of them are cut to 32 and 32 tokens" in line for line in said)


def test_packed_pairs_have_the_loss_and_the_gradient_of_pairs_in_rows_of_their_own(unequal):
    keys = {"optim__name": "sgd", "optim__lr": 0.1, "optim__warmup_steps": 0, "optim__schedule": "constant"}
    part = build(packing(unequal, **keys))
    rng = np.random.default_rng(0)
    lengths = [(3, 2), (9, 1), (14, 3), (2, 3), (1, 1), (13, 2), (6, 3), (8, 2)]
    pairs = [tuple(rng.integers(1, 40, length) for length in both) for both in lengths]
    found = []
    for rows in ([[pair] for pair in pairs], [pairs[:2], pairs[2:5], pairs[5:6], pairs[6:]]):
        batch = objectives.sequence_pairs(
            rows, inputs=32, targets=32, end=41, start=42, token_bytes=np.ones(64, np.uint8)
        )
        assert batch["decoder_segments"].max() == max(map(len, rows))
        batch = transforms.pad_rows(batch | {"mask": np.ones(len(rows), np.float32)}, 8)
        found.append(steps(part, start(part), 1, [batch]))
    (alone, values), (together, packed) = found
    assert packed["loss"][0] == pytest.approx(values["loss"][0], rel=1e-5)
    assert packed["grad_norm"][0] == pytest.approx(values["grad_norm"][0], rel=1e-4)
    for path, value in by_path(alone["params"]).items():
        np.testing.assert_allclose(by_path(together["params"])[path], value, atol=1e-5, err_msg=path)


def test_an_evaluation_is_that_of_pairs_in_rows_of_their_own(unequal):
    values = []
    for pack in (True, False):
        part = build(packing(unequal, task__pack=pack, eval__batches=-1))
        values.append(evaluate.run(part, start(part), make_pipeline(part.config, "eval")))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nc d\n", r"bad\.tsv line 2 has 1 columns; write source, one tab, target"),
        (b"a\tb\tc\n", r"bad\.tsv line 1 has 3 columns"),
        (b"a\tb\n\nc\t \n", r"bad\.tsv line 3 has an empty column"),
        (b"a\t\xff\n", r"bad\.tsv line 1 is not UTF-8 text \(invalid start byte at byte 2\); convert it"),
        (b"", r"has no line in split"),
    ],
)
def test_a_bad_line_is_named(content, message, tmp_path):
    (tmp_path / "bad.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(f"pairs:{tmp_path}/bad.tsv", "train")


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("bert", {"model__vocab_size": 258}, r"model\.vocab_size is 258.*task\.name=mlm needs 2.* to 259 or"),
        ("t5", {"model__vocab_size": 257}, r"vocab_size is 257.*task\.name=seq2seq needs 1 .*to 258 or more"),
        (
            "gpt",
            {"task__name": "mlm"},
            r"task\.name is mlm, which model\.name=gpt does not do; set it to lm",
        ),
        ("t5", {"task__mask_rate": 0}, r"task\.mask_rate is 0"),
        ("t5", {"task__target_len": 1}, r"task\.target_len is 1"),
        ("bert", {"model__pooler": False}, r"task\.next_sentence needs .* set model\.pooler to true"),
        ("t5", {"model__position": "rope"}, r"model\.position='rope' is unknown; choose one of relative"),
        ("t5", {"model__relative_buckets": 6}, r"model\.relative_buckets is 6: choose a multiple of 4"),
        (
            "t5",
            {"data__name": "pairs:/nowhere/*.tsv", "model__vocab_size": 384},
            r"pairs:/nowhere/\*\.tsv' matches no file",
        ),
        ("moe", {"model__experts_per_token": 5}, r"experts_per_token is 5: choose 1 to model\.experts=4"),
    ],
)
def test_what_does_not_fit_is_one_line(family, keys, message, corpus):
    with pytest.raises(InputError, match=message) as caught:
        make_pipeline(tiny(family, **{"data__name": corpus, "seq_len": 16, **keys}), "train")
    assert "\n" not in str(caught.value)
