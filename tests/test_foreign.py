"""Whole directories of Hugging Face's: our commands give the texts, scores and names of transformers.

Tiny random models with tokenizers and picture processors; back again, transformers reads what is exported.
"""

from __future__ import annotations

import json
import pathlib
import stat
from typing import Any

import cv2
import jax
import numpy as np
import pytest
from conftest import tiny
from test_finetune import save_run
from test_tokenizers import CHATML, CHATS, MAKERS, bpe, generic, oracle
from test_tokenizers import TEXTS as tokenizer_texts

from bigmodel import config as config_lib
from bigmodel import data, workdir
from bigmodel.checkpoint import transfer
from bigmodel.compress import recipe, stages
from bigmodel.config import InputError
from bigmodel.huggingface import layouts, processors
from bigmodel.infer import generate, loading
from bigmodel.infer.predict import Predictor

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 48}
BERT = SIZES | {"intermediate_size": 64, "max_position_embeddings": 24}
GPT2 = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
NAMES = {0: "neg", 1: "neu", 2: "pos"}
CLASSES = {"id2label": NAMES, "label2id": {name: k for k, name in NAMES.items()}}
TEXTS = ["hello world", "the quick brown fox, don't you know", "naïve café in Zürich"]


def saved(directory: pathlib.Path, kind: str, **keys: Any) -> tuple[Any, Any]:
    """A random model and a tokenizer, saved together -> both."""
    t = oracle()
    import torch

    torch.manual_seed(0)
    name, config, model = {
        "gpt2": ("gpt2", t.GPT2Config, t.GPT2LMHeadModel),
        "gpt2 classifier": ("gpt2", t.GPT2Config, t.GPT2ForSequenceClassification),
        "llama": ("llama", t.LlamaConfig, t.LlamaForCausalLM),
        "llama 3": ("byte-level with ends", t.LlamaConfig, t.LlamaForCausalLM),
        "llama classifier": ("llama", t.LlamaConfig, t.LlamaForSequenceClassification),
        "mixtral": ("llama in a mixtral", t.MixtralConfig, t.MixtralForCausalLM),
        "bert classifier": ("bert", t.BertConfig, t.BertForSequenceClassification),
        "bert": ("bert", t.BertConfig, t.BertModel),
        "bert, masked": ("bert", t.BertConfig, t.BertForMaskedLM),
        "t5": ("t5", t.T5Config, t.T5ForConditionalGeneration),
    }[kind]
    tokenizer = MAKERS[name][1](t)
    sizes = {"gpt2": GPT2, "bert": BERT, "t5": T5}.get(kind.split()[0].rstrip(","), LLAMA)
    sizes = sizes | ({"num_local_experts": 4} if kind == "mixtral" else {})
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    if "t5" not in kind:
        sizes = sizes | ids
    if "classifier" in kind and "bert" not in kind:
        sizes = sizes | {"pad_token_id": tokenizer.eos_token_id}
    made = model(config(vocab_size=len(tokenizer), **(sizes | keys))).eval()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return made, t.AutoTokenizer.from_pretrained(directory)


def theirs_write(model: Any, tokenizer: Any, text: str, length: int) -> tuple[list[int], str]:
    """Greedy ids, and the text that they add."""
    import torch

    given = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=length, do_sample=False)[0].tolist()
    if model.config.is_encoder_decoder:
        return out[1:], tokenizer.decode(out, skip_special_tokens=True)
    at = given["input_ids"].shape[1]
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (out[:at], out))
    return out[at:], whole[len(before) :]


def some(fast: list[str], slow: list[str]) -> Any:
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("kind", some(["llama", "t5"], ["gpt2", "llama 3", "mixtral"]))
def test_texts_are_continued_as_transformers_does(kind, tmp_path):
    model, tokenizer = saved(tmp_path / "in", kind)
    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    writer = generate.Writer.load(tmp_path / "run")
    for text in TEXTS:
        ids, wanted = theirs_write(model, tokenizer, text, 10)
        (got,) = generate.generate(writer.decoder, [writer.encode(text)], 10)
        assert got.tolist() == ids, text
        assert writer.write([text], 10) == [wanted], text
    transfer.export_safetensors(tmp_path / "run", tmp_path / "out")
    for file in (path for path in (tmp_path / "in").rglob("*") if path.is_file()):
        other = tmp_path / "out" / file.name
        assert stat.S_IMODE(other.stat().st_mode) == 0o644
        assert file.suffix == ".safetensors" or other.read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", some(["gpt2 classifier", "bert classifier"], ["llama classifier"]))
