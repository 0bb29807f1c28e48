"""WHAT DO I LEARN FROM? Sources, examples and the pipeline: `tasks.make_pipeline(config, "train")[step]`."""

from bigmodel.data.corpus import get_tokenizer
from bigmodel.data.facts import Facts
from bigmodel.data.pipeline import Parts, Pipeline, Prefetch
from bigmodel.data.sources import open_source
from bigmodel.data.texts import whole_texts

__all__ = ["Facts", "Parts", "Pipeline", "Prefetch", "get_tokenizer", "open_source", "whole_texts"]
