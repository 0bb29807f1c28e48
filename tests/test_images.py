"""Images on their way to the model: augmented, mixed, balanced, checked, by seed and step alone."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import saved, tiny

from bigmodel import config as config_lib
from bigmodel import tasks
from bigmodel.config import InputError
from bigmodel.data import balance, images, labels, open_source, randaugment, tfds, transforms
from bigmodel.data.builders import prepare
from bigmodel.data.source import Feature
from bigmodel.infer.predict import Predictor
from bigmodel.tasks import batch_spec, make_pipeline

ALL = "crop:2,flip:0.5,randaugment:2:9,erase:0.5"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data"))
    prepare.prepare("digits", path)
    return path


def config(digits: str, task: dict | None = None, **data) -> config_lib.Config:
    tree = {"data": {"name": "digits", "data_dir": digits} | data, "batch_size": 32}
    return config_lib.from_dict(
        tree | {"model": {"name": "cnn", "num_classes": 10}, "task": {"name": "classify"} | (task or {})}
    )


def photo(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# ------------------------------------------------------------------------------------------ purity, hosts


@pytest.mark.parametrize(
    "data",
    [{"augment": ALL}, {"augment": "resized_crop:0.3", "image_size": 12, "mixup": 0.4, "cutmix": 1.0}],
    ids=["augment", "mix"],
)
def test_a_batch_is_a_pure_function_of_seed_step_and_not_of_hosts(digits, data):
    c = config(digits, **data)
    whole = make_pipeline(c, "train")
    assert_equal(whole[50], make_pipeline(c, "train")[50])
    assert (whole[50]["image"] != whole[50 + 1501]["image"]).any()
    parts = [make_pipeline(c, "train", process_index=i, process_count=4)[50] for i in range(4)]
    assert_equal({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, whole[50])
    assert whole.spec() == batch_spec(c)
    seeded = make_pipeline(c.replace(seed=1), "train")[50]
    assert (whole[50]["image"] != seeded["image"]).any()
    assert whole.fingerprint() != make_pipeline(config(digits), "train").fingerprint()


def test_evaluation_is_not_augmented(digits):
    plain = list(make_pipeline(config(digits), "eval"))
    other = list(make_pipeline(config(digits, augment=ALL, mixup=0.5, balance="balanced"), "eval"))
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
        assert set(b["label_share"][b["mask"] > 0]) == {1.0}


# ------------------------------------------------------------------------------------------ single images


def test_center_resizes_the_shorter_side_and_cuts_the_middle():
    for height, width in ((24, 32), (32, 24), (8, 8), (300, 211)):
        assert transforms.center(photo(height, width), 16, 0.875).shape == (16, 16, 3)
    ramp = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 1))
    np.testing.assert_array_equal(transforms.center(ramp, 20)[0, :, 0], np.arange(10, 30))


def test_crop_flip_and_erase_do_what_they_say():
    image, rng = photo(), np.random.default_rng(0)
    np.testing.assert_array_equal(transforms.flip(image, rng, 1.0), image[:, ::-1])
    np.testing.assert_array_equal(transforms.flip(image, rng, 0.0), image)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    windows = {padded[y : y + 24, x : x + 32].tobytes() for y in range(7) for x in range(7)}
    seen = {transforms.crop(image, rng, 3).tobytes() for _ in range(60)}
    assert seen <= windows
    assert len(seen) > 20
    erased = [(transforms.erase(image, rng, 1.0) != image).any(2).mean() for _ in range(50)]
    assert 0.01 < min(erased) < max(erased) < 0.45
    assert transforms.erase(image, rng, 0.0) is image
    assert transforms.resized_crop(image, rng, 0.08, 10).shape == (10, 10, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("index", range(len(randaugment.OPERATIONS)))
def test_each_operation_keeps_shape_and_type(index, channels):
    image = photo(channels=channels)
    for sign in (-1.0, 1.0):
        out = randaugment.OPERATIONS[index](image, 0.9, sign).reshape(image.shape)
        assert out.dtype == np.uint8
    gentle = randaugment.OPERATIONS[index](image, 0.0, 1.0).reshape(image.shape)
    if index not in (1, 2):  # autocontrast and equalise have no strength
        np.testing.assert_array_equal(gentle, image)


def test_normalize_with_a_datasets_own_numbers(digits):
    c = config(digits, mean=(0.25,), std=(0.5,))
    plain, own = (make_pipeline(each, "eval")[0]["image"] for each in (config(digits), c))
    np.testing.assert_allclose(own, plain + 0.5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- mixing


def test_mixed_labels_are_the_share_of_pixels():
    image = np.stack([np.zeros((16, 16, 1)), np.ones((16, 16, 1))]).astype(np.float32)
    batch = {"image": image, "label": np.array([3, 5], np.int32)}
    other = {key: value[::-1] for key, value in batch.items()}
    for mixup, cutmix in ((0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
        for seed in range(20):
            rngs = [transforms.generator(seed, position, 2) for position in range(2)]
            out = transforms.mix(batch, other, rngs, mixup, cutmix)
            np.testing.assert_allclose(out["image"][0].mean(), 1 - out["label_share"][0], atol=1e-5)
            np.testing.assert_allclose(out["image"][1].mean(), out["label_share"][1], atol=1e-5)
            assert out["label_other"].tolist() == [5, 3]


def test_the_mixed_loss_is_that_of_soft_labels():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 10)), jnp.float32)
    a, b, share = rng.integers(0, 10, 6), rng.integers(0, 10, 6), rng.random(6).astype(np.float32)
    soft = share[:, None] * np.eye(10)[a] + (1 - share)[:, None] * np.eye(10)[b]
    batch = {"label": a, "label_other": b, "label_share": share, "mask": np.ones(6, np.float32)}
    batch = {
        key: jnp.asarray(value, jnp.int32 if value.dtype == int else None) for key, value in batch.items()
    }
    task = tasks.make(config_lib.from_dict({"task": {"name": "classify"}, "model": {"name": "cnn"}}))
    total, weight = task.terms({"logits": logits}, batch, True)["loss"]
    expected = optax.softmax_cross_entropy(logits, jnp.asarray(soft, jnp.float32)).mean()
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-5)


# ----------------------------------------------------------------------------------------------- balance


def test_balanced_order_evens_out_classes():
    labels = np.repeat([0, 1, 2], [9000, 900, 100])
    for power, expected in ((0.0, [1, 1, 1]), (0.5, np.sqrt([9000, 900, 100])), (1.0, [9000, 900, 100])):
        order = balance.Balanced(labels, power, seed=0)
        drawn = np.bincount(labels[order.take(np.arange(4000))], minlength=3)
        np.testing.assert_allclose(drawn / 4000, np.array(expected) / np.sum(expected), atol=0.03)
    again = balance.Balanced(labels, 1.0, seed=0)
    np.testing.assert_array_equal(again.take(np.arange(50)), order.take(np.arange(50)))


def test_over_and_undersampling_are_epochs_of_equal_counts():
    labels = np.repeat([0, 2, 5], [50, 20, 10])
    over, under = (balance.order(name, labels, 0) for name in ("over", "under"))
    first = over.take(np.arange(150))
    assert np.bincount(labels[first]).tolist() == [50, 0, 50, 0, 0, 50]
    times = np.bincount(first, minlength=80)
    assert set(times[:50]) == {1}
    assert set(times[50:70]) == {2, 3}
    assert set(times[70:]) == {5}
    epochs = [under.take(np.arange(start, start + 30)).tolist() for start in (0, 30)]
    for epoch in epochs:
        assert len(set(epoch)) == 30
        assert np.bincount(labels[epoch])[[0, 2, 5]].tolist() == [10, 10, 10]
    assert sorted(epochs[0]) != sorted(epochs[1])
    first = np.arange(30)
    assert balance.order("under", labels, 0).take(first).tolist() == epochs[0]
    assert balance.order("under", labels, 1).take(first).tolist() != epochs[0]


def test_class_weights_make_classes_weigh_alike(digits):
    np.testing.assert_allclose(balance.class_weights(np.array([10, 30, 0])), [2, 2 / 3, 0], rtol=1e-6)
    c = config(digits, task={"class_weights": "balanced"})
    train, held_out = make_pipeline(c, "train")[0], make_pipeline(c, "eval")[0]
    counts = np.bincount(open_source("digits", "train", digits).read(np.arange(1501))["label"])
    np.testing.assert_allclose(train["weight"], balance.class_weights(counts)[train["label"]])
    assert set(held_out["weight"]) == {1.0}


def test_losses_by_formula():
    logits = jnp.asarray([[2.0, -1.0, 0.0], [0.5, 0.5, 3.0]])
    batch = {"label": jnp.asarray([0, 1]), "mask": jnp.ones(2), "weight": jnp.asarray([3.0, 1.0])}
    tree = {"model": {"name": "cnn"}, "task": {"name": "classify", "loss": "focal", "focal_gamma": 1.5}}
    total, weight = tasks.make(config_lib.from_dict(tree)).terms({"logits": logits}, batch, True)["loss"]
    p = np.asarray(jax.nn.softmax(logits))[[0, 1], [0, 1]]
    assert float(total) == pytest.approx((np.array([3, 1]) * -np.log(p) * (1 - p) ** 1.5).sum(), rel=1e-4)
    assert float(weight) == 4
    values = {"label": jnp.asarray([[0.0, 1.0, 5.0], [0.0, 0.0, 0.0]]), "mask": jnp.asarray([1.0, 0.0])}
    tree["task"] = {"name": "regress", "huber_delta": 1.0}
    terms = tasks.make(config_lib.from_dict(tree)).terms({"logits": logits}, values, False)
    assert float(terms["loss"][0]) == pytest.approx((1.5 + 1.5 + 4.5) / 3)
    assert float(terms["mse"][0]) == pytest.approx((4 + 4 + 25) / 3)
    tree["task"] = {"name": "multilabel"}
    binary = {"label": jnp.asarray([[1.0, 0.0, 1.0]] * 2), "mask": jnp.ones(2)}
    terms = tasks.make(config_lib.from_dict(tree)).terms({"logits": logits}, binary, False)
    expected = optax.sigmoid_binary_cross_entropy(logits, binary["label"]).mean(-1).sum()
    assert float(terms["loss"][0]) == pytest.approx(float(expected), rel=1e-5)
    assert float(terms["exact_match"][0]) == 0


# ---------------------------------------------------------------------------------------------- bad data


class Broken:
    """A source whose records 3 and 40 do not decode, and whose record 7 has label 99."""

    def __init__(self, source):
        self.source, self.features, self.fingerprint = source, source.features, source.fingerprint

    def __len__(self):
        return len(self.source)

    def read(self, indices):
        for index in set(indices.tolist()) & {3, 40}:
            raise InputError(f"digits/1.0.0 split 'train' record {index} is damaged (no image)")
        batch = self.source.read(indices)
        return {**batch, "label": np.where(np.isin(indices, 7), 99, batch["label"])}


def records(digits: str, max_skipped: int) -> labels.Records:
    source = Broken(open_source("digits", "train", digits))
    where = "split 'train' record {}".format
    return labels.Records(source, config(digits, max_skipped=max_skipped), where)


def test_bad_records_are_named(digits):
    with pytest.raises(InputError, match=r"record 3 is damaged"):
        records(digits, 0).read(np.arange(5))
    with pytest.raises(
        InputError, match=r"split 'train' record 7 has label 99, not one of 0\.\.9.*num_classes"
    ):
        records(digits, 0).read(np.arange(5, 10))


def test_a_capped_skip_counts_replaces_and_masks(digits, caplog):
    lenient = records(digits, 3)
    with caplog.at_level(logging.WARNING, "bigmodel"):
        batch = lenient.read(np.arange(50))
    assert sorted(lenient.skipped) == [3, 7, 40]
    assert [line.split(" of ")[0] for line in caplog.messages] == [f"skipped {n}" for n in (1, 2, 3)]
    assert np.flatnonzero(batch["mask"] == 0).tolist() == [3, 7, 40]
    np.testing.assert_array_equal(batch["image"][3], batch["image"][4])
    assert_equal(lenient.read(np.arange(50)), batch)
    with pytest.raises(InputError, match=r"data\.max_skipped=2 are skipped already"):
        records(digits, 2).read(np.arange(50))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"augment": "corp:4"}, r"data\.augment has 'corp'.*crop, flip, randaugment"),
        ({"augment": "crop:x"}, r"data\.augment has 'crop:x'.*crop:4"),
        ({"augment": "flip:2"}, r"data\.augment has 'flip:2', out of range: 0 to 1"),
        ({"augment": "resized_crop:0.1"}, r"resized_crop.*data\.image_size"),
        ({"label": "lable"}, r"no feature 'lable'.*data\.label"),
        ({"group": "sex"}, r"no feature 'sex'.*data\.group"),
        ({"mean": (0.1, 0.2)}, r"data\.mean has 2 numbers; give one"),
    ],
)
def test_bad_keys_are_named(digits, data, message):
    with pytest.raises(InputError, match=message):
        make_pipeline(config(digits, **data), "train")
    with pytest.raises(InputError):
        config(digits, image_size=-1)


def test_images_of_any_size_are_resized(digits, monkeypatch):
    c = dataclasses.replace(config(digits, image_size=10))
    features = {"image": Feature((None, None, 3), "uint8")}
    features["label"] = Feature((), "int64", 10)
    assert images.check(c, features) == (10, 10, 3)
    column = np.empty(2, object)
    column[:] = [photo(20, 31), photo(9, 7)]
    batch = {"image": column, "label": np.array([1, 2]), "mask": np.ones(2, np.float32)}
    out = images.Prepare(c, False, None)(batch, np.arange(2))
    assert out["image"].shape == (2, 10, 10, 3)


# ------------------------------------------------------------------------------------- kinds of image files


def encoded(kind: str) -> tuple[bytes, Any]:
    """A file of a kind -> (its bytes, the Pillow image that they hold)."""
    import io

    from PIL import Image

    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8), (36, 24))
    image = Image.fromarray(smooth)
    alpha = np.random.default_rng(1).integers(0, 256, (24, 36)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    made: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "rgb": (image, "PNG", {}),
        "jpeg": (image, "JPEG", {"quality": 95}),
        "turned": (image, "JPEG", {"quality": 95, "exif": turned}),
        "cmyk": (image.convert("CMYK"), "JPEG", {"quality": 95}),
        "alpha": (Image.fromarray(np.dstack([smooth, alpha])), "PNG", {}),
        "palette": (image.convert("P"), "PNG", {}),
        "clear palette": (image.convert("P"), "PNG", {"transparency": 0}),
        "gray": (image.convert("L"), "PNG", {}),
        "gray jpeg": (image.convert("L"), "JPEG", {"quality": 95}),
        "gray alpha": (image.convert("LA"), "PNG", {}),
        "bits": (image.convert("1"), "PNG", {}),
    }
    picture, form, keys = made[kind]
    file = io.BytesIO()
    picture.save(file, form, **keys)
    return file.getvalue(), Image.open(io.BytesIO(file.getvalue()))


KINDS = ["rgb", "jpeg", "turned", "cmyk", "alpha", "palette", "clear palette", "gray", "gray jpeg",
         "gray alpha", "bits"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_file_is_read_as_pillow_reads_it(kind):
    """In training, from a dataset of colors or of grays, and by a model that predicts."""
    from tensorflow_datasets import features as kinds
    from tensorflow_datasets.proto import tf_example_pb2

    content, theirs = encoded(kind)
    for channels, mode in ((3, "RGB"), (1, "L")):
        expected = np.asarray(theirs.convert(mode)).reshape(24, 36, channels)
        stored = tf_example_pb2.Example().features.feature["image"]
        stored.bytes_list.value.append(content)
        ours = tfds._decoder(kinds.Image(shape=(None, None, channels)))(stored)
        assert (ours.shape, ours.dtype) == (expected.shape, np.uint8)
        assert np.abs(ours.astype(int) - expected).max() <= 2
        np.testing.assert_array_equal(ours, tfds.pixels(content, channels))


def test_of_sixteen_bits_the_upper_ones_count():
    wide = (np.arange(24 * 36) * 75).astype(np.uint16).reshape(24, 36)
    _, png = cv2.imencode(".png", wide)
    np.testing.assert_array_equal(tfds.pixels(png.tobytes(), 1)[..., 0], wide >> 8)
    np.testing.assert_array_equal(tfds.pixels(png.tobytes(), 3), np.dstack([wide >> 8] * 3))


def test_a_prediction_sees_the_pixels_that_training_saw(tmp_path):
    config = tiny("cnn", data__name="digits", data__image_size=8, batch_size=16)
    predictor = Predictor.load(saved(tmp_path / "run", config))
    for kind in KINDS:
        content, _ = encoded(kind)
        (tmp_path / "image").write_bytes(content)
        pixels = tfds.pixels(content, 1)
        ours, theirs = predictor.predict([tmp_path / "image", pixels.tolist()])[0]
        assert ours == theirs, kind


# ------------------------------------------------------------------------------------ images of one's own


def draw(path: pathlib.Path, value: int, sides: tuple[int, int] = (10, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*sides, 3), value, np.uint8))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """40 gray squares of two classes, darker and brighter ones, of three sizes."""
    root = tmp_path_factory.mktemp("flowers")
    for number in range(40):
        kind = ("rose", "tulip")[number % 2]
        draw(root / kind / f"{number}.png", 40 + 150 * (number % 2) + number, (10, 12 + number % 3))
    return root


def test_a_directory_for_each_class_is_a_dataset(flowers):
    c = tiny("cnn", data__name=f"folder:{flowers}", data__image_size=8, model__num_classes=2, batch_size=8)
    train, held_out = make_pipeline(c, "train"), make_pipeline(c, "eval")
    assert train.num_examples + held_out.num_examples == 40
    assert train.class_names == ("rose", "tulip")
    assert train.spec() == batch_spec(c)
    for batch in (train[0], train[3], held_out[0]):
        bright, real = batch["image"].mean((1, 2, 3)) > 0, batch["mask"] > 0
        np.testing.assert_array_equal(bright[real], batch["label"][real] == 1)
    assert held_out.where is not None
    for index, label in enumerate(held_out.read(np.arange(held_out.num_examples))["label"]):
        assert pathlib.Path(held_out.where(index)).parent == flowers / ("rose", "tulip")[label]
    everything = open_source(f"folder:{flowers}", "all")
    assert sorted(everything.read(np.arange(40))["label"]) == [0] * 20 + [1] * 20


def test_directories_and_lists_may_say_the_split(flowers, tmp_path):
    paths = sorted(flowers.rglob("*.png"))
    for number, path in enumerate(paths):
        draw(tmp_path / ("val" if number % 4 == 0 else "train") / path.parent.name / path.name, 9)
    by_folder = [open_source(f"folder:{tmp_path}", split) for split in ("train", "test")]
    assert [len(part) for part in by_folder] == [30, 10]
    splits = ["test" if number % 5 == 0 else "train" for number in range(40)]
    rows = [f"{path},{path.parent.name},{split}" for path, split in zip(paths, splits, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    listed = [open_source(f"images:{tmp_path}/list.csv", split) for split in ("train", "test")]
    assert [len(part) for part in listed] == [32, 8]
    assert listed[0].features["label"].names == ("rose", "tulip")
    assert listed[0].fingerprint != listed[1].fingerprint


def test_what_is_wrong_with_ones_own_images_is_named(flowers, tmp_path):
    def message(name: str) -> str:
        with pytest.raises(InputError) as caught:
            open_source(name, "all").read(np.arange(2))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"write folder:{flowers}" in message(str(flowers))
    assert "write table:/nowhere/people.csv" in message("/nowhere/people.csv")
    assert "is no directory" in message(f"folder:{tmp_path}/none")
    assert "has no images" in message(f"folder:{tmp_path}")
    (tmp_path / "a.png").write_bytes(b"x")
    assert "lies in no class's directory" in message(f"folder:{tmp_path}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "bad" / "a.png")
    draw(tmp_path / "bad" / "b.png", 1)
    assert "a.png is no image that can be decoded" in message(f"folder:{tmp_path}")
    (tmp_path / "list.csv").write_text("file,label\nbad/b.png,x\n")
    assert "list.csv has no column 'path'" in message(f"images:{tmp_path}/list.csv")
    (tmp_path / "list.csv").write_text("path,label\nbad/c.png,x\n")
    assert "list.csv line 2: " in message(f"images:{tmp_path}/list.csv")
