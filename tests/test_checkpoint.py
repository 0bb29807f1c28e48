"""Checkpoints give back what was saved, on any mesh and of any dtype, or say in one line why not."""

import json
import logging
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigmodel.checkpoint.checkpoints import Checkpoints, CorruptCheckpoint
from bigmodel.checkpoint.digests import digest
from bigmodel.config import InputError


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def mesh_of(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:count],
    )


def place(mesh: Mesh, value: np.ndarray, *axes: str | tuple[str, ...] | None) -> jax.Array:
    named = [a if a is None or set(np.atleast_1d(a)) <= set(mesh.axis_names) else None for a in axes]
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*named)))


def make_state(mesh: Mesh, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(16, 24)).astype(np.float32)
    return {
        "params": {
            "dense": {
                "kernel": place(mesh, kernel, "fsdp", "tensor"),
                "bias": place(mesh, kernel[0], "tensor"),
            },
            "stack": [place(mesh, kernel[:8], None, ("fsdp", "tensor")), place(mesh, kernel)],
        },
        "opt": (
            Moments({"kernel": place(mesh, kernel * 2, "fsdp")}, place(mesh, np.int32(seed))),
            (),
        ),
        "rng": place(mesh, np.array([seed, 7], np.uint32)),
    }


def spec_of(state: object) -> object:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


MESHES = [{"fsdp": 8}, {"fsdp": 4}, {"fsdp": 1}, {"fsdp": 2, "tensor": 4}, {"tensor": 8}]
MESHES += [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "fsdp": 2}]


@pytest.fixture
def state() -> dict:
    return make_state(mesh_of(fsdp=4, tensor=2))


def test_round_trip_keeps_values_containers_and_shardings(tmp_path, state):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, state, {"pipeline": "abc"})
        got, meta, step = checkpoints.restore(spec_of(state))
        assert (meta, step, checkpoints.meta(7)) == ({"pipeline": "abc"}, 7, {"pipeline": "abc"})
    jax.tree.map(np.testing.assert_array_equal, got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, got, state)))


def test_meta_is_that_of_the_call_though_it_is_written_later(tmp_path, state):
    meta = {"interval": {"loss": [1.0, 1.0]}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta)
        meta["interval"]["loss"][0] = 2.0
        checkpoints.wait()
        assert checkpoints.meta(1) == {"interval": {"loss": [1.0, 1.0]}}


@pytest.mark.parametrize("saved", MESHES, ids=str)
def test_any_mesh_restores_onto_any_other(tmp_path, saved):
    state = make_state(mesh_of(**saved))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for other in MESHES:
            target = make_state(mesh_of(**other), seed=1)
            got, _, _ = checkpoints.restore(spec_of(target))
            assert digest(got) == digest(state)
            assert got["params"]["dense"]["kernel"].sharding.mesh.size == mesh_of(**other).size


def test_eight_to_four_to_one_to_eight_devices(tmp_path):
    state = first = make_state(mesh_of(fsdp=8))
    with Checkpoints(tmp_path) as checkpoints:
        for step, devices in enumerate([4, 1, 8]):
            checkpoints.save(step, state, {})
            state, _, _ = checkpoints.restore(spec_of(make_state(mesh_of(fsdp=devices))))
    assert digest(state) == digest(first)


