"""Shared by tests: eight CPU devices, strict dtype promotion, a session's caches, tiny configs and batches.

Compiling is what takes the time. So XLA's backend runs without optimization, and JAX's persistent cache (one
directory a session, or $JAX_COMPILATION_CACHE_DIR) lets a program that several tests, or several processes,
build be compiled once: for a tiny GPT 2.5 s of CPU become 0.1 s, and the steps stay equal bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
import mmap
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bigmodel.machines import accelerators

_FLAGS = {"xla_force_host_platform_device_count": int(os.environ.get("BIGMODEL_TEST_DEVICES", 8))}
# On a GPU the kernels themselves are tested. On a CPU, XLA's older emitters compile in half the time.
_CPU_FLAGS = _FLAGS | {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": "false"}
_SCRATCH = tempfile.TemporaryDirectory(prefix="bigmodel-tests-")
_SHARED = os.environ.setdefault("BIGMODEL_TESTS_SHARED", _SCRATCH.name)  # by the workers of one session


def _is_xla_flag(name: str) -> bool:
    """Says if this jaxlib knows the flag: XLA ends the process on one that it does not know."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None
    assert spec.origin is not None
    library = pathlib.Path(spec.origin).parent / "libjax_common.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def _prepare_environment() -> None:
    """Before JAX is imported, and for the subprocesses too. JAX_PLATFORMS=cuda,cpu shows the tests a GPU."""
    if not accelerators.found():
        accelerators.keep_to_cpu()
    on_cpu = os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu"
    given = os.environ.get("XLA_FLAGS", "")
    wanted = _CPU_FLAGS if on_cpu else _FLAGS
    wanted = {name: value for name, value in wanted.items() if name not in given and _is_xla_flag(name)}
    flags = [given, *(f"--{name}={value}" for name, value in wanted.items())]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{_SHARED}/jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["BIGMODEL_CACHE"] = f"{_SHARED}/bigmodel"
    os.environ["TFDS_DATA_DIR"] = f"{_SHARED}/tfds"


_prepare_environment()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from bigmodel import config as config_lib  # noqa: E402
from bigmodel import mesh, program, tasks, trees, workdir  # noqa: E402
from bigmodel.checkpoint.checkpoints import Checkpoints  # noqa: E402
from bigmodel.config import Config  # noqa: E402
from bigmodel.config.families import LABEL_TASKS  # noqa: E402
from bigmodel.config.task import keys_of  # noqa: E402
from bigmodel.data import boxes as box_data  # noqa: E402
from bigmodel.data import objectives  # noqa: E402
from bigmodel.program import Program, State  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent

