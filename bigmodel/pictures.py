"""The pictures people look at: ROC, precision-recall, confusion matrix, calibration; grids of images.

Legend: N examples, K classes.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel.config import Config

MOST_CURVES = 10  # more classes than this: the worst ones are drawn, and named
MOST_CELLS = 20  # more classes than this: the confusion matrix goes without numbers
ENLARGE_ABOVE = 0.99  # an area like this hugs the corner
FEW = 10  # predictions: a bin with fewer says little
DARK = 0.7  # of `Blues`: white reads better from here on
MOST_GROUPS = 30  # in a picture, the largest ones
INK, FAINT = "#1f4e79", "#b0b7bf"
GRID = 64  # images in a grid, at most
DRAWN, SEEN_DETECTION = 16, 224  # images with detections, and about how large they are drawn
SURE = 0.3  # a detection with a lower score is not drawn
SEEN_PIXELS = 56  # a small image is enlarged to about this size, a whole number of times


def of_classes(
    is_NK: np.ndarray, score_NK: np.ndarray, report: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Draws what a classifier's report says -> figures by name."""
    figures = {"roc": _curves(is_NK, score_NK, report["roc_auc"]["per_class"], names, roc=True)}
    figures["pr"] = _curves(is_NK, score_NK, report["pr_auc"]["per_class"], names, roc=False)
    figures["calibration"] = _calibration(report["calibration"])
    if "confusion" in report:
        figures["confusion"] = _confusion(np.array(report["confusion"]), names, report["accuracy"])
    if "gaps" in report:
        figures["groups"] = _groups(report["gaps"], names)
    return figures


def write(directory: pathlib.Path, figures: Mapping[str, Any], about: str = "") -> list[str]:
    """Writes each figure as <name>.png, with `about` at its foot -> the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.supxlabel(about, fontsize=7, color="gray")
        figure.savefig(directory / f"{name}.png", dpi=120)
    return [str(directory / f"{name}.png") for name in figures]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _curves(
    is_NK: np.ndarray, score_NK: np.ndarray, area: Sequence[float | None], names: Sequence[str], *, roc: bool
) -> Any:
    """One class against the rest, for each class, the worst first; a good model's corner is enlarged."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = _figure(6.4, 5)
    axes = figure.subplots()
    ranked = sorted((value, k) for k, value in enumerate(area) if value is not None)
    if len(ranked) == 2:  # of two classes the second says it all
        ranked = [pair for pair in ranked if pair[1] == 1]
    good = bool(ranked) and ranked[len(ranked) // 2][0] > ENLARGE_ABOVE
    zoom = axes.inset_axes((0.3, 0.28, 0.4, 0.42)) if good else None
    colors = _colors(min(len(ranked), MOST_CURVES))
    for color, (value, k) in zip(colors, ranked, strict=False):
        if roc:
            x, y, _ = roc_curve(is_NK[:, k], score_NK[:, k])
        else:
            y, x, _ = precision_recall_curve(is_NK[:, k], score_NK[:, k])
        label = f"{names[k]}  {value:.4f}"
        for place in filter(None, (axes, zoom)):
            place.plot(x, y, color=color, linewidth=1.3, label=label, drawstyle="steps-post")
    share = is_NK.mean(0)[[k for _, k in ranked]].mean() if ranked else 0.0
    axes.plot([0, 1], [0, 1] if roc else [share, share], "--", color=FAINT, linewidth=1, label="chance")
    if zoom is not None:
        width = 0.02 if ranked[0][0] > 0.995 else 0.1
        zoom.set(xlim=(-0.02 * width, width) if roc else (1 - width, 1 + 0.02 * width))
        zoom.set(ylim=(1 - width, 1 + 0.02 * width))
        zoom.tick_params(labelsize=7)
        zoom.locator_params(nbins=3)
        zoom.grid(alpha=0.25)
        zoom.set_title("the corner, enlarged", fontsize=8)
    what = ("ROC", "false positive rate", "true positive rate")
    what = what if roc else ("Precision and recall", "recall", "precision")
    title = f"{what[0]}, each class against the rest" if len(ranked) > 1 else what[0]
    axes.set(xlabel=what[1], ylabel=what[2], xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), title=title)
    axes.grid(alpha=0.25)
    hidden = len(ranked) - len(colors)
    legend = "class  area" if hidden <= 0 else f"worst {len(colors)} of {len(ranked)}"
    figure.legend(*axes.get_legend_handles_labels(), title=legend, fontsize=8, loc="outside right upper")
    return figure


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](index) for index in range(count)]


