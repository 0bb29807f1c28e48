"""Converts preprocessor_config.json to the keys of `config.data` that prepare an image, and back."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from bigmodel.config import Data, InputError
from bigmodel.data.tokenizer_files import json_object

FILE, OF_ALL = "preprocessor_config.json", "processor_config.json"
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
HALF = [0.5, 0.5, 0.5]
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SHARED = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
    "do_center_crop": False, "image_mean": HALF, "image_std": HALF, "crop_size": None,
}  # fmt: skip
CROPPED = {"resample": 3, "do_center_crop": True, "crop_size": 224}
# Defaults of a processor's class for values that the file lacks.
TYPES: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": SHARED | {"resample": 2, "size": 224, "square": True},
    "ConvNextImageProcessor": SHARED | {"resample": 3, "size": 384, "square": False, "crop_pct": 224 / 256},
    "BitImageProcessor": SHARED | CLIP | CROPPED | {"size": 224, "square": False},
    "CLIPImageProcessor": SHARED | CLIP | CROPPED | {"size": 224, "square": False},
    "DeiTImageProcessor": SHARED | CROPPED | {"size": 256, "square": True},
}
BY_MODEL = {"vit": "ViTImageProcessor", "resnet": "ConvNextImageProcessor"}
NEUTRAL = {
    "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "return_tensors",
    "_valid_processor_keys", "do_convert_rgb", "data_format", "input_data_format", "device", "auto_map",
    "disable_grouping", "model_input_names", "transformers_version",
}  # fmt: skip


def read(directory: pathlib.Path, kind: str, size: int, channels: int) -> dict[str, Any]:
    """Returns keys of `config.data`; {} if the directory has no such file.

    Args:
        kind: the model_type.
        size: the size of the images that the model reads; 0: any.

    Raises:
        InputError: a processor, a key or a value that is not supported.
    """
    path, found = directory / FILE, json_object(directory / FILE)
    if not found and (nested := json_object(directory / OF_ALL).get("image_processor")):
        path, found = directory / OF_ALL, dict(nested)
    if not found:
        return {}
    given = _checked(found, kind, str(path))
    crop, side, how = _sizes(given, str(path))
    if size and crop != size:
        raise InputError(f"{path} makes images of {crop}, but config.json has image_size={size}; correct one")
    return {
        "image_size": crop, "eval_crop": crop / side, "resize": how,
        "resample": RESAMPLE[given["resample"]], **_normalized(given, channels, str(path)),
    }  # fmt: skip


def _checked(found: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Returns the file's values merged over the defaults of its class."""
    named = str(found.get("image_processor_type") or found.get("feature_extractor_type") or BY_MODEL[kind])
    name = named.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in TYPES:
        raise InputError(
            f"{where}: image_processor_type={named!r} is not supported; known: {', '.join(TYPES)}"
        )
    for key, value in found.items():
        if key not in TYPES[name].keys() | NEUTRAL | {"default_to_square"} and value not in (None, False):
            raise InputError(f"{where}: {key}={str(value)[:60]} is not supported; set it to null")
    given = TYPES[name] | {key: value for key, value in found.items() if value is not None}
    given["square"] = given.get("default_to_square", given["square"])
    if given["resample"] not in range(len(RESAMPLE)):
        raise InputError(f"{where}: resample={given['resample']!r} is no filter of Pillow's; give 0 to 5")
    return given


def _sizes(given: Mapping[str, Any], where: str) -> tuple[int, int, str]:
    """Returns the side of the square crop, the size to resize to, and how to resize."""
    side, how = _size(given["size"], given["square"], "size", where)
    crop = side
    if given["do_center_crop"]:
        crop, square = _size(given["crop_size"], True, "crop_size", where)
        if square != "exact":
            raise InputError(
                f"{where}: crop_size={given['crop_size']} is not supported; give height and width"
            )
    if not given["do_resize"]:
        return crop, crop, "none"
    if "crop_pct" in given:  # ConvNext's: below 384 it cuts, from there on it warps
        if how != "cover":
            raise InputError(f"{where}: size={given['size']} is not supported; give shortest_edge")
        side, how = (int(side / given["crop_pct"]), "cover") if side < 384 else (side, "exact")
    elif how == "cover" and not given["do_center_crop"]:
        raise InputError(f"{where}: size={given['size']} without do_center_crop is not supported; set that")
    if crop > side:
        raise InputError(f"{where}: crop_size={crop} is larger than size={side}, which is not supported")
    return crop, side, how


def _size(value: Any, square: bool, key: str, where: str) -> tuple[int, str]:
    """Parses a size in any form: returns pixels, and `exact` (both sides) or `cover` (the shorter)."""
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    sides = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    both = sides.get("height"), sides.get("width")
    if sides.keys() == {"shortest_edge"} and isinstance(sides["shortest_edge"], int):
        return sides["shortest_edge"], "cover"
    if sides.keys() == {"height", "width"} and both[0] == both[1] and isinstance(both[0], int):
        return both[0], "exact"
    raise InputError(
        f"{where}: {key}={value} is not supported; give shortest_edge, or height and width alike"
    )


def _normalized(given: Mapping[str, Any], channels: int, where: str) -> dict[str, Any]:
    """Returns mean and std of pixels in 0..1, however the file scales them."""
    scale = given["rescale_factor"] * 255 if given["do_rescale"] else 255.0
    out = {}
    for key, off in (("mean", 0.0), ("std", 1.0)):
        value = given[f"image_{key}"] if given["do_normalize"] else off
        values = list(value) if isinstance(value, list | tuple) else [value] * channels
        if not all(isinstance(x, int | float) for x in values) or len(values) not in (1, channels):
            raise InputError(f"{where}: image_{key}={value} must be a number for each of {channels} channels")
        out[key] = tuple(float(x) / scale for x in values)
    if min(out["std"]) <= 0:
        raise InputError(f"{where}: image_std={given['image_std']} must be above 0")
    return out


def write(data: Data, size: int, channels: int) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a model that was trained here; `size` is its images' size.

    Pillow has no filter that averages when it shrinks and is linear when it grows; `box` is the closest to
    `data.resample=area`.
    """
    side = max(round(size / data.eval_crop), size)
    filters = dict(zip(RESAMPLE, range(len(RESAMPLE)), strict=True))

    def of_channels(values: tuple[float, ...]) -> list[float]:
        values = values or (0.5,)
        return list(values if len(values) == channels else values * channels)

    exact = {"height": side, "width": side}
    return {
        "image_processor_type": "BitImageProcessor", "do_resize": data.resize != "none",
        "size": exact if data.resize == "exact" else {"shortest_edge": side},
        "resample": filters.get(data.resample, filters["box"]),
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": of_channels(data.mean),
        "image_std": of_channels(data.std), "do_convert_rgb": channels == 3,
    }  # fmt: skip