DTYPES = ["bfloat16", "float16", "float32", "int8", "uint8", "int32", "uint32", "bool", "int4"]
DTYPES += ["float8_e4m3fn", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_scalars_and_empty_arrays_round_trip_exactly(tmp_path, dtype):
    mesh = mesh_of(fsdp=8)
    base = np.random.default_rng(3).integers(0, 7, size=(8, 6))
    state = {
        "sharded": place(mesh, base.astype(jnp.dtype(dtype)), "fsdp"),
        "scalar": place(mesh, np.asarray(base[0, 0]).astype(jnp.dtype(dtype))),
        "empty": place(mesh, np.zeros((0, 3), jnp.dtype(dtype))),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        got, _, _ = checkpoints.restore(spec_of(state))
    for name, x in state.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape)
        assert np.asarray(got[name]).tobytes() == np.asarray(x).tobytes()


def test_nan_payloads_negative_zero_and_denormals_keep_their_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    state = {"x": jax.device_put(bits.view(np.float32))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        got, _, _ = checkpoints.restore(spec_of(state))
    np.testing.assert_array_equal(np.asarray(got["x"]).view(np.uint32), bits)


def test_one_subtree_restores_without_the_rest(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"a": 1})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        got, meta, _ = checkpoints.restore(spec_of(state["params"]), part="params")
        assert (digest(got), meta) == (digest(state["params"]), {"a": 1})
        bias = state["params"]["dense"]["bias"]
        got, _, _ = checkpoints.restore(spec_of(bias), part="params/dense/bias")
        np.testing.assert_array_equal(got, bias)
        with pytest.raises(InputError, match="ema/dense/bias is not in the checkpoint"):
            checkpoints.restore(spec_of(state["params"]), part="ema")


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    mesh = mesh_of(fsdp=8)
    x = place(mesh, np.arange(1 << 20, dtype=np.float32).reshape(8, -1), "fsdp")
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    want = digest({"x": x})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": x}, {})
        spec = spec_of({"x": x})
        for _ in range(5):
            x = step(x)
        got, _, _ = checkpoints.restore(spec)
    assert digest(got) == want


def test_digest_sees_paths_shapes_dtypes_values_and_not_the_mesh():
    digests = {digest(make_state(mesh_of(**axes))) for axes in MESHES}
    assert len(digests) == 1
    x = jnp.zeros((4,), jnp.float32)
    others = [{"a": x}, {"b": x}, {"a": x.reshape(2, 2)}, {"a": x.astype(jnp.int32)}, {"a": x.at[3].set(1)}]
    others += [{"a": -x}, {"a": x, "b": x}]
    assert len({digest(other) for other in others}) == len(others)


def test_only_the_newest_steps_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (0, 5, 10, 100):
            checkpoints.save(step, state, {})
    assert Checkpoints(tmp_path, read_only=True).steps() == [10, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "100"]


def test_a_synchronous_save_is_committed_when_it_returns(tmp_path, state):
    with Checkpoints(tmp_path, async_save=False) as checkpoints:
        checkpoints.save(3, state, {})
        assert checkpoints.steps() == [3]


@pytest.mark.parametrize("step", [5, 4, -1])
def test_saving_an_existing_or_older_step_is_refused(tmp_path, state, step):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        with pytest.raises(InputError, match=r"cannot save step .*new --workdir"):
            checkpoints.save(step, state, {})
        assert checkpoints.steps() == [5]


def test_bad_input_to_save_is_refused(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=r"params/lr: cannot save a float"):
            checkpoints.save(0, {"params": {"lr": 0.1}}, {})
        with pytest.raises(InputError, match="must be JSON"):
            checkpoints.save(0, state, {"config": object()})
        x = jnp.zeros(2)
        with pytest.raises(InputError, match="a/b: two arrays"):
            checkpoints.save(0, {"a/b": x, "a": {"b": x}}, {})
        assert checkpoints.steps() == []
    with pytest.raises(InputError, match=r"checkpoint\.keep=0"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot hold checkpoints"):
        Checkpoints(tmp_path / "file")


def test_read_only_writes_nothing(tmp_path, state):
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(InputError, match="no checkpoint to restore"):
            checkpoints.restore(spec_of(state))
        with pytest.raises(InputError, match="read-only"):
            checkpoints.save(0, state, {})
    assert not (tmp_path / "none").exists()


def test_a_step_that_is_not_there_is_named(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        for call in (lambda: checkpoints.restore(spec_of(state), 3), lambda: checkpoints.meta(3)):
            with pytest.raises(InputError, match=r"no checkpoint of step 3; there are \[2\]"):
                call()


def test_mismatches_are_listed_before_any_array_is_read(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        for path in (tmp_path / "1" / "state").rglob("d/*"):
            path.unlink()  # reading any array would now fail, and as CorruptCheckpoint
        spec = spec_of(state)
        where = spec["rng"].sharding
        spec["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct((16, 48), jnp.float32, sharding=where)
        spec["rng"] = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=where)
        spec["ema"] = spec["params"]["stack"].pop()
        with pytest.raises(InputError) as error:
            checkpoints.restore(spec)
    assert not isinstance(error.value, CorruptCheckpoint)
    text = str(error.value)
    assert "params/dense/kernel is float32[16, 24] in the checkpoint, float32[16, 48] in this run" in text
    assert "rng is uint32[2] in the checkpoint, int32[2] in this run" in text
    assert "ema is not in the checkpoint" in text
    assert "params/stack/1 is only in the checkpoint" in text
    assert "--workdir" in text
    assert "\n" not in text


def test_strays_and_uncommitted_steps_are_ignored(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
    (tmp_path / "3").mkdir()
    (tmp_path / "4").touch()
    (tmp_path / "007").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "2" / "commit_success.txt").unlink()
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert (tmp_path / "9.orbax-checkpoint-tmp").exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert not (tmp_path / "9.orbax-checkpoint-tmp").exists()
        got, _, step = checkpoints.restore(spec_of(state))
        assert (step, digest(got)) == (1, digest(state))
        for name in ("2", "3", "4"):  # no complete steps: renamed at the start, so that they can be saved
            assert not (tmp_path / name).exists()
            assert len(list(tmp_path.glob(f"{name}.incomplete-*"))) == 1
        (tmp_path / "5").mkdir()  # made meanwhile
        for step in (2, 3, 5):
            checkpoints.save(step, state, {})
    assert len(list(tmp_path.glob("5.incomplete-*"))) == 1
    assert (tmp_path / "007").is_dir()


def test_the_manifest_is_committed_with_the_step(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"a": 1})
    body = json.loads((tmp_path / "1" / "manifest" / "process_0.json").read_text().partition("\n")[2])
    kernel = body["arrays"]["params/dense/kernel"]
    assert (kernel["dtype"], kernel["shape"], len(kernel["shards"])) == ("float32", [16, 24], 8)
    assert len(body["arrays"]["rng"]["shards"]) == 1


def test_a_flipped_bit_in_the_newest_step_falls_back_and_the_step_can_be_saved_again(tmp_path, caplog):
    def make(seed: int) -> dict:
        kernel = np.random.default_rng(seed).normal(size=(64, 96)).astype(np.float32)
        mesh = mesh_of(fsdp=8)
        return {"params": {"bias": place(mesh, kernel[0])}, "ema": {"kernel": place(mesh, kernel, "fsdp")}}

    state, later = make(1), make(2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
        checkpoints.save(2, later, {"step": 2})
    needle = np.asarray(later["ema"]["kernel"])[8:16].tobytes()
    hits = [p for p in (tmp_path / "2").rglob("*") if p.is_file() and needle in p.read_bytes()]
    assert hits
    for path in hits:
        data = bytearray(path.read_bytes())
        data[data.index(needle) + 5] ^= 0x10
        path.write_bytes(data)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match=r"2: damaged: ema/kernel \(SHA-256"):
            checkpoints.restore(spec_of(state), 2)
        params, _, step = checkpoints.restore(spec_of(later["params"]), part="params")
        assert (step, digest(params)) == (2, digest(later["params"]))  # that part is sound
    with Checkpoints(tmp_path) as checkpoints:
        with caplog.at_level(logging.WARNING, "bigmodel"):
            got, meta, step = checkpoints.restore(spec_of(state))
        assert (step, meta, digest(got)) == (1, {"step": 1}, digest(state))
        assert "ema/kernel" in caplog.text
        assert str(tmp_path / "2") in caplog.text
        checkpoints.save(2, later, {})
        assert digest(checkpoints.restore(spec_of(later), 2)[0]) == digest(later)


def test_quiet_at_info_level_and_cheap_to_import(tmp_path):
    code = f"""
import logging, sys, warnings
warnings.simplefilter("error")
logging.basicConfig(level=logging.INFO)
logging.getLogger("jax").setLevel(logging.WARNING)
import jax.numpy as jnp
from bigmodel.checkpoint.checkpoints import Checkpoints
for name in ("flax", "tensorflow", "torch"):
    assert name not in sys.modules, name
with Checkpoints({str(tmp_path)!r}) as checkpoints:
    state = {{"x": jnp.arange(4)}}
    checkpoints.save(1, state, {{}})
    checkpoints.restore(state)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
