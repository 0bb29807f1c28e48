"""Sources, pipelines and prefetching: every example once an epoch, the same on any number of hosts."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time

import cv2
import grain
import jax
import numpy as np
import pytest

from bigmodel import config as configs
from bigmodel.config import InputError
from bigmodel.config.families import CNN
from bigmodel.data import open_source, pipeline, shuffle, tfds
from bigmodel.data.builders import digits, prepare, python_packages, python_source
from bigmodel.tasks import batch_spec, make_pipeline

ROOT = pathlib.Path(__file__).parents[1]
MNIST_DIR = pathlib.Path(os.environ.get("BIGMODEL_TEST_TFDS", ROOT / "../shared/tfds"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Both bundled datasets, prepared once."""
    path = str(tmp_path_factory.mktemp("data"))
    for name in ("digits", "python_source"):
        prepare.prepare(name, path)
    return path


@pytest.fixture
def corpus(tmp_path):
    """A `text:` dataset of one small file."""
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i}: the quick brown fox\n" for i in range(400)))
    return f"text:{path}"


def lm(name, data_dir=None, **changes):
    tree = {"data": {"name": name, "data_dir": data_dir}, "batch_size": 8, "seq_len": 32}
    return configs.from_dict(tree | changes)


def images(data_dir, name="digits", **data):
    tree = {"data": {"name": name, "data_dir": data_dir} | data, "batch_size": 64}
    return configs.from_dict(tree | {"model": {"name": "cnn"}, "task": {"name": "classify"}})


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


# ------------------------------------------------------------------------------------------------- sources


def test_python_source_splits_share_no_file(data_dir):
    parts = {s: open_source("python_source", s, data_dir) for s in ("train", "validation", "test")}
    texts = {s: set(p.read(np.arange(len(p)))["text"]) for s, p in parts.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["test"] & texts["validation"]
    total = sum(map(len, texts.values()))
    assert 0.7 < len(texts["train"]) / total < 0.9
    paths = parts["train"].read(np.arange(len(parts["train"])))["path"]
    assert not any(b"site-packages" in p or b"/test/" in p for p in paths)


def test_python_packages_have_all_classes_in_every_split_and_no_passage_twice(tmp_path):
    builder = python_packages.PythonPackages(data_dir=tmp_path)
    parts = [[row for _, row in builder._generate_examples(split)] for split in ("train", "test")]
    for rows in parts:
        assert {row["label"] for row in rows} == set(python_packages.PACKAGES)
    train, test = ({row["text"] for row in rows} for rows in parts)
    assert not train & test
    assert all(text.count("\n") == python_packages.LINES - 1 for text in test)


def test_python_source_skips_what_is_no_text(tmp_path):
    (tmp_path / "tests").mkdir()
    for name, data in {
        "a.py": b"a",
        "b.py": b"\xff\xfe",
        "c.py": b"",
        "tests/d.py": b"d",
        "e.txt": b"e",
    }.items():
        (tmp_path / name).write_bytes(data)
    assert list(python_source.files(tmp_path)) == [("a.py", b"a")]


def test_digits_are_stratified_and_whole(data_dir):
    train, test = (open_source("digits", s, data_dir) for s in ("train", "test"))
    assert (len(train), len(test)) == (1501, 296)
    counts = np.bincount(test.read(np.arange(len(test)))["label"])
    assert counts.min() >= 28
    assert counts.max() <= 31
    image = train.read(np.arange(50))["image"]
    assert image.shape == (50, 8, 8, 1)
    assert image.max() == 255
    assert digits.is_test(np.array([1] * 6 + [2] * 5)).tolist() == [False] * 5 + [True] + [False] * 5


def test_cached_and_uncached_reads_agree(data_dir):
    order = np.array([5, 3, 5, 900])
    kept, fresh = (open_source("digits", "train", data_dir, cache=cache) for cache in (True, False))
    assert_equal(kept.read(order), fresh.read(order))
    assert_equal(kept.read(order), fresh.read(order))
    assert_equal(kept.read(order[:0]), fresh.read(order[:0]))
    assert kept.fingerprint == fresh.fingerprint
    assert kept.fingerprint != open_source("digits", "test", data_dir).fingerprint


def test_each_image_is_decoded_once(data_dir, monkeypatch):
    source, decode, decoded = open_source("digits", "train", data_dir), cv2.imdecode, []
    monkeypatch.setattr(cv2, "imdecode", lambda *args: decoded.append(1) or decode(*args))
    for _ in range(2):
        for start in range(0, 1500, 100):
            source.read(np.arange(start, start + 101))
    assert len(decoded) == 1501


def test_large_images_are_decoded_by_threads_in_order(data_dir, monkeypatch):
    expected = open_source("digits", "train", data_dir).read(np.arange(100))
    monkeypatch.setattr(tfds, "BIG_IMAGE_BYTES", 1)
    assert_equal(open_source("digits", "train", data_dir, cache=False).read(np.arange(100)), expected)


@pytest.mark.slow
def test_two_processes_prepare_one_dataset(tmp_path):
    code = "import sys; from bigmodel.data import *; print(len(open_source('digits', 'train', sys.argv[1])))"
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "new")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["1501", "1501"]
    assert not list((tmp_path / "new").rglob("incomplete*"))