def _confusion(counts_KK: np.ndarray, names: Sequence[str], accuracy: float) -> Any:
    """Shares of each row's examples as color, counts as numbers."""
    classes = len(counts_KK)
    side = min(max(0.52 * classes, 3.2), 11.0)
    figure = _figure(side + 1.6, side + 0.8)
    axes = figure.subplots()
    share_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    # A square root, so that few mistakes among many examples are seen.
    image = axes.imshow(share_KK**0.5, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label", title=f"Confusion matrix, {accuracy:.2%} right")
    if classes <= MOST_CELLS:
        axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(classes), names)
        for row, column in np.argwhere(counts_KK > 0):
            color = "white" if share_KK[row, column] ** 0.5 > DARK else "black"
            text = f"{counts_KK[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's examples")
    ticks = (0, 0.01, 0.05, 0.2, 0.5, 1)
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{tick:.0%}" for tick in ticks])
    return figure


def _calibration(bins: dict[str, Any]) -> Any:
    """The observed share against the predicted one, above the number of predictions in each bin."""
    figure = _figure(5.4, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    keys = ("count", "predicted", "observed", "low", "high")
    count, predicted, observed, low, high = (np.array(bins[key]) for key in keys)
    width = 1 / len(count)
    at = (np.arange(len(count)) + 0.5) * width
    upper.plot([0, 1], [0, 1], "--", color=FAINT, linewidth=1, label="perfect")
    firm, thin = count >= FEW, (count > 0) & (count < FEW)
    for some, color, label in ((firm, INK, "this model"), (thin, FAINT, f"fewer than {FEW} predictions")):
        if some.any():
            ends = np.maximum([observed - low, high - observed], 0)[:, some]
            upper.errorbar(
                predicted[some], observed[some], ends, fmt="o", color=color, markersize=4, elinewidth=1,
                capsize=2, label=label,
            )  # fmt: skip
    upper.plot(predicted[firm], observed[firm], color=INK, linewidth=1.2)
    upper.set(ylabel="observed, with 95 % intervals", ylim=(-0.02, 1.04), xlim=(-0.01, 1.01))
    error = "unknown: some outputs are NaN" if bins["ece"] is None else f"{bins['ece']:.4f}"
    upper.set_title(f"Calibration of {bins['of']}, expected error {error}", fontsize=11)
    upper.legend(loc="lower right")
    some = count > 0
    lower.bar(at[some], count[some], width * 0.92, color=INK)
    lower.set(xlabel="predicted", ylabel="predictions", yscale="log", ylim=(0.7, 2 * max(count.max(), 5)))
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.tick_params(axis="y", which="minor", labelleft=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    return figure


def _groups(gaps: dict[str, Any], names: Sequence[str]) -> Any:
    """Rates of each group with their intervals: of the class that makes the widest gap, or class 1 of two."""
    rows = sorted(gaps["groups"], key=lambda row: -row["count"])[:MOST_GROUPS][::-1]
    widest = [pair for pair in gaps["between"].values() if pair]
    classes = [each["class"] for each in rows[0]["classes"]]
    at = classes.index(widest[-1]["class"]) if widest else 0
    kinds = {"base_rate": "base rate", "selection_rate": "selection rate", "tpr": "true positive rate"}
    kinds |= {"fpr": "false positive rate", "roc_auc": "ROC-AUC"}
    figure = _figure(2.2 * len(kinds) + 1.6, 0.28 * len(rows) + 1.6)
    for axes, (kind, title) in zip(figure.subplots(1, len(kinds), sharey=True), kinds.items(), strict=True):
        for y, row in enumerate(rows):
            if (one := row["classes"][at][kind]) is not None:
                color = INK if one["count"] >= gaps["least_group"] else FAINT
                axes.plot([one["low"], one["high"]], [y, y], color=color, linewidth=1.5)
                axes.plot(one["value"], y, "o", color=color, markersize=4)
        axes.set_yticks(range(len(rows)), [f"{row['group']} ({row['count']:,})" for row in rows])
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    title = f"Groups, class {names[classes[at]]}, 95 % intervals; gray: of fewer than {gaps['least_group']}"
    figure.suptitle(title, fontsize=11)
    return figure


def mistakes(image_NHWC: np.ndarray, rows: Sequence[dict[str, Any]]) -> Any:
    """A grid of images, uint8 [N, H, W, 3], that were classified wrongly, each with its row of a report."""
    across = int(np.ceil(len(rows) ** 0.5))
    down = -(-len(rows) // across)
    figure = _figure(1.7 * across, 2.1 * down + 0.5)
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes in places:
        axes.axis("off")
    for axes, image, row in zip(places, image_NHWC, rows, strict=False):
        axes.imshow(image, interpolation="nearest")
        if "prediction" in row:
            text = f"{row['label']}, not {row['prediction']}"
        else:
            text = f"{'' if row['label'] else 'no '}{row['class']}"
        axes.set_title(f"{row['index']}:  p {row['probability']:.3f}\n{text}", fontsize=7)
    figure.suptitle("The surest mistakes", fontsize=11)
    return figure


# ------------------------------------------------------------------------------------------ grids of images

Batch = Mapping[str, np.ndarray]


def pixels(config: Config, image_NHWC: np.ndarray) -> np.ndarray:
    """Model inputs -> uint8 [N, H, W, 3] for people: undoes `data.mean` and `data.std`."""
    mean, std = (np.asarray(x or (0.5,), np.float32) for x in (config.data.mean, config.data.std))
    out = np.clip(np.rint((image_NHWC * std + mean) * 255), 0, 255).astype(np.uint8)
    return np.repeat(out, 3, -1) if out.shape[-1] == 1 else out[..., :3]


def grid(image_NHWC: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one image of at most `GRID` of them, enlarged where they are small."""
    image_NHWC = image_NHWC[:GRID]
    times = max(round(SEEN_PIXELS / image_NHWC.shape[1]), 1)
    return tiled(image_NHWC.repeat(times, 1).repeat(times, 2))


def tiled(big: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one image of them all, in rows, with black edges."""
    across = int(np.ceil(len(big) ** 0.5))
    down = -(-len(big) // across)
    tiles = np.zeros((down * across, big.shape[1] + 2, big.shape[2] + 2, 3), np.uint8)
    tiles[: len(big), 1:-1, 1:-1] = big
    rows = tiles.reshape(down, across, *tiles.shape[1:]).swapaxes(1, 2)
    return rows.reshape(down * tiles.shape[1], across * tiles.shape[2], 3)


def save(directory: pathlib.Path, images: Mapping[str, np.ndarray]) -> list[str]:
    """Writes each image as <name>.png -> the paths."""
    import cv2

    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.png" for name in images]
    for path, image_HWC in zip(paths, images.values(), strict=True):
        cv2.imwrite(str(path), image_HWC[..., ::-1])
    return [str(path) for path in paths]


def detections(config: Config, found: Batch, batch: Batch, names: Sequence[str]) -> dict[str, np.ndarray]:
    """A grid of images with what was found on them, scores of `SURE` or more, a color for each class; thin
    and white the true boxes."""
    import cv2

    images = pixels(config, batch["image"][:DRAWN])
    times = max(round(SEEN_DETECTION / images.shape[1]), 1)
    colors = (np.array(_colors(10)) * 255)[:, :3]
    out = []
    for n, image in enumerate(images):
        big = np.ascontiguousarray(image.repeat(times, 0).repeat(times, 1))
        for box in batch["boxes"][n][batch["labels"][n] >= 0]:
            y0, x0, y1, x1 = np.rint(box * times).astype(int).tolist()
            cv2.rectangle(big, (x0, y0), (x1, y1), (255, 255, 255), 1)
        for box, score, label in zip(found["found"][n], found["scores"][n], found["classes"][n], strict=True):
            if score < SURE:
                continue
            color = colors[label % len(colors)].tolist()
            y0, x0, y1, x1 = np.clip(np.rint(box * times), 0, big.shape[0] - 1).astype(int).tolist()
            cv2.rectangle(big, (x0, y0), (x1, y1), color, 2)
            text = f"{names[label] if label < len(names) else label} {score:.2f}"
            (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)
            x, y = min(x0, big.shape[1] - width - 2), y0 if y0 > height + 4 else y1
            cv2.rectangle(big, (x - 1, y - height - 4), (x + width + 1, y), color, cv2.FILLED)
            cv2.putText(big, text, (x, y - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255,) * 3, 1, cv2.LINE_AA)
        out.append(big)
    return {"detections": tiled(np.stack(out))}
