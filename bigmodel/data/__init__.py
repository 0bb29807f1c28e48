"""Data: `make_pipeline(config, "train")[step]` gives the batch of a step; `batch_spec(config)` its shapes."""

from bigmodel.data.batches import whole_texts
from bigmodel.data.corpus import get_tokenizer
from bigmodel.data.facts import Facts
from bigmodel.data.pipeline import Pipeline, Prefetch, batch_spec, class_names, make_pipeline
from bigmodel.data.sources import open_source

__all__ = [
    "Facts",
    "Pipeline",
    "Prefetch",
    "batch_spec",
    "class_names",
    "get_tokenizer",
    "make_pipeline",
    "open_source",
    "whole_texts",
]