def test_texts_are_classified_as_transformers_does(kind, tmp_path):
    model, tokenizer = saved(tmp_path / "in", kind, **CLASSES)
    import torch

    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    rows, _ = Predictor.load(tmp_path / "run").predict(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        with torch.no_grad():
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=24)
            shares = model(**given).logits.softmax(-1)[0].numpy()
        wanted = {NAMES[k]: shares[k] for k in range(3)}
        assert row["top"] == pytest.approx(wanted, abs=2e-5), text
        assert row["name"] == max(wanted, key=wanted.__getitem__)


def test_masked_words_are_guessed_as_transformers_does(tmp_path):
    """A sentence with a gap has the same ids, and each word the same score in the gap."""
    model, tokenizer = saved(tmp_path / "in", "bert, masked")
    import torch

    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    part, state = loading.load(tmp_path / "run")
    ours = data.get_tokenizer(part.config, tmp_path / "run")
    weights = state["params"], state["rest"]
    run = jax.jit(lambda batch: part.model.apply(*weights, batch, key=None, train=False)[0]["logits"])
    for text in ("the quick brown [MASK] jumps", "Hello [MASK], hello!", "[MASK] café in [MASK]"):
        given = tokenizer(text, return_tensors="pt")
        ids = ours.prompt(text)
        assert ids.tolist() == given["input_ids"][0].tolist(), text
        at = np.flatnonzero(ids == tokenizer.mask_token_id)
        batch = {name: np.zeros((1, *s.shape[1:]), s.dtype) for name, s in part.batch_spec.items()}
        batch["tokens"][0, : len(ids)], batch["segments"][0, : len(ids)] = ids, 1
        batch["positions"][0, : len(ids)] = np.arange(len(ids))
        batch["masked_positions"][0, : len(at)], batch["masked_real"][0, : len(at)] = at, 1
        scores = np.asarray(run(batch))[0, : len(at)]
        with torch.no_grad():
            wanted = model(**given).logits[0, at].numpy()
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)
        best, theirs = np.argsort(-scores, -1)[:, :5], np.argsort(-wanted, -1)[:, :5]
        assert [tokenizer.decode(row) for row in best] == [tokenizer.decode(row) for row in theirs]


def without_tokenizer_json(directory: pathlib.Path) -> None:
    """The directory as it was before there was tokenizer.json: vocab.txt, or vocab.json and merges.txt."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    if model["type"] == "WordPiece":
        words = sorted(model["vocab"], key=model["vocab"].__getitem__)
        (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    else:
        (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


@pytest.mark.parametrize("kind", ["bert classifier", "gpt2"])
def test_vocabularies_without_a_tokenizer_json_give_the_same_ids(kind, tmp_path):
    saved(tmp_path / "in", kind)
    without_tokenizer_json(tmp_path / "in")
    theirs = oracle().AutoTokenizer.from_pretrained(tmp_path / "in")
    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    ours = data.get_tokenizer(loading.load(tmp_path / "run")[0].config, tmp_path / "run")
    for text in tokenizer_texts:
        wanted = theirs(text)["input_ids"]
        assert ours.texts([text], 1000)[0].tolist() == wanted, text
        assert ours.written(wanted) == theirs.decode(wanted, skip_special_tokens=True), text


@pytest.mark.parametrize("problem", some([], ["regression", "multi_label_classification"]))
def test_other_outputs(problem, tmp_path):
    count = 1 if problem == "regression" else 3
    names = {k: f"n{k}" for k in range(count)}
    model, tokenizer = saved(tmp_path / "in", "bert classifier", problem_type=problem, id2label=names)
    import torch

    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    (row,), _ = Predictor.load(tmp_path / "run").predict(TEXTS[:1])
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0]
    if count == 1:
        assert row["value"] == pytest.approx(logits.tolist(), abs=1e-4)
    else:
        assert row["probabilities"] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
        assert row["names"] == [names[k] for k in range(3) if logits[k] > 0]


def test_a_next_sentence_head_is_berts(tmp_path):
    """Class 0 goes on, in transformers' documents and here; runs of which class 1 did are turned round."""
    config = tiny("bert", seq_len=16)
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(32, 2)).astype(np.float32), np.array([1, 2], np.float32)
    new, old = (layouts.of(config_lib.override(config, {"task.goes_on": k})) for k in (0, 1))
    written = []
    for layout in (new, old):
        assert layout is not None
        forms = {ours: form for ours, _, _, form in layout.expand() if "next_sentence" in ours}
        pair = forms["next_sentence/kernel"].write(kernel), forms["next_sentence/bias"].write(bias)
        written.append(pair)
        np.testing.assert_array_equal(forms["next_sentence/kernel"].read(written[-1][0]), kernel)
    np.testing.assert_array_equal(written[0][0], kernel.T)
    for a, b in zip(*written, strict=True):
        np.testing.assert_array_equal(a[::-1], b)
    workdir.write_config(tmp_path, config)
    assert workdir.read_config(tmp_path).task.goes_on == 0
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["task"]["goes_on"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert workdir.read_config(tmp_path).task.goes_on == 1


# ------------------------------------------------------------------------------------------------- pictures

PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "vit of old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "do_normalize": False,
                   "resample": 3},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32},
                 "crop_pct": 0.875},
    "bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40},
            "crop_size": {"height": 32, "width": 32}, "resample": 2, "rescale_factor": 1 / 127.5},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": 40, "crop_size": 32, "do_rescale": False,
             "image_mean": [100, 120, 130], "image_std": [50, 60, 70]},
}  # fmt: skip


