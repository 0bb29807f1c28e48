"""generation_config.json: how its authors draw a model's answers, as defaults of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigmodel.config import InputError

DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Keys that change an answer in ways that no decoding here follows, and the values that switch them off.
UNUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0, 0.0), "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0), "no_repeat_ngram_size": (0,), "top_h": (),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1, 1.0), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "min_length": (0,),
    "forced_eos_token_id": (), "min_new_tokens": (0,), "exponential_decay_length_penalty": (), "max_time": (),
    "sequence_bias": ({}, []), "guidance_scale": (1, 1.0), "stop_strings": ([],), "dola_layers": (),
    "remove_invalid_values": (False,), "renormalize_logits": (False,), "constraints": ([],),
    "force_words_ids": ([],), "watermarking_config": (), "forced_decoder_ids": ([],),
}  # fmt: skip


def defaults(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `sampling.Sampling` that the file sets, and `max_new_tokens`; without do_sample it is greedy.

    Raises:
        InputError: a value that is no number.
    """
    out: dict[str, Any] = {}
    for key in (*DRAWN, "max_new_tokens"):
        value = tree.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}/generation_config.json: {key}={value!r} is no number; correct it")
        out[key] = int(value) if key in ("top_k", "max_new_tokens") else float(value)
    draws = tree.get("do_sample")
    if draws is False or (draws is None and out.keys() & {"temperature", "top_k", "top_p", "min_p"}):
        return {key: out[key] for key in ("repetition_penalty", "max_new_tokens") if key in out} | {
            "temperature": 0.0
        }
    return out | ({"temperature": 1.0} if draws and "temperature" not in out else {})


def not_used(tree: Mapping[str, Any]) -> list[str]:
    """`key=value` of what changes answers in transformers alone."""
    return [
        f"{key}={str(tree[key])[:60]}"
        for key, off in UNUSED.items()
        if tree.get(key) is not None and tree[key] not in off
    ]