def test_text_files_are_split_by_content(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i % 20}")  # each content twice
    train, test = (open_source(f"text:{tmp_path}/*.txt", split) for split in ("train", "test"))
    assert len(train) + len(test) == 40
    left, right = (set(s.read(np.arange(len(s)))["text"]) for s in (train, test))
    assert left
    assert right
    assert not left & right


def test_one_text_file_is_split_at_a_line(corpus):
    train, test = (open_source(corpus, split) for split in ("train", "test"))
    parts = [s.read(np.array([0]))["text"][0] for s in (train, test)]
    assert parts[0].endswith(b"\n")
    assert b"".join(parts) == pathlib.Path(corpus.removeprefix("text:")).read_bytes()
    assert 0.88 < len(parts[0]) / sum(map(len, parts)) < 0.92


def test_text_errors(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1") * 20)
    for name, message in {"none*": "matches no file", "empty.txt": "has no text"}.items():
        with pytest.raises(InputError, match=rf"data\.name.*{message}"):
            open_source(f"text:{tmp_path}/{name}", "train")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
        open_source(f"text:{tmp_path}/latin.txt", "train").read(np.array([0]))
    with pytest.raises(InputError, match=r"data\.eval_split"):
        open_source(f"text:{tmp_path}/latin.txt", "validation")


def test_dataset_errors_name_the_key_and_the_fix(data_dir, tmp_path):
    cases = {
        ("mnits", "train", data_dir): r"data\.name='mnits' is unknown; did you mean 'mnist'",
        ("digits", "trian", data_dir): r"'trian'.*data\.split.*train, test",
        ("digits", "train[:9999999]", data_dir): r"data\.split",
        ("digits/other", "train", data_dir): "write digits",
        ("cifar10", "train", data_dir): r"data\.data_dir=.*prepare_data\.py --name=cifar10 --data_dir=",
        ("cifar10", "train", str(tmp_path / "none")): r"data\.data_dir=.* does not exist",
        ("mnist:9.9.9", "train", data_dir): "only: 3.0.1",
    }
    for arguments, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            open_source(*arguments)
        assert "\n" not in str(caught.value)


def test_a_format_without_random_access_is_refused(data_dir, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", data_dir, copy], check=True)
    for path in copy.rglob("dataset_info.json"):
        path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(InputError, match=r"tfrecord.*no random access.*prepare_data"):
        open_source("digits", "train", str(copy))


def test_a_damaged_record_is_named(data_dir, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", data_dir, copy], check=True)
    (path,) = copy.rglob("digits-train.array_record*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    source = open_source("digits", "train", str(copy))
    with pytest.raises(InputError, match=r"digits/1\.0\.0 split 'train' record \d+ is damaged"):
        source.read(np.arange(len(source)))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"digits/1\.0\.0 split 'train'"):
        open_source("digits", "train", str(copy)).read(np.arange(len(source)))


def test_a_damaged_dataset_info_is_named(data_dir, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", data_dir, copy], check=True)
    for path in copy.rglob("dataset_info.json"):
        path.write_text(path.read_text()[:50])
    for name in ("digits", "python_source"):
        with pytest.raises(InputError, match=f"data.name='{name}' cannot be opened in data.data_dir"):
            open_source(name, "train", str(copy))


def test_prepare_data_script_fails_with_one_line_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts/prepare_data.py"),
        "--name=mnits",
        f"--data_dir={tmp_path}",
    ]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "mnist" in run.stderr


# ------------------------------------------------------------------------------------------------ pipeline


def test_spec_is_known_before_the_data(corpus, data_dir, tmp_path):
    for config in (lm(corpus), images(data_dir)):
        for split in ("train", "eval"):
            made = make_pipeline(config, split)
            assert made.spec() == batch_spec(config)
            shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in made[0].items()}
            assert shapes == batch_spec(config)
    assert batch_spec(lm("lm1b", str(tmp_path / "none")))["tokens"].shape == (8, 32)
    assert batch_spec(images(str(tmp_path / "none"), "cifar10"))["image"].shape == (64, 32, 32, 3)
    assert not (tmp_path / "none").exists()


def test_a_batch_is_a_pure_function_of_seed_and_step(corpus, data_dir):
    for config in (lm(corpus), images(data_dir)):
        first = make_pipeline(config, "train")
        assert_equal(first[7], first[7])
        assert_equal(first[7], make_pipeline(config, "train")[7])
        other = make_pipeline(config.replace(seed=1), "train")
        assert (first.indices(7) != other.indices(7)).any()
        assert first.fingerprint() != other.fingerprint()
        assert (
            make_pipeline(config, "eval").fingerprint()
            == make_pipeline(config.replace(seed=1), "eval").fingerprint()
        )


def test_each_epoch_holds_each_example_once(data_dir):
    config = images(data_dir)
    train = make_pipeline(config, "train")
    order = np.concatenate(
        [train.indices(step) for step in range(3 * 1501 // 64 + 1)]
    )  # batches straddle epochs
    epochs = [order[e * 1501 : (e + 1) * 1501] for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1501))
    assert (epochs[0] != epochs[1]).mean() > 0.9
    next_seed = make_pipeline(config.replace(seed=1), "train")
    orders = [next_seed.indices(step) for step in range(1501 // 64)]
    # Grain seeds epoch e with seed + e: without a hash, seed 1's first epoch would be seed 0's second.
    assert (np.concatenate(orders) != epochs[1][: 64 * len(orders)]).mean() > 0.9


def test_without_shuffle_training_is_in_order(data_dir):
    config = images(data_dir, shuffle=False)
    order = np.concatenate([make_pipeline(config, "train").indices(step) for step in range(24)])
    np.testing.assert_array_equal(order, np.arange(24 * 64) % 1501)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_host_slices_make_the_global_batch(corpus, hosts, split):
    whole = make_pipeline(lm(corpus), split)
    parts = [make_pipeline(lm(corpus), split, process_index=i, process_count=hosts) for i in range(hosts)]
    for step in (0, 3, min(len(whole), 1000) - 1):
        batches = [part[step] for part in parts]
        assert_equal({k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, whole[step])
    assert all(part.fingerprint() == whole.fingerprint() for part in parts)


def test_evaluation_covers_each_example_once(data_dir, corpus):
    eval_images = make_pipeline(images(data_dir), "eval")
    assert len(eval_images) == 5
    batches = list(eval_images)
    masks = np.concatenate([b["mask"] for b in batches])
    assert masks.tolist() == [1] * 296 + [0] * 24
    labels = np.concatenate([b["label"] for b in batches])[masks > 0]
    np.testing.assert_array_equal(
        labels, open_source("digits", "test", data_dir).read(np.arange(296))["label"]
    )
    rows = list(make_pipeline(lm(corpus), "eval"))
    size = sum(int(b["target_bytes"].astype(int).sum()) for b in rows)
    assert size == open_source(corpus, "test").num_bytes
    assert not rows[-1]["segments"][rows[-1]["mask"] == 0].any()
    with pytest.raises(IndexError):
        eval_images[5]
    two = dataclasses.replace(images(data_dir), eval=configs.Eval(batches=2))
    assert len(make_pipeline(two, "eval")) == 2


def test_images_are_scaled_to_minus_one_and_one(data_dir):
    batch = make_pipeline(images(data_dir), "train")[0]
    assert batch["image"].min() == -1
    assert batch["image"].max() == 1
    raw = open_source("digits", "train", data_dir).read(make_pipeline(images(data_dir), "train").indices(0))
    np.testing.assert_allclose(batch["image"], raw["image"] / 127.5 - 1, atol=1e-6)


def test_pipeline_errors_name_the_key(corpus, data_dir):
    cases = [
        (lm(corpus, model={"vocab_size": 200}), r"model\.vocab_size is 200.*data\.tokenizer=bytes"),
        (lm(corpus, batch_size=5000), "fewer than batch_size=5000"),
        (lm("digits", data_dir), "no feature 'text'"),
        (
            dataclasses.replace(images(data_dir), data=lm("python_source", data_dir).data),
            "no feature 'image'",
        ),
        (dataclasses.replace(images(data_dir), model=CNN(num_classes=7)), r"model\.num_classes.*10"),
    ]
    for config, message in cases:
        with pytest.raises(InputError, match=message):
            make_pipeline(config, "train")
    with pytest.raises(InputError, match="batch_size is 8"):
        make_pipeline(lm(corpus), "train", process_index=0, process_count=3)
    with pytest.raises(InputError, match="images of any size"):
        batch_spec(images(data_dir, "imagenet2012"))


def test_ids_out_of_range_never_reach_the_model(corpus, data_dir, monkeypatch):
    broken = make_pipeline(lm(corpus), "train")
    broken._examples._windows = np.full_like(broken._examples._windows, 300)
    with pytest.raises(InputError, match=r"token id 300.*data\.tokenizer"):
        broken[0]
    bad_labels = make_pipeline(images(data_dir), "train")
    bad_labels._examples.source._cached["label"][:] = -1
    bad_labels._examples.source._have[:] = True
    with pytest.raises(InputError, match="label -1"):
        bad_labels[0]


def test_mnist_if_it_is_here():
    if not (MNIST_DIR / "mnist").is_dir():
        pytest.skip(f"no prepared mnist in {MNIST_DIR}; set BIGMODEL_TEST_TFDS to a data_dir that has one")
    config = images(str(MNIST_DIR), "mnist")
    train, test = make_pipeline(config, "train"), make_pipeline(config, "eval")
    assert (train.num_examples, test.num_examples) == (60000, 10000)
    assert train.spec() == batch_spec(config)
    assert set(np.unique(np.concatenate([train[i]["label"] for i in range(5)]))) == set(range(10))


# ------------------------------------------------------------------------------------------------ prefetch


class Counting:
    """A stand-in for a pipeline: batch i is {"x": i}."""

    def __init__(self, length=sys.maxsize, fail_at=None):
        self.length, self.fail_at, self.reads = length, fail_at, 0

    def __len__(self):
        return self.length

    def __getitem__(self, step):
        self.reads += 1
        if step == self.fail_at:
            raise InputError(f"record {step} is damaged")
        return {"x": np.array([step])}


def test_prefetch_keeps_the_order_and_ends():
    with pipeline.Prefetch(Counting(10), 3, put=lambda b: b["x"] * 2, depth=3) as batches:
        seen = [(ready.step, int(ready.batch[0])) for ready in batches]
    assert seen == [(step, 2 * step) for step in range(3, 10)]
    with pipeline.Prefetch(Counting(2), 2) as batches:
        assert list(batches) == []


def test_prefetch_reads_no_further_than_its_depth():
    counting = Counting()
    with pipeline.Prefetch(counting, 0, depth=2) as batches:
        time.sleep(0.1)
        assert counting.reads == 2
        next(batches)
        time.sleep(0.1)
        assert counting.reads == 3
    assert not batches._thread.is_alive()


def test_prefetch_raises_what_the_thread_raised_at_its_step():
    with pipeline.Prefetch(Counting(fail_at=4), 2) as batches:
        assert [next(batches).step for _ in range(2)] == [2, 3]
        with pytest.raises(InputError, match="record 4"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)

    def bad_put(batch):
        raise RuntimeError("no room on the device")

    with (
        pipeline.Prefetch(Counting(), 0, put=bad_put) as batches,
        pytest.raises(RuntimeError, match="no room"),
    ):
        next(batches)


def test_prefetch_says_how_long_it_was_waited_for():
    def slow(batch):
        time.sleep(0.05)
        return batch

    with pipeline.Prefetch(Counting(3), 0, put=slow, depth=1) as batches:
        assert next(batches).wait_s > 0.03
        time.sleep(0.2)
        assert next(batches).wait_s < 0.03


def test_closing_prefetch_frees_a_consumer_in_another_thread():
    block = threading.Event()
    batches = pipeline.Prefetch(Counting(), 0, put=lambda batch: block.wait(5))
    ended = []
    consumer = threading.Thread(target=lambda: ended.extend(iter(batches)))
    consumer.start()
    time.sleep(0.05)
    closer = threading.Thread(target=batches.close)
    closer.start()
    consumer.join(timeout=2)
    assert not consumer.is_alive()
    assert ended == []
    block.set()
    closer.join(timeout=5)
    assert not batches._thread.is_alive()


def test_prefetch_over_a_real_pipeline(corpus):
    made = make_pipeline(lm(corpus), "eval")
    with pipeline.Prefetch(made, 0, jax.device_put, depth=2) as batches:
        total = sum(int(ready.batch["target_bytes"].astype(int).sum()) for ready in batches)
    assert total == open_source(corpus, "test").num_bytes


def test_part_of_a_split_is_spread_evenly_over_it():
    class Numbers:
        def __len__(self):
            return 100

        def read(self, indices):
            return {"x": indices}

    part = pipeline.Pipeline(
        pipeline.Parts(Numbers(), lambda batch, *_: dict(batch), {}), facts={}, batch_size=8, seed=None,
        max_batches=3, process_index=0, process_count=1,
    )  # fmt: skip
    read = np.concatenate([part[step]["x"] for step in range(len(part))])
    assert len(set(read.tolist())) == 24
    assert set(np.diff(read).tolist()) == {4, 5}
    assert (read[0], read[-1]) == (0, 95)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 65_536, 65_537, 1_000_003, 2**24 + 1, 10**9])
@pytest.mark.parametrize("seed", [0, 12_345, 2**32 - 1])
def test_the_order_of_examples_is_grains(size, seed):
    positions = np.unique(np.random.default_rng(0).integers(0, 3 * size, 200))
    theirs = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    assert shuffle.Shuffled(size, seed).take(positions).tolist() == [theirs[int(i)] for i in positions]
    in_turn = grain.MapDataset.range(size).repeat()
    assert shuffle.InTurn(size).take(positions).tolist() == [in_turn[int(i)] for i in positions]


def test_the_order_of_a_large_batch_takes_little_time():
    order, positions = shuffle.Shuffled(90_000, 3), np.arange(65_536)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        order.take(positions)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # 5 ms on a quiet core; one position a call took 850 ms