TINY: dict[str, dict[str, Any]] = {
    "gpt": {
        "model.depth": 2, "model.width": 32, "model.heads": 4, "model.vocab_size": 64, "seq_len": 16,
    },
    "cnn": {"model.channels": (8, 16), "model.width": 16, "model.num_classes": 10},
    "moe": {
        "model.depth": 1, "model.width": 32, "model.heads": 4, "model.vocab_size": 64, "seq_len": 16,
        "model.experts": 4,
    },
    "bert": {
        "model.depth": 1, "model.width": 32, "model.heads": 4, "model.vocab_size": 64, "seq_len": 16,
        "model.norm_order": "post", "model.pooler": True, "task.next_sentence": True,
    },
    "t5": {
        "model.depth": 1, "model.width": 32, "model.heads": 4, "model.mlp_width": 64, "model.vocab_size": 64,
        "seq_len": 16,
    },
    "rnn": {"model.depth": 2, "model.width": 32, "model.vocab_size": 64, "seq_len": 16},
    "vit": {
        "model.depth": 1, "model.width": 32, "model.heads": 4, "model.pool": "cls", "model.num_classes": 10,
    },
    "resnet": {"model.depth": 10, "model.channels": (8, 8, 16, 16), "model.num_classes": 10},
    "own_model": {
        "model.depth": 2, "model.width": 16, "model.token_width": 8, "model.channel_width": 32,
        "model.num_classes": 10,
    },
    "mlp": {"model.widths": (32, 32), "model.dropout": 0.0, "model.num_classes": 10},
    "alexnet": {
        "model.channels": (4, 8, 8, 8, 8), "model.width": 16, "model.dropout": 0.0, "model.num_classes": 10,
    },
    "vgg": {
        "model.depth": 11, "model.channels": (4, 4, 8, 8, 8), "model.width": 16, "model.dropout": 0.0,
        "model.num_classes": 10,
    },
    "inception": {"model.multiplier": 0.05, "model.dropout": 0.0, "model.num_classes": 10},
    "detector": {
        "model.channels": (8, 8, 16, 16), "model.width": 16, "model.head_depth": 1, "model.depth": 10,
        "model.stem": "small", "model.levels": (3, 4), "data.image_size": 32, "data.augment": "",
        "model.num_classes": 4,
    },
    "gan": {
        "model.width": 8, "model.discriminator_width": 8, "model.latent": 8, "model.num_classes": 0,
        "model.norm": "batch", "optim.groups": {}, "data.name": "digits",
    },
    "sngan": {
        "model.width": 8, "model.discriminator_width": 8, "model.latent": 8, "model.num_classes": 0,
        "model.arch": "resnet", "model.norm": "spectral", "task.gan_loss": "hinge", "optim.groups": {},
        "data.name": "digits",
    },
    "wgan": {
        "model.width": 8, "model.discriminator_width": 8, "model.latent": 8, "model.num_classes": 0,
        "model.arch": "dcgan", "model.norm": "none", "task.gan_loss": "wgan-gp", "optim.groups": {},
        "data.name": "digits",
    },
    "gru": {"model.cell": "gru", "model.depth": 2, "model.width": 32, "model.vocab_size": 64, "seq_len": 16},
    "recommender": {"model.users": 64, "model.items": 32, "model.width": 16, "task.top_k": 5},
    "ncf": {
        "model.users": 64, "model.items": 32, "model.width": 16, "model.widths": (32, 32), "task.top_k": 5,
    },
    "two_tower": {
        "model.users": 64, "model.items": 32, "model.width": 16, "model.widths": (32, 32), "task.top_k": 5,
    },
}  # fmt: skip
FILES = {  # of families that are another's file with other settings
    "moe": "gpt.py", "gru": "rnn.py", "sngan": "gan.py", "wgan": "gan.py",
    "recommender": "recommender.py:kind=mf",
    "ncf": "recommender.py:kind=ncf", "two_tower": "recommender.py:kind=two_tower",
}  # fmt: skip
MESHES: list[dict[str, int]] = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 4, "data": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 4, "fsdp": 2},
]
FEW = {
    "steps": 10, "batch_size": 8, "microbatches": 1, "optim.name": "adamw", "optim.lr": 2e-3,
    "optim.warmup_steps": 2, "check.gradient": "never",  # tests/test_selfcheck.py
}  # fmt: skip


FIRST = (
    "test_train",
    "test_serve",
    "test_readme",
    "test_conformance",
    "test_compress",
)  # files that take longest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that no worker has one left when the others are done."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def pytest_unconfigure() -> None:
    _SCRATCH.cleanup()


# ------------------------------------------------------------------------------- configs and programs


def mesh_keys(axes: Mapping[str, int]) -> dict[str, int]:
    """Keywords for `tiny`: a mesh of these axes, and no more devices than they need."""
    return {"mesh__data": 1} | {f"mesh__{axis}": size for axis, size in axes.items()}


def tiny(family: str, **overrides: Any) -> Config:
    """configs/<family>.py, or what FILES says, made tiny; `__` stands for the dot in a key."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    file = FILES.get(family, f"{family}.py")
    return config_lib.load(f"{ROOT}/configs/{file}", {**FEW, **of_task(TINY[family], changes), **changes})


def of_task(keys: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the keys of another task where `changes` name a task."""
    other = changes.get("task.name", keys.get("task.name"))
    return {k: v for k, v in keys.items() if not other or k[:5] != "task." or k[5:] in keys_of(other)}


def sized(size: str, family: str = "gpt", **overrides: Any) -> Config:
    """configs/<family>.py at a published size, for what needs no arrays."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return tasks.sized(config_lib.load(f"{ROOT}/configs/{family}.py:size={size}", changes))


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Specs of a batch's arrays; unlike the data's own, images and labeled texts need no dataset."""
    if config.task.name not in LABEL_TASKS:
        return tasks.batch_spec(config)
    n, length = config.batch_size, config.seq_len
    shapes: dict[str, Any] = {"label": ((n,), np.int32), "mask": ((n,), np.float32)}
    if "image" in config.model.inputs:
        shapes["image"] = ((n, *image_shape(config)), np.float32)
    else:
        shapes |= dict.fromkeys(("tokens", "segments", "positions"), ((n, length), np.int32))
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def image_shape(config: Config) -> tuple[int, int, int]:
    """8 x 8; 32 x 32 for VGG and Inception v3, which halve them often; a ViT of published size takes
    ImageNet's."""
    if getattr(config.model, "patch", 1) > 8:
        return (224, 224, 3)
    halves = config.model.name == "vgg" or getattr(config.model, "version", "") == "v3"
    return (32, 32, 1) if halves else (8, 8, 1)