@pytest.mark.parametrize("name", some(["vit", "bit"], ["vit of old", "convnext", "deit"]))
def test_pictures_are_classified_as_transformers_does(name, tmp_path):
    t = oracle()
    import torch

    torch.manual_seed(0)
    if name.startswith("vit"):
        sizes = {"image_size": 32, "patch_size": 8, "intermediate_size": 64}
        model = t.ViTForImageClassification(t.ViTConfig(**SIZES, **sizes, **CLASSES)).eval()
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
        model = t.ResNetForImageClassification(t.ResNetConfig(**sizes, layer_type="basic", **CLASSES)).eval()
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    predictor = Predictor.load(tmp_path / "run")
    processor = t.AutoImageProcessor.from_pretrained(tmp_path / "in")
    rng = np.random.default_rng(0)
    for shape in ((32, 32), (50, 71), (90, 37), (17, 20)):
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), shape[::-1])
        pixels = processor(image, return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            shares = model(**pixels).logits.softmax(-1)[0].numpy()
        (row,), _ = predictor.predict([image.tolist()])
        assert row["top"] == pytest.approx({NAMES[k]: shares[k] for k in range(3)}, abs=2e-5), shape


BAD_PICTURES = {
    "a processor": ({"image_processor_type": "PerceiverImageProcessor"}, ["PerceiverImageProcessor"]),
    "a key": ({"do_reduce_labels": True}, ["do_reduce_labels"]),
    "another size": ({"size": 64}, ["64", "image_size=32"]),
    "no square": ({"size": {"height": 32, "width": 16}}, ["size"]),
    "a filter": ({"resample": 9}, ["resample=9"]),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_processors_that_are_not_followed_are_refused(name, tmp_path):
    keys, words = BAD_PICTURES[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(keys))
    with pytest.raises(InputError) as caught:
        processors.read(tmp_path, "vit", 32, 3)
    assert all(word in str(caught.value) for word in words), caught.value


# ----------------------------------------------------------------------------------------------------- back


def exported(config: Any, directory: pathlib.Path) -> None:
    """A run of ours with random parameters, as it would be trained, in Hugging Face's layout."""
    save_run(config, directory / "run")
    transfer.export_safetensors(directory / "run", directory / "out")
    assert {stat.S_IMODE(file.stat().st_mode) for file in (directory / "out").iterdir()} == {0o644}


@pytest.mark.parametrize("tokenizer", some(["hf"], ["bytes"]))
def test_transformers_continues_our_texts(tokenizer, tmp_path):
    t = oracle()
    if tokenizer == "hf":
        MAKERS["byte-level with ends"][1](t).save_pretrained(tmp_path / "tokenizer")
        tokenizer = f"hf:{tmp_path}/tokenizer"
    size = 257 if tokenizer == "bytes" else 322
    exported(tiny("gpt", data__tokenizer=tokenizer, model__vocab_size=size, seq_len=48), tmp_path)
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    writer = generate.Writer.load(tmp_path / "run")
    assert model.generation_config.eos_token_id == writer.decoder.end
    for text in TEXTS[:2]:
        assert writer.encode(text).tolist() == theirs(text)["input_ids"]
        ids, _ = theirs_write(model, theirs, text, 8)
        (got,) = generate.generate(writer.decoder, [writer.encode(text)], 8)
        assert got.tolist() == ids
        assert theirs.decode(ids, skip_special_tokens=True) == writer.decode(got)[0]


@pytest.mark.parametrize("family", some(["bert"], ["gpt"]))
def test_transformers_classifies_our_texts(family, tmp_path):
    t = oracle()
    import torch

    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"a {n} film,{n}\n" for n in NAMES.values()))
    keys = {"task__name": "classify", "model__num_classes": 3, "model__vocab_size": 264, "seq_len": 48}
    exported(tiny(family, data__name=f"table:{tmp_path}/t.csv", **keys), tmp_path)
    model = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows, _ = Predictor.load(tmp_path / "run").predict(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].numpy()
        assert row["top"] == pytest.approx({model.config.id2label[k]: shares[k] for k in range(3)}, abs=2e-5)
    assert model.config.id2label == dict(enumerate(sorted(NAMES.values())))


