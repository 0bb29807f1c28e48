"""Exports run in a process that has jax and nothing of this package."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import build, run_script, start, tiny

from bigmodel import mesh, program, tasks, workdir
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config, InputError
from bigmodel.infer import decoder as decoder_lib
from bigmodel.infer import export, generate, loading, saved_model
from bigmodel.program import Program, State

ALONE = """
import json, sys
import numpy as np
import saved_model
sys.path[:] = [p for p in sys.path if p != REPOSITORY]
model = saved_model.load(".")
prompt = [3, 1, 4, 1, 5]
tokens = np.zeros((3, 16), np.int32)
tokens[:, :5] = prompt
out = model("prefill", {"tokens": tokens, "lengths": np.array([5, 4, 5], np.int32)})
ids, at = [], np.array([5, 4, 5], np.int32)
for _ in range(8):
    token = np.asarray(out["logits"].argmax(-1)).astype(np.int32)
    ids.append(int(token[0]))
    out = model("decode", {"token": token, "at": at, "cache": out["cache"]})
    at += 1
lone = model("forward", {"tokens": tokens[:1], "segments": (tokens[:1] > 0).astype(np.int32),
                         "positions": np.arange(16, dtype=np.int32)[None]})
assert "bigmodel" not in sys.modules and "flax" not in sys.modules
print(json.dumps({"ids": ids, "first": int(np.asarray(lone)[0, 4].argmax()), "shape": np.shape(lone)}))
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("export") / "run"
    directory.mkdir()
    keys = {"model__position": "rope", "model__kv_heads": 2}
    config = tiny("gpt", model__depth=1, model__vocab_size=264, batch_size=1, **keys)
    workdir.write_config(directory, config)
    state = start(build(config))
    state["params"] = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, state["params"])
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, state, {})
    return directory


def test_an_export_runs_without_this_package(run_dir, tmp_path):
    ran = run_script("export.py", f"--workdir={run_dir}", "--format=stablehlo", f"--out={tmp_path}/out")
    assert ran.code == 0, ran.err
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    (tmp_path / "out" / "alone.py").write_text(f"REPOSITORY = ''\n{ALONE}")
    alone = subprocess.run(
        [sys.executable, "-P", "-c", "import sys; sys.path.insert(0, '.'); exec(open('alone.py').read())"],
        cwd=tmp_path / "out", env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    said = json.loads(alone.stdout)
    made = decoder_lib.Decoder(*loading.load(run_dir))
    expected = generate.generate(made, [[3, 1, 4, 1, 5]], 8)[0].tolist()
    assert said["ids"] == expected
    assert said["first"] == expected[0]
    assert said["shape"] == [1, 16, 264]


def exported(directory: pathlib.Path, config: Config) -> tuple[Program, State, saved_model.Model]:
    """A run at its random weights, and its export."""
    workdir.write_config(directory, config)
    place = mesh.make_mesh(config, jax.devices()[:1])
    built = program.build(config, place, tasks.batch_spec(config, directory))
    state = built.init(jax.random.key(0))
    state["params"] = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, state["params"])
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, state, {})
    export.stablehlo(directory, directory / "out")
    return built, state, saved_model.load(directory / "out")


def outputs(built: Program, state: State, batch: dict[str, np.ndarray], name: str = "logits") -> np.ndarray:
    apply = jax.jit(lambda *args: built.model.apply(*args, key=None, train=False)[0][name])
    return np.asarray(apply(state["params"], state["rest"], batch))


@pytest.mark.parametrize("codes", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_quantized_language_model_is_exported(codes, tmp_path):
    keys = {"quantize__weights": codes, "model__vocab_size": 264, "batch_size": 2, "mesh__data": 1}
    built, state, model = exported(tmp_path, tiny("gpt", model__depth=1, **keys))
    prompts, length = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 0]], np.int32), np.array([5, 4], np.int32)
    tokens = np.pad(prompts, ((0, 0), (0, 11)))
    batch = {"tokens": tokens, "segments": (np.arange(16) < length[:, None]).astype(np.int32)}
    batch["positions"] = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    expected = outputs(built, state, batch)
    np.testing.assert_allclose(model("forward", batch), expected, atol=1e-3, rtol=1e-3)
    out = model("prefill", {"tokens": tokens, "lengths": length})
    np.testing.assert_allclose(out["logits"], expected[[0, 1], length - 1], atol=1e-3, rtol=1e-3)
    token = np.asarray(out["logits"]).argmax(-1).astype(np.int32)
    out = model("decode", {"token": token, "at": length, "cache": out["cache"]})
    made = decoder_lib.Decoder(built, state)
    answers = generate.generate(made, [prompts[0], prompts[1, :4]], 2)
    assert np.stack([token, np.asarray(out["logits"]).argmax(-1)], 1).tolist() == np.stack(answers).tolist()


def test_a_model_of_a_table_is_exported(tmp_path):
    rows = "".join(f"{'RBO'[i % 3]},{20 + i},{i % 2}\n" for i in range(64))
    (tmp_path / "people.csv").write_text(f"town,age,bought\n{rows}")
    name = f"table:{tmp_path / 'people.csv'}"
    keys = {"data__name": name, "data__label": "bought", "model__rows": 8, "model__num_classes": 2}
    (tmp_path / "run").mkdir()
    built, state, model = exported(tmp_path / "run", tiny("mlp", batch_size=4, mesh__data=1, **keys))
    batch = {key: np.ones(s.shape, s.dtype) for key, s in built.batch_spec.items()}
    expected = outputs(built, state, batch)[:1]
    got = model("forward", {key: batch[key][:1] for key in model.signatures["forward"]})
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_a_recommender_is_exported(tmp_path):
    """For any number of users, one too: then all have the same items."""
    built, state, model = exported(tmp_path, tiny("recommender", batch_size=2, mesh__data=1))
    batch = {key: np.ones(s.shape, s.dtype) for key, s in built.batch_spec.items()}
    expected = outputs(built, state, batch, "scores")
    given = {key: batch[key][:1] for key in model.signatures["forward"]}
    np.testing.assert_allclose(model("forward", given)["scores"], expected[:1], rtol=1e-4)


def test_an_export_overwrites_nothing(run_dir, tmp_path):
    with pytest.raises(InputError, match="exists; give a new directory"):
        export.stablehlo(run_dir, tmp_path)
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        export.stablehlo(tmp_path, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b'\x09\0\0\0\0\0\0\0{"a": {}}',
        (100_000).to_bytes(8, "little") + b"[" * 100_000, (200_000).to_bytes(8, "little") + b'{"a":' * 40_000,
    ],
)  # fmt: skip
def test_a_file_that_is_no_safetensors_is_refused(content, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no safetensors file"):
        saved_model.read_safetensors(path)


def test_what_safetensors_wrote_is_read(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.array([1, -2], np.int8)}
    save_file(arrays, tmp_path / "x.safetensors")
    read = saved_model.read_safetensors(tmp_path / "x.safetensors")
    assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in arrays.items()}


@pytest.mark.parametrize("name", ["weights.safetensors", "forward.stablehlo", "decode.stablehlo"])
def test_a_flipped_bit_in_an_export_is_found_at_load(run_dir, tmp_path, name):
    export.stablehlo(run_dir, tmp_path / "out")
    saved_model.load(tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*SHA-256 differs"):
        saved_model.load(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"{}", b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_model_json_is_one_value_error(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json is damaged"):
        saved_model.load(tmp_path)