def build(config: Config) -> Program:
    """The Program on as many of the eight devices as the mesh's sizes say (-1: one)."""
    sizes = [max(size, 1) for size in config.mesh.sizes().values()]
    devices = jax.devices()[: math.prod(sizes)]
    return program.build(config, mesh.make_mesh(config, devices), batch_spec(config))


@functools.cache
def built(family: str, **overrides: Any) -> Program:
    """`build(tiny(...))`, once a session: tests that ask for the same program share its compiled steps."""
    return build(tiny(family, **overrides))


def random_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens or images; text comes in documents of uneven length, the last of them padded."""
    rng = np.random.default_rng(seed)
    n, length = config.batch_size, config.seq_len
    mask = np.ones(n, np.float32)
    if config.task.name in LABEL_TASKS and "text" in config.model.inputs:
        texts = [rng.integers(0, 40, rng.integers(3, length)) for _ in range(n)]
        label = rng.integers(0, config.model.num_classes, n).astype(np.int32)
        return {
            **objectives.whole_texts(texts, length=length, first=(), end=40),
            "label": label,
            "mask": mask,
        }
    if config.task.name in LABEL_TASKS:
        image = rng.normal(size=(n, *image_shape(config))).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 10, n).astype(np.int32), "mask": mask}
    if config.task.name == "detect":
        image = rng.normal(size=batch_spec(config)["image"].shape).astype(np.float32)
        parts = []
        for _ in range(n):
            count = int(rng.integers(0, 4))
            low, size = rng.uniform(0, 16, (count, 2)), rng.uniform(6, 16, (count, 2))
            boxes = np.concatenate([low, low + size], 1).astype(np.float32)
            parts.append(box_data.targets(config, image.shape[1:3], boxes, rng.integers(0, 4, count)))
        rows = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        return {"image": image, **rows, "mask": mask}
    if config.task.name == "gan":
        spec = batch_spec(config)
        image = np.tanh(rng.normal(size=spec["image"].shape)).astype(np.float32)
        label = {"label": rng.integers(0, 10, n).astype(np.int32)} if "label" in spec else {}
        return {"image": image, "serial": np.arange(n, dtype=np.int32) + n * seed, **label, "mask": mask}
    if config.task.name == "rank":  # each user once, so that nobody both likes and dislikes an item
        users, items = config.model.users - 1, config.model.items - 1  # 0 stands for an unknown one
        item = rng.integers(0, items, (n, 1))
        ids = {"user": rng.permutation(users)[:n], "item": item[:, 0]}
        batch = {"mask": mask}
        for name, s in batch_spec(config).items():
            if name == "negatives":
                ids[name] = (item + rng.integers(1, items, s.shape)) % items
            if name in ids:
                batch[name] = (1 + ids[name]).astype(np.int32)
            elif name != "mask":
                batch[name] = np.log(rng.uniform(0.01, 0.2, s.shape)).astype(np.float32)
        return batch
    words = config.model.vocab_size - 16  # what is above are special ids
    ids = rng.integers(0, words, (n, length + 1)).astype(np.int32)
    if config.task.name == "seq2seq":
        spec = batch_spec(config)
        lengths = {"inputs": length, "targets": spec["targets"].shape[1]}
        pairs = [[(row[: length // 2 + i % 8], row[: length // 4 + i % 2])] for i, row in enumerate(ids)]
        token_bytes = np.ones(config.model.vocab_size, np.uint8)
        return {
            **objectives.sequence_pairs(pairs, end=0, start=0, token_bytes=token_bytes, **lengths),
            "mask": mask,
        }
    cut, end = rng.integers(1, length // 2, (n, 1)), rng.integers(length // 2 + 1, length + 1, (n, 1))
    at = np.arange(length)
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, at - cut, np.where(segments == 1, at, 0)).astype(np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": segments, "positions": positions}
    if config.task.name == "mlm":
        token_bytes = np.ones(config.model.vocab_size, np.uint8)
        keys = {"mask_id": words, "words": words, "fixed": (), "token_bytes": token_bytes}
        batch = objectives.mask_words(batch, np.arange(n), seed=seed, rate=config.task.mask_rate, **keys)
        more = {
            "types": (at >= cut).astype(np.int32),
            "next_sentence": rng.integers(0, 2, n).astype(np.int32),
        }
        return {**batch, **(more if config.task.next_sentence else {}), "mask": mask}
    return {**batch, "target_bytes": np.ones((n, length), np.uint8), "mask": mask}


def start(built: Program, seed: int = 0) -> State:
    """The state at step 0. It is made on one device, once a session, and then laid out on the mesh."""
    config = built.config.replace(mesh=config_lib.Mesh())
    known = (repr(config), seed)
    if known not in _AT_ZERO:
        _AT_ZERO[known] = jax.device_get(build(config).init(jax.random.key(seed)))
    return jax.device_put(_AT_ZERO[known], jax.tree.map(lambda s: s.sharding, built.state_spec))


_AT_ZERO: dict[tuple[str, int], State] = {}


def steps(
    built: Program, state: State, count: int, batches: list[dict[str, np.ndarray]] | None = None
) -> tuple[State, dict[str, np.ndarray]]:
    """Trains; -> (the state, {metric: its value at each step}). Without `batches`, a new one each step."""
    rows = []
    for index in range(count):
        batch = batches[index % len(batches)] if batches else random_batch(built.config, index)
        state, metrics = built.train_step(state, built.put(batch))
        rows.append({name: mean(pair) for name, pair in jax.device_get(metrics).items()})
    return state, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def mean(pair: np.ndarray) -> np.float32:
    """A step's metric, from its sum and its weight; without weight, NaN."""
    return pair[0] / pair[1] if pair[1] else np.float32(np.nan)


