"""lm-evaluation-harness's local-completions against our server: scores as of a full forward pass."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from conftest import config_flag, finish, run_script, start_script, tiny

from bigmodel import data
from bigmodel.infer import loading

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the harness: many
CONTEXT = 64
TEXTS = ["mesh shard token layer step scan", "tree loss key batch mesh mesh", "scan tree step token — loss é"]
ENDINGS = [" layer step", " key", " batch mesh scan tree", " é"]

LAMBADA = """
task: local_lambada
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
HELLASWAG = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("lm_eval")
    config = tiny(
        "gpt", model__depth=1, model__vocab_size=320, seq_len=CONTEXT, steps=30, data__name=corpus,
        data__tokenizer="bpe:300", log__tensorboard=False,
    )  # fmt: skip
    ran = run_script("train.py", config_flag(config, directory), f"--workdir={directory}/run")
    assert ran.code == 0, ran
    ran = run_script("export.py", f"--workdir={directory}/run", f"--out={directory}/hf")
    assert ran.code == 0, ran
    return directory


@pytest.fixture(scope="module")
def url(run_dir: pathlib.Path) -> Iterator[str]:
    process = start_script("serve.py", f"--workdir={run_dir}/run", "--port=0", "--name=tiny")
    line = process.stdout.readline()  # type: ignore[union-attr]
    yield line.split()[1]
    process.terminate()
    code, _, err = finish(process)
    assert (code, err) == (0, "")


@pytest.fixture(scope="module")
def offline(run_dir: pathlib.Path) -> Any:
    """(context, continuation, ids before them) -> (its log-probability, whether it is the likeliest)."""
    program, state = loading.load(run_dir / "run")
    tokenizer = data.get_tokenizer(program.config, run_dir / "run")

    @jax.jit
    def logits(params: Any, batch: Any) -> Any:
        return program.model.apply(params, state["rest"], batch, key=None, train=False)[0]["logits"]

    def score(context: str, continuation: str, before: list[int]) -> tuple[float, bool]:
        ids = before + tokenizer.encode(context + continuation).tolist()
        first = len(before) + len(tokenizer.encode(context))
        tokens = np.zeros((1, CONTEXT), np.int32)
        tokens[0, : len(ids)] = ids
        at = np.arange(CONTEXT, dtype=np.int32)[None]
        batch = {"tokens": tokens, "segments": (at < len(ids)).astype(np.int32), "positions": at}
        x = np.asarray(logits(state["params"], batch), np.float64)[0, first - 1 : len(ids) - 1]
        x -= x.max(-1, keepdims=True)
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        return float(x[np.arange(len(x)), ids[first:]].sum()), bool((x.argmax(-1) == ids[first:]).all())

    score.separator = tokenizer.separator  # type: ignore[attr-defined]
    return score


@pytest.mark.parametrize("tokenized", [True, False])
def test_the_harness_scores_as_the_model_does(run_dir, url, offline, tmp_path, monkeypatch, tokenized):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [{"text": text, "label": i % 4, "endings": ENDINGS} for i, text in enumerate(TEXTS)]
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("lambada", LAMBADA), ("hellaswag", HELLASWAG)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    keys = {
        "model": "tiny", "base_url": f"{url}v1/completions", "tokenizer_backend": "huggingface",
        "tokenizer": f"{run_dir}/hf", "tokenized_requests": tokenized, "max_length": CONTEXT,
        "num_concurrent": 2, "max_retries": 1,
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=keys, tasks=["local_lambada", "local_hellaswag"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), log_samples=True,
        bootstrap_iters=0,
    )  # fmt: skip
    before = [] if tokenized else [offline.separator]  # a text's prompt begins with the separator
    likelihoods = []
    for sample in found["samples"]["local_lambada"]:
        context, _, last = sample["doc"]["text"].rpartition(" ")
        expected = offline(context, f" {last}", before)
        ((value, greedy),) = sample["filtered_resps"]
        np.testing.assert_allclose(float(value), expected[0], atol=1e-4)
        assert greedy == expected[1]
        likelihoods.append(expected)
    result = found["results"]["local_lambada"]
    perplexity = math.exp(-np.mean([value for value, _ in likelihoods]))
    np.testing.assert_allclose(result["perplexity,none"], perplexity, rtol=1e-4)
    np.testing.assert_allclose(result["acc,none"], np.mean([greedy for _, greedy in likelihoods]))
    right = []
    for sample in found["samples"]["local_hellaswag"]:
        expected = [offline(sample["doc"]["text"], ending, before)[0] for ending in ENDINGS]
        np.testing.assert_allclose([float(v) for v, _ in sample["filtered_resps"]], expected, atol=1e-4)
        right.append(int(np.argmax(expected)) == sample["doc"]["label"])
    np.testing.assert_allclose(found["results"]["local_hellaswag"]["acc,none"], np.mean(right))


def test_the_harness_requests_without_it(url, offline):
    """The harness's request for a log-likelihood: ids, echoed and scored, and one more id."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = httpx.post(
        f"{url}v1/completions", json={**body, "prompt": "mesh shard token"}, timeout=60
    ).json()
    told = answer["choices"][0]["logprobs"]
    assert "".join(told["tokens"][:-1]) == "mesh shard token"
    value, _ = offline("mesh", " shard token", [offline.separator])
    start = next(i for i, offset in enumerate(told["text_offset"]) if offset == 4)
    np.testing.assert_allclose(sum(told["token_logprobs"][start:-1]), value, atol=1e-4)
