"""Datasets that come with bigmodel: made from what is on this machine, no download, no TensorFlow."""

from __future__ import annotations

import importlib
from typing import Any

# name -> where its builder class is; the module is imported when the dataset is asked for, since TFDS
# takes about a second to import.
BUILDERS = {
    "python_source": ("bigmodel.data.builders.python_source", "PythonSource"),
    "python_packages": ("bigmodel.data.builders.python_packages", "PythonPackages"),
    "digits": ("bigmodel.data.builders.digits", "Digits"),
    "shapes": ("bigmodel.data.builders.shapes", "Shapes"),
    "clicks": ("bigmodel.data.builders.clicks", "Clicks"),
    "lowrank_ratings": ("bigmodel.data.builders.lowrank_ratings", "LowrankRatings"),
}


def builder_class(name: str) -> Any:
    """The `tfds.core.GeneratorBasedBuilder` subclass of a bundled dataset.

    Raises:
        KeyError: `name` is not one of `BUILDERS`.
    """
    module, attribute = BUILDERS[name]
    return getattr(importlib.import_module(module), attribute)