@pytest.mark.parametrize("family", some(["vit"], ["resnet"]))
def test_transformers_classifies_our_pictures(family, tmp_path):
    t = oracle()
    import torch

    keys = {"model__stem": "imagenet"} if family == "resnet" else {}
    exported(tiny(family, data__image_size=8, data__mean=(0.4,), data__eval_crop=0.8, **keys), tmp_path)
    model = t.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = t.AutoImageProcessor.from_pretrained(tmp_path / "out")
    predictor = Predictor.load(tmp_path / "run")
    channels = predictor.program.batch_spec["image"].shape[-1]
    image = np.random.default_rng(0).integers(0, 256, (10, 10, channels), np.uint8)  # of 8 / 0.8: only cut
    (row,), _ = predictor.predict([image.tolist()])
    with torch.no_grad():
        pixels = processor(image, return_tensors="pt", input_data_format="channels_last")
        shares = model(**pixels).logits.softmax(-1)[0].numpy()
    wanted = {model.config.id2label[k]: shares[k] for k in range(len(shares))}
    assert row["top"] == pytest.approx({name: wanted[name] for name in row["top"]}, abs=2e-5)


@pytest.mark.slow
def test_a_compressed_import_reads_as_it_did(tmp_path):
    saved(tmp_path / "in", "llama")
    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    before = generate.Writer.load(tmp_path / "run")
    stages.run(tmp_path / "run", recipe.parse("quantize:int8"), tmp_path / "small")
    after = generate.Writer.load(tmp_path / "small")
    assert after.encode("hello world").tolist() == before.encode("hello world").tolist()
    assert after.decoder.ends == before.decoder.ends


@pytest.mark.slow
def test_a_server_chats_by_the_models_template(tmp_path):
    t = oracle()
    import torch

    pytest.importorskip("fastapi", reason="the server is in '.[serve]'")
    from fastapi.testclient import TestClient

    from bigmodel.infer import server
    from bigmodel.infer.service import Limits

    tokenizer = generic(t, bpe(), eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    sizes = LLAMA | {"max_position_embeddings": 128, "vocab_size": len(tokenizer)}
    model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, eos_token_id=[tokenizer.eos_token_id])).eval()
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=7, max_new_tokens=9)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "in")
    transfer.import_pretrained(tmp_path / "in", tmp_path / "run", ["batch_size=2"])
    service = server.load(tmp_path / "run", name="m", limits=Limits(), slots=2, cache_dtype="")
    assert service.drawing == {"temperature": 0.5, "top_k": 7, "max_new_tokens": 9}
    with TestClient(server.app(service)) as client:
        for chat in CHATS[:3]:
            body = {"messages": chat, "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body).json()
            ids = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
            )
            given = {"max_new_tokens": 8, "do_sample": False, "temperature": None, "top_k": None}
            out = model.generate(torch.tensor([ids]), **given)[0].tolist()[len(ids) :]
            assert answer["usage"]["prompt_tokens"] == len(ids)
            said = answer["choices"][0]["message"]["content"]
            assert said == tokenizer.decode(out, skip_special_tokens=True)
        refused = client.post("/v1/chat/completions", json={"messages": [{"role": "tool", "content": "x"}]})
        assert (refused.status_code, "no tools" in refused.text) == (400, True)
        usual = client.post("/v1/chat/completions", json={"messages": CHATS[0]}).json()
        assert usual["usage"]["completion_tokens"] <= 9
