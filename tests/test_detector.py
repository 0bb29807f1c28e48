"""Detectors: boxes and their targets, suppression, COCO's precision, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any, ClassVar

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, build, built, by_path, mesh_keys, random_batch, run_script, start, steps, tiny

from bigmodel import config as config_lib
from bigmodel import evaluate, metrics, tasks, train
from bigmodel.config import InputError
from bigmodel.config.families import Detector
from bigmodel.data import boxes as box_data
from bigmodel.data import open_source, tfds, transforms
from bigmodel.data.builders import shapes
from bigmodel.tasks import detect, make_pipeline

SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__weight_decay": 0.01, "optim__schedule": "constant"}


def random_boxes(rng: np.random.Generator, count: int, side: float = 64) -> np.ndarray:
    low, size = rng.uniform(0, side * 0.7, (count, 2)), rng.uniform(2, side * 0.3, (count, 2))
    return np.concatenate([low, low + size], 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------- boxes


def test_overlaps_are_those_of_pixels():
    """IoU and GIoU of boxes with whole corners, against counting pixels."""
    rng = np.random.default_rng(0)
    a, b = np.rint(random_boxes(rng, 40)), np.rint(random_boxes(rng, 40))
    b[0], b[1] = a[0], a[1] + 30  # equal, and apart

    def painted(boxes: np.ndarray) -> np.ndarray:
        at = np.arange(128)
        rows = (at >= boxes[:, :1]) & (at < boxes[:, 2:3])
        columns = (at >= boxes[:, 1:2]) & (at < boxes[:, 3:4])
        return rows[:, :, None] & columns[:, None]

    one, two = painted(a), painted(b)
    shared, union = (one & two).sum((1, 2)), (one | two).sum((1, 2))
    hull = painted(np.concatenate([np.minimum(a, b)[:, :2], np.maximum(a, b)[:, 2:]], 1)).sum((1, 2))
    np.testing.assert_allclose(detect.iou(a, b), shared / union, rtol=1e-5)
    np.testing.assert_allclose(np.diag(metrics.iou(a, b)), shared / union, rtol=1e-6)
    np.testing.assert_allclose(
        detect.giou(a, b), shared / union - (hull - union) / hull, rtol=1e-4, atol=1e-6
    )


def test_suppression_is_the_greedy_one():
    rng = np.random.default_rng(1)
    boxes = np.stack([random_boxes(rng, 60, 24) for _ in range(3)])
    labels, scores = rng.integers(0, 3, (3, 60)), -np.sort(-rng.uniform(0, 1, (3, 60)))
    scores[:, 50:] = 0  # places that hold nothing
    stays = jax.jit(detect.suppress)(boxes, labels, scores.astype(np.float32), 0.5)
    for row in range(3):
        kept: list[int] = []
        for n in range(50):
            rivals = [k for k in kept if labels[row, k] == labels[row, n]]
            if not rivals or metrics.iou(boxes[row, [n]], boxes[row, rivals]).max() <= 0.5:
                kept.append(n)
        assert np.flatnonzero(stays[row]).tolist() == kept
        assert len(kept) < 50


def test_places_and_targets_by_hand():
    config = tiny("detector", model__levels=(3, 4), data__max_boxes=3)
    model = config.model
    assert isinstance(model, Detector)
    assert model.strides == (4, 8)
    where = box_data.places(model.strides, (32, 32))
    assert where.center.shape == (64 + 16, 2)
    np.testing.assert_array_equal(where.center[[0, 1, 8, 64]], [[2, 2], [2, 6], [6, 2], [4, 4]])
    boxes = np.array([[4, 4, 16, 16], [8, 8, 12, 12]], np.float32)  # the smaller one inside the larger
    out = box_data.targets(config, (32, 32), boxes, np.array([2, 1]))
    grid = out["place_label"][:64].reshape(8, 8)
    assert grid[2, 2] == 1  # (10, 10) is in both: the smaller box
    assert (grid[1:4, 1:4] == np.array([[2, 2, 2], [2, 1, 2], [2, 2, 2]])).all()
    assert (grid >= 0).sum() == 9
    assert (out["place_label"][64:] == -1).all()  # both are small: the finest grid's
    assert out["place_center"].reshape(-1)[2 * 8 + 2] == 1  # in its very middle
    at = 1 * 8 + 1  # (6, 6), 2 from two sides of the large box, 10 from the others
    np.testing.assert_allclose(out["place_center"][at], np.sqrt((2 / 10) * (2 / 10)))
    np.testing.assert_array_equal(out["place_box"][at], boxes[0])
    np.testing.assert_array_equal(out["labels"], [2, 1, -1])


def test_every_box_has_a_place_on_its_grid():
    config = config_lib.load(ROOT / "configs/detector.py")
    for index in range(50):
        _, boxes, labels = shapes.draw(1, index)
        out = box_data.targets(config, (64, 64), boxes.astype(np.float32), labels)
        given = {tuple(box) for box in out["place_box"][out["place_label"] >= 0]}
        assert len(given) == len(boxes)


@pytest.mark.parametrize("augment", ["flip:1", "crop:6", "resized_crop:0.3", "crop:4,flip:1"])
def test_boxes_move_with_the_image(augment):
    """One bright rectangle: after the steps its pixels are where its box is."""
    for position in range(12):
        image = np.zeros((40, 48, 1), np.uint8)
        image[10:26, 14:30] = 255
        boxes, rng = np.array([[10, 14, 26, 30]], np.float32), transforms.generator(3, position, 1)
        for name, numbers in transforms.parse_augment(augment):
            image, boxes, keep = box_data.augment(name, image, boxes, rng, numbers, 64)
        if keep[0] and boxes[0, 2] > boxes[0, 0] and boxes[0, 3] > boxes[0, 1]:
            rows, columns = (np.flatnonzero(image[..., 0].max(axis) > 127) for axis in (1, 0))
            seen = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
            np.testing.assert_allclose(boxes[0], seen, atol=1.0)


def test_the_letterbox_keeps_proportions():
    image, boxes = np.full((30, 60, 3), 255, np.uint8), np.array([[0, 0, 30, 60]], np.float32)
    out, moved = box_data.letterbox(image, boxes, 40)
    assert out.shape == (40, 40, 3)
    np.testing.assert_array_equal(moved, [[0, 0, 20, 40]])
    assert (out[:20] == 255).all()
    assert (out[20:] == 0).all()


# --------------------------------------------------------------------------------------------- precision


def coco(
    boxes: np.ndarray,
    labels: np.ndarray,
    found: np.ndarray,
    scores: np.ndarray,
    kinds: np.ndarray,
    crowds: np.ndarray,
) -> np.ndarray:
    """pycocotools' twelve numbers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def corner_and_size(box: np.ndarray) -> list[float]:
        y0, x0, y1, x1 = map(float, box)
        return [x0, y0, x1 - x0, y1 - y0]

    truth, answers = [], []
    for image in range(len(boxes)):
        for box, label, crowd in zip(boxes[image], labels[image], crowds[image], strict=True):
            if label >= 0:
                size = corner_and_size(box)
                one = {"bbox": size, "area": size[2] * size[3], "iscrowd": int(crowd), "id": len(truth) + 1}
                truth.append(one | {"image_id": image, "category_id": int(label)})
        for box, score, label in zip(found[image], scores[image], kinds[image], strict=True):
            if score > 0:
                one = {"bbox": corner_and_size(box), "score": float(score), "category_id": int(label)}
                answers.append(one | {"image_id": image})
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = {"images": [{"id": n} for n in range(len(boxes))], "annotations": truth}
        theirs.dataset["categories"] = [{"id": k} for k in range(int(labels.max()) + 1)]
        theirs.createIndex()
        judge = COCOeval(theirs, theirs.loadRes(answers), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats


@pytest.mark.parametrize("seed", range(4))
def test_precision_is_that_of_the_published_evaluator(seed):
    rng = np.random.default_rng(seed)
    images, most, kinds = 30, 6, 4
    labels = np.where(rng.random((images, most)) < 0.7, rng.integers(0, kinds, (images, most)), -1)
    boxes = np.stack([random_boxes(rng, most) for _ in range(images)])
    # Near the true boxes, and some elsewhere; some doubled, some of another class; equal scores too.
    near = boxes.repeat(2, 1) + rng.normal(0, 0.7, (images, 2 * most, 4))
    far = np.stack([random_boxes(rng, 4) for _ in range(images)])
    found = np.concatenate([near, far], 1).astype(np.float32)
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    guess = np.where(rng.random((images, 2 * most)) < 0.8, labels.repeat(2, 1).clip(0), 1)
    guess = np.concatenate([guess, rng.integers(0, kinds, (images, 4))], 1)
    scores = np.round(rng.random(guess.shape), 2) * (rng.random(guess.shape) < 0.8)
    order = np.argsort(-scores, 1, kind="stable")
    found = np.take_along_axis(found, order[..., None], 1)
    scores, guess = (np.take_along_axis(x, order, 1) for x in (scores, guess))
    crowds = rng.random(labels.shape) < (0, 0.2, 0.5, 0.9)[seed]
    boxes[crowds] += np.array([-6, -6, 6, 6])
    ours = metrics.detections(boxes, labels, found, scores, guess, crowds)
    theirs = coco(boxes, labels, found, scores, guess, crowds)
    np.testing.assert_allclose([ours["map"], ours["map50"], ours["map75"]], theirs[:3], atol=1e-6)
    assert 0.05 < ours["map"] < ours["map50"] < 0.95
    if seed:  # a crowd that is taken for a box is another number
        assert abs(metrics.detections(boxes, labels, found, scores, guess)["map"] - ours["map"]) > 0.01


def test_no_more_than_a_hundred_detections_of_an_image_and_class_count():
    rng = np.random.default_rng(9)
    boxes, labels = np.stack([random_boxes(rng, 130)]), np.zeros((1, 130), int)
    boxes[0, :40] += 200  # apart, with the best scores: wrong, and of another class in half of the cases
    scores = np.sort(rng.random((1, 130)))[:, ::-1]
    for kinds in (labels, np.arange(130)[None] % 2):
        truth, crowds = boxes[:, 40:], np.zeros((1, 90), bool)
        ours = metrics.detections(truth, labels[:, 40:], boxes, scores, kinds)
        theirs = coco(truth, labels[:, 40:], boxes, scores, kinds, crowds)
        np.testing.assert_allclose([ours["map"], ours["map50"], ours["map75"]], theirs[:3], atol=1e-6)


def test_precision_at_its_ends():
    boxes, labels = np.array([[[0, 0, 9, 9], [10, 10, 20, 20]]], np.float32), np.array([[0, 1]])
    ones = np.ones((1, 2))
    assert metrics.detections(boxes, labels, boxes, ones, labels)["map"] == pytest.approx(1)
    assert metrics.detections(boxes, labels, boxes, 0 * ones, labels)["map"] == 0
    assert metrics.detections(boxes, labels, boxes, ones, 1 - labels)["map50"] == 0
    assert metrics.detections(boxes, labels - 2, boxes, ones, labels)["map"] is None  # nothing to be found
    crowd = np.array([[False, True]])  # of the second class there is a crowd alone: no class to be found
    assert metrics.detections(boxes, labels, boxes[:, :1], ones[:, :1], labels[:, :1], crowd)["map"] == 1


# ------------------------------------------------------------------------------------------------ the data


def test_the_drawn_shapes_are_where_their_boxes_say():
    for index in range(20):
        image, boxes, labels = shapes.draw(0, index)
        again = shapes.draw(0, index)[0]
        np.testing.assert_array_equal(image, again)
        assert image.shape == (64, 64, 3)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= 64).all()
        assert len(boxes) == len(labels) >= 1
    outline = shapes._outline(0, np.random.default_rng(0))
    cover = shapes._cover(outline)
    rows, columns = (np.flatnonzero(cover.max(axis) > 0.5) for axis in (1, 0))
    box = [*outline.min(0), *outline.max(0)]
    np.testing.assert_allclose([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], box, atol=0.75)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir with the bundled set, of fewer images."""
    directory = str(tmp_path_factory.mktemp("shapes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 40, "test": 20})
        open_source("shapes", "train", directory)
    return directory


def test_a_batch_of_the_dataset(few):
    config = tiny("detector", data__image_size=0, data__augment="flip", data__data_dir=few)
    spec = tasks.batch_spec(config)
    batch = make_pipeline(config, "train")[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    assert tasks.class_names(config) == shapes.NAMES
    record = open_source("shapes", "train", few).read(np.array([3]))
    drawn = [shapes.draw(0, index) for index in range(40)]
    image, boxes, labels = next(one for one in drawn if (one[0] == record["image"][0]).all())
    np.testing.assert_allclose(record["objects/bbox"][0] * 64, boxes, atol=1e-4)
    np.testing.assert_array_equal(record["objects/label"][0], labels)
    assert image.std() > 5


class Fake:
    """A source of three records, the second of them bad."""

    features: ClassVar[dict[str, Any]] = {}
    fingerprint, num_bytes = "fake", 0

    def __init__(self, box: Any, label: int, count: int = 1) -> None:
        self._box, self._label, self._count = box, label, count

    def __len__(self) -> int:
        return 3

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        out = {key: np.empty(len(indices), object) for key in ("objects/bbox", "objects/label")}
        for row, index in enumerate(indices):
            bad = index == 1
            boxes = [self._box] * self._count if bad else [[0.1, 0.1, 0.5, 0.5]]
            out["objects/bbox"][row] = np.array(boxes, np.float32)
            out["objects/label"][row] = np.array([self._label if bad else 0] * len(boxes))
        return {"image": np.zeros((len(indices), 32, 32, 3), np.uint8), **out}


GOOD = [0.1, 0.2, 0.6, 0.7]


@pytest.mark.parametrize(
    ("box", "label", "count", "message"),
    [
        ([0.1, 0.2, 0.6, 1.2], 0, 1, r"record 1 has box 0 outside the image: \(0\.1, 0\.2, 0\.6, 1\.2\)"),
        ([0.1, np.nan, 0.6, 0.7], 0, 1, r"record 1 has box 0 outside the image"),
        ([0.6, 0.2, 0.6, 0.7], 0, 1, r"record 1 has box 0 without an inside"),
        (GOOD, 4, 1, r"record 1 has label 4 at box 0, not one of 0\.\.3; set model\.num_classes"),
        (GOOD, -1, 1, r"record 1 has label -1 at box 0"),
        (GOOD, 0, 9, r"record 1 has 9 boxes; set data\.max_boxes to that"),
    ],
)
def test_bad_records_are_named_or_skipped(box, label, count, message):
    config = tiny("detector", data__max_boxes=8)
    where = lambda index: f"split 'train' record {index}"  # noqa: E731
    records = box_data.Records(Fake(box, label, count), config, where)
    with pytest.raises(InputError, match=message):
        records.read(np.arange(3))
    lenient = box_data.Records(
        Fake(box, label, count), tiny("detector", data__max_boxes=8, data__max_skipped=1), where
    )
    batch = box_data.Prepare(config, True)(lenient.read(np.arange(3)), np.arange(3))
    np.testing.assert_array_equal(batch["mask"], [1, 0, 1])
    assert (batch["labels"][:, 0] == 0).all()


def test_a_crowd_is_no_target_and_is_known_to_evaluation():
    from tensorflow_datasets import features as kinds
    from tensorflow_datasets.proto import tf_example_pb2

    inner = {"bbox": kinds.BBoxFeature(), "label": kinds.ClassLabel(num_classes=4), "is_crowd": np.bool_}
    flat = tfds._flat({"image": kinds.Image(), "objects": kinds.Sequence(inner)})
    assert set(flat) == {"image", "objects/bbox", "objects/label", tfds.CROWDS}
    stored = tf_example_pb2.Example()
    stored.features.feature[tfds.CROWDS].int64_list.value.extend([0, 1])
    crowds = tfds._decoder(flat[tfds.CROWDS])(stored.features.feature[tfds.CROWDS])
    np.testing.assert_array_equal(crowds, [0, 1])
    raw = {key: np.empty(1, object) for key in (*box_data.KEYS, tfds.CROWDS)}
    raw["image"][0], raw[tfds.CROWDS][0] = np.zeros((32, 32, 3), np.uint8), crowds
    raw["objects/bbox"][0] = np.array([[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32)
    raw["objects/label"][0], raw["mask"] = np.array([1, 2]), np.ones(1, np.float32)
    config = tiny("detector", data__max_boxes=4)
    for training, labels in ((True, [1, -1, -1, -1]), (False, [1, 2, -1, -1])):
        out = box_data.Prepare(config, training)(raw, np.zeros(1, int))
        assert out["labels"][0].tolist() == labels
        assert out["crowds"][0].tolist() == [0, int(not training), 0, 0]
        assert set(out["place_label"][0].tolist()) == {-1, 1}
    alone = {key: value for key, value in raw.items() if key != tfds.CROWDS}
    assert "crowds" not in box_data.Prepare(config, False)(alone, np.zeros(1, int))


def test_an_image_that_does_not_decode_is_named(few, monkeypatch):
    source = open_source("shapes", "train", few, keys=box_data.KEYS)
    # Private: a record damaged on disk is refused by its checksum before anything is decoded.
    whole = type(source)._fetch

    def cut(self: Any, indices: np.ndarray) -> list[bytes]:
        records = [bytes(record) for record in whole(self, indices)]
        return [r.replace(b"IHDR", b"IXXR") if i == 2 else r for r, i in zip(records, indices, strict=True)]

    monkeypatch.setattr(type(source), "_fetch", cut)
    records = box_data.Records(source, tiny("detector"), lambda index: f"record {index}")
    with pytest.raises(InputError, match=r"shapes.* split 'train' record 2 is damaged .*max_skipped"):
        records.read(np.arange(4))
    lenient = box_data.Records(source, tiny("detector", data__max_skipped=1), lambda index: f"record {index}")
    np.testing.assert_array_equal(lenient.read(np.arange(4))["mask"], [1, 1, 0, 1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__name": "digits"}, r"data\.name='digits' has no feature 'objects/bbox'"),
        ({"model__num_classes": 3}, r"model\.num_classes is too small for data\.name='shapes': set it to 4"),
        ({"data__image_size": 36}, r"multiples of 8, its coarsest stride, these have 36 x 36"),
        ({"data__mixup": 0.5}, r"data\.mixup is nothing for task\.name=detect"),
        ({"model__levels": (2, 4)}, r"model\.levels is \(2, 4\): give stages in a row"),
        ({"task__nms_overlap": 0}, r"task\.nms_overlap is 0\.0: choose 0 < nms_overlap < 1"),
    ],
)
def test_what_cannot_be_trained(keys, message):
    with pytest.raises(InputError, match=message):
        build(tiny("detector", **keys))


def test_an_augmentation_that_moves_no_boxes_is_refused():
    with pytest.raises(InputError, match=r"data\.augment has 'randaugment', which moves no boxes"):
        box_data.Prepare(tiny("detector", data__augment="randaugment"), True)


# ------------------------------------------------------------------------------------------------ programs


@pytest.mark.slow
def test_what_is_masked_does_not_count():
    """But for BatchNorm, which sees every row: so the masked rows stay the same images."""
    part = built("detector", **SGD)
    batch = random_batch(part.config)
    batch["mask"][5:] = 0
    changed = {name: value.copy() for name, value in batch.items()}
    changed["place_label"][5:] = 1
    changed["labels"][5:] = 2
    (a, a_rows), (b, b_rows) = (steps(part, start(part), 1, [x]) for x in (batch, changed))
    np.testing.assert_array_equal(a_rows["loss"], b_rows["loss"])
    for path, value in by_path(a["params"]).items():
        np.testing.assert_array_equal(value, by_path(b["params"])[path], err_msg=path)


def test_a_perfect_answer_costs_nothing_and_is_found_again():
    """Outputs made from the targets: the loss is only that of centers; decoding gives the boxes back."""
    part = built("detector", **SGD)
    config = part.config
    batch = random_batch(config, 3)
    label = batch["place_label"]
    outputs = {
        "class_logits": jnp.where(jax.nn.one_hot(label, 4) > 0, 30.0, -30.0),
        "boxes": jnp.where(label[..., None] >= 0, batch["place_box"], 1.0),
        "center_logits": jax.scipy.special.logit(jnp.clip(batch["place_center"], 1e-6, 1 - 1e-6)),
    }
    task = tasks.make(config)
    terms = task.terms(outputs, batch, True)
    assert float(terms["class_loss"][0]) < 1e-4
    assert float(terms["box_loss"][0]) == pytest.approx(0, abs=1e-3)
    kept = jax.device_get(task.predictions(outputs))
    for n in range(config.batch_size):
        given = {tuple(box) for box in batch["place_box"][n][label[n] >= 0]}
        found = {tuple(box) for box in kept["found"][n][kept["scores"][n] > 0]}
        assert found <= given
        assert len(found) >= 0.5 * len(given)  # boxes of one class that overlap much are one detection


@pytest.mark.slow
def test_ten_images_are_learned_by_heart(few):
    adam = {"optim__name": "adam", "optim__schedule": "constant", "optim__lr": 5e-3, "batch_size": 10}
    part = build(tiny("detector", **adam, data__image_size=64, data__data_dir=few, model__width=32))
    batch = make_pipeline(part.config, "train")[0]
    state, rows = steps(part, start(part), 250, [batch])
    assert rows["loss"][-1] < 0.5 * rows["loss"][0]
    kept = jax.device_get(part.predict(state, part.put(batch)))
    names = ("boxes", "labels")
    found = metrics.detections(*(batch[k] for k in names), kept["found"], kept["scores"], kept["classes"])
    assert found["map50"] > 0.95, (found, rows["loss"][::25])


# --------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_draws(few, tmp_path):
    keys = {
        "steps": 4,
        "checkpoint__every_steps": 2,
        "eval__batches": 2,
        "data__augment": "crop:3,flip",
        "data__data_dir": few,
    }
    config = tiny("detector", **keys)
    whole = train.run(config, tmp_path / "straight")
    assert {"eval/test/map50", "eval/test/map", "eval/test/loss"} <= whole.metrics.keys()
    (path,) = (tmp_path / "straight" / "pictures").iterdir()
    assert cv2.imread(str(path)).shape == (3 * (7 * 32 + 2), 3 * (7 * 32 + 2), 3)


@pytest.mark.slow
def test_the_script_writes_and_draws(few, tmp_path):
    train.run(tiny("detector", steps=2, batch_size=16, eval__batches=-1, data__data_dir=few), tmp_path)
    ran = run_script("evaluate.py", f"--workdir={tmp_path}")
    assert ran.code == 0, ran
    out = json.loads((tmp_path / "evaluation.json").read_text())
    assert out["examples"] == 20
    assert {row["name"] for row in out["per_class"]} == set(shapes.NAMES)
    assert (tmp_path / "evaluation" / "detections.png").exists()
    assert json.loads(ran.out)["map50"] == pytest.approx(out["map50"])


@pytest.mark.slow
def test_precision_is_of_all_examples_on_any_mesh(few):
    """The last batch is filled up; that changes nothing."""
    keys = {"eval__batches": -1, "task__least_score": 0.001, "data__data_dir": few}
    one = build(tiny("detector", **SGD, **keys, batch_size=8))
    many = build(
        tiny("detector", **SGD, **keys, batch_size=16, **mesh_keys({"data": 2, "fsdp": 2, "tensor": 2}))
    )
    found = []
    for part in (one, many):
        examples = evaluate.collect(part, start(part), make_pipeline(part.config, "eval"))
        assert len(examples["boxes"]) == 20
        found.append(examples)
    np.testing.assert_array_equal(found[0]["boxes"], found[1]["boxes"])
    np.testing.assert_allclose(found[0]["scores"], found[1]["scores"], atol=1e-4)
