"""scripts/data.py shows what the batches hold."""

from __future__ import annotations

import re

import numpy as np
from conftest import ROOT, run_script
from PIL import Image
from test_sizes import ratings, table

from bigmodel import config as config_lib
from bigmodel import preview, tasks
from bigmodel.config import Config
from bigmodel.data import Facts, labels
from bigmodel.data import tables as tables_lib


def shown(config: Config, out=None) -> dict[str, list[str]]:
    lines: list[str] = []
    preview.show(config, out, lines.append)
    found: dict[str, list[str]] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        found.setdefault(word, []).append(rest.strip())
    return found


def load(spec: str, **keys) -> Config:
    return config_lib.load(f"{ROOT}/configs/{spec}", {k.replace("__", "."): v for k, v in keys.items()})


def test_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n:04}\n" for n in range(400)))
    config = load("gpt.py", data__name=f"text:{tmp_path}/a.txt", seq_len=50, batch_size=8)
    found = shown(config)
    (data,) = found["data"]
    assert data.endswith("a.txt: 3.61 kB train, 390 B test (the end of the file)")
    batch = tasks.make_pipeline(config, "train")[0]
    assert found["example"][0] == f"1: {bytes(x for x in batch['tokens'][0].tolist() if x < 256).decode()!r}"
    (lengths,) = found["lengths"]
    assert "most 50 tokens" in lengths
    # 3,612 ids, so 3,611 targets, in 73 windows of 50, the last of them with 11
    assert float(re.search(r"([\d.]+)% padding", lengths)[1]) < 2


def test_pairs(tmp_path):
    (tmp_path / "p.tsv").write_text("".join(f"one {n}\tun {n}\n" for n in range(90)))
    found = shown(load("t5.py", data__name=f"pairs:{tmp_path}/p.tsv", seq_len=32, batch_size=4))
    assert re.search(r"pairs train, \d+ pairs test \(by a hash of each line\)", found["data"][0])
    assert [line.split(":")[0] for line in found["lengths"]] == ["inputs", "targets"]
    assert re.search(r"'one \d+.*' -> 'un \d+", found["example"][0])


def test_a_table(tmp_path):
    name = table(tmp_path / "t.csv", rows=200)
    config = load("mlp.py", data__name=name, data__label="verdict", batch_size=16)
    found = shown(config)
    rows = {f"age={n}, town=t{n % 7}, label {'abc'[n % 3]}" for n in range(200)}
    assert {line.partition(": ")[2] for line in found["example"]} < rows
    source = labels.open_split(tasks.sized(config), "train")
    columns = tables_lib.fit(config, source)
    read = source.read(np.arange(5))
    encoded = columns.encode(read)
    for at in range(5):
        cells = columns.decode({key: x[at] for key, x in encoded.items()})
        assert cells == {"age": f"{int(read['age'][at])}", "town": read["town"][at].decode()}
    pipeline = tasks.make_pipeline(config, "train")
    steps = -(-pipeline.num_examples // 16)
    counts = np.bincount(np.concatenate([pipeline[step]["label"] for step in range(steps)]))
    for name, count in zip("abc", counts, strict=True):
        assert f"{name} {count} (" in found["classes"][0]
    number = shown(config_lib.override(config, {"data.label": "age", "task.name": "regress"}))
    assert re.search(r"label: least \d+, median \d+", number["numbers"][0])


def test_ratings(tmp_path):
    config = load("recommender.py:kind=ncf", data__name=ratings(tmp_path / "r.csv"), batch_size=16)
    found = shown(config)
    assert found["data"][0].endswith("240 ratings train, 30 ratings test (the last rating of each user)")
    ids = {key: {n: name for name, n in each.items()} for key, each in _ids(config).items()}
    batch = tasks.make_pipeline(config, "train")[0]
    user, item = ids["user"][int(batch["user"][0])], ids["item"][int(batch["item"][0])]
    assert found["example"][0].startswith(f"1: user {user}, item {item}, not i")
    stars = shown(load("recommender.py", data__name=ratings(tmp_path / "r.csv"), batch_size=16))
    assert re.match(r"rating: least 0, median 1.5, most 4", stars["numbers"][0])


def _ids(config: Config):
    from bigmodel.data.ratings import ids

    return ids(tasks.sized(config), Facts(config))


def test_images_and_the_script(tmp_path):
    for kind, color in (("red", 200), ("blue", 20)):
        (tmp_path / "in" / kind).mkdir(parents=True)
        for n in range(30):
            Image.new("RGB", (12, 10), (color, 0, n)).save(tmp_path / "in" / kind / f"{n}.png")
    spec = f"--config={ROOT}/configs/cnn.py:data=folder:{tmp_path}/in"
    keys = ["--config.data.image_size=8", "--config.data.augment=flip", "--config.batch_size=8"]
    ran = run_script("data.py", spec, *keys, f"--out={tmp_path}/out")
    assert ran.code == 0, ran.err
    assert "sizes     model.num_classes 2 (classes of in)" in ran.out
    assert re.search(r"^data .*train, .* test \(by a hash of each path\)$", ran.out, re.MULTILINE)
    assert re.search(
        r"^classes .*red \d+ \(.*blue \d+ \(|^classes .*blue \d+ \(.*red \d+ \(", ran.out, re.MULTILINE
    )
    assert re.search(r"^example   1: image 8 x 8 x 3, label (red|blue)$", ran.out, re.MULTILINE)
    with Image.open(tmp_path / "out" / "batch.png") as picture:
        assert picture.size[0] > 20
    missing = run_script("data.py", f"--config={ROOT}/configs/gpt.py", "--config.data.name=text:/none.txt")
    assert (missing.code, len(missing.err.splitlines())) == (2, 1)