by_path = trees.by_path


def saved(directory: pathlib.Path, config: Config) -> pathlib.Path:
    """A run of `config` whose state at step 0 is its checkpoint, with weights of some size."""
    directory.mkdir()
    workdir.write_config(directory, config)
    built = program.build(config, mesh.make_mesh(config, jax.devices()[:1]), tasks.batch_spec(config))
    state = jax.device_get(built.init(jax.random.key(0)))
    state["params"] = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, state["params"])
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.device_put(state, jax.tree.map(lambda s: s.sharding, built.state_spec)), {})
    return directory


# --------------------------------------------------------------------------------------------- scripts


def config_flag(config: Config, directory: pathlib.Path) -> str:
    """--config for a script that is to load exactly this config; the file is written to `directory`."""
    path = directory / "config_of_test.py"
    tree = json.dumps(config_lib.to_dict(config))
    load = f"return ml_collections.ConfigDict(json.loads({tree!r}))"
    path.write_text(f"import json\n\nimport ml_collections\n\n\ndef get_config(arg):\n    {load}\n")
    return f"--config={path}"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str
    seconds: float


def script_env(**env: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env}


def start_script(name: str, *args: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """scripts/<name> in a process group of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "scripts" / name), *args],
        cwd=ROOT, env=script_env(**(env or {})), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], limit_s: float = 120) -> tuple[int, str, str]:
    """-> (exit code, stdout, stderr); past the limit the whole group is killed and the test fails."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{process.args} ran past {limit_s} s\n{out[-2000:]}\n{err[-2000:]}")
    return process.returncode, out, err


def run_script(name: str, *args: str, limit_s: float = 120, env: Mapping[str, str] | None = None) -> Ran:
    began = time.perf_counter()
    code, out, err = finish(start_script(name, *args, env=env), limit_s)
    return Ran(code, out, err, time.perf_counter() - began)


@contextlib.contextmanager
def compiles() -> Iterator[list[str]]:
    """The compilations that happen while it lasts."""
    heard: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3.25)(1.0)
        assert heard  # or the listener is deaf
        heard.clear()
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# -------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """`train.run` sends the package's log to the console; caplog needs it to propagate."""
    logger = logging.getLogger("bigmodel")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`data.name` of a small corpus: 40 documents of words that repeat, so that a model can learn them."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = np.array(["mesh", "shard", "token", "layer", "step", "scan", "tree", "loss", "key", "batch"])
    for index in range(40):
        text = "\n".join(" ".join(rng.choice(words, 8)) for _ in range(int(rng.integers(3, 12))))
        (directory / f"{index:02}.txt").write_text(text + "\n")
    return f"text:{directory}/*.txt"


@pytest.fixture(scope="session")
def mnist_dir() -> str:
    """A TFDS data directory that holds MNIST: $BIGMODEL_TEST_TFDS, or shared/tfds beside the repository."""
    given = os.environ.get("BIGMODEL_TEST_TFDS")
    places = [pathlib.Path(given)] if given else [parent / "shared" / "tfds" for parent in ROOT.parents]
    found = next((place for place in places if (place / "mnist").is_dir()), None)
    if found is None:
        pytest.skip(f"no MNIST in {', '.join(map(str, places))}; set BIGMODEL_TEST_TFDS to a TFDS data_dir")
    return str(found)
