"""Times our train step beside a bare jitted one, plain Flax and PyTorch: one process each, run in turn.

    python scripts/bench.py --json=bench.json                    # all cases and rivals that are installed
    python scripts/bench.py --cases=gpt-small --rivals=ours,bare --rounds=5

Rivals (all float32, AdamW, clipping to norm 1, no dropout, the same shapes):
    ours     the compiled Program, fed batches that are in place; like `loop` and `bare` with the allocator
             setting of our scripts (cli.keep_memory)
    loop     the training loop around it: data, prefetch, metrics, logging
    bare     a hand-written jax.jit step of the same model with the same number of microbatches
    flax     the model as one writes it in plain Flax NNX, split and merged around jax.jit
    torch    PyTorch eager, if installed (pip install torch==2.13.0); torch-compile: with torch.compile

Every round runs a few steps of each rival, in this order and then in the reverse, so that the machine's drift
hits all alike. Printed: the median over rounds of a step's time and of its ratio to `ours` in the same round,
page faults a step, and each process's peak memory.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import cli

from bigmodel import config as config_lib
from bigmodel.config import Config, InputError

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": (
        "configs/gpt.py:size=small,seq_len=256",
        {"model.depth": 6, "model.heads": 6, "model.width": 384, "model.vocab_size": 264, "batch_size": 16},
    ),
    "gpt-small": (
        "configs/gpt.py:size=toy,seq_len=64",
        {"model.depth": 4, "model.heads": 4, "model.width": 128, "model.vocab_size": 264, "batch_size": 12},
    ),
    "cnn-32": ("configs/cnn.py:data=mnist", {"batch_size": 32}),
    "cnn-128": ("configs/cnn.py:data=mnist", {"batch_size": 128}),
}
RIVALS = ("ours", "loop", "bare", "flax", "torch", "torch-compile")
ROOT = pathlib.Path(__file__).resolve().parents[1]

Step = Callable[[], Any]  # starts a step; what it returns can be waited for


def load_case(case: str) -> Config:
    path, overrides = CASES[case]
    fixed = {"optim.name": "adamw", "optim.lr": 3e-4, "steps": 10**6, "log.tensorboard": False}
    return config_lib.load(ROOT / path, overrides | fixed)


def random_batch(config: Config, seed: int) -> dict[str, Any]:
    """A batch of the case's shapes, numpy."""
    import numpy as np

    rng, b, length = np.random.default_rng(seed), config.batch_size, config.seq_len
    if config.task.name == "classify":
        image = rng.normal(size=(b, 28, 28, 1)).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 10, b, np.int32), "mask": np.ones(b, np.float32)}
    stream = rng.integers(0, 256, (b, length + 1), np.int32)
    return {
        "tokens": stream[:, :-1], "targets": stream[:, 1:], "segments": np.ones((b, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (b, 1)),
        "mask": np.ones(b, np.float32), "target_bytes": np.ones((b, length), np.uint8),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- the rivals


def build(config: Config) -> Any:
    import jax

    from bigmodel import mesh, program

    batch = random_batch(config, 0)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    return program.build(config, mesh.make_mesh(config, jax.devices()[:1]), spec)


def ours(config: Config) -> Step:
    import jax

    program = build(config)
    compiled, state = program.compile(), program.init(jax.random.key(0))
    batches = [program.put(random_batch(config, seed)) for seed in range(4)]

    count = 0

    def step() -> Any:
        nonlocal state, count
        state, metrics = compiled(state, batches[count % 4])
        count += 1
        return metrics

    return step


def loop(config: Config) -> Step:
    """The real loop of bigmodel/train.py over a pipeline that draws the same random batches."""
    import jax

    from bigmodel import log, train
    from bigmodel.checkpoint import Checkpoints
    from bigmodel.data import Prefetch
    from bigmodel.ledger import Ledger
    from bigmodel.plan import planner

    drawn = [random_batch(config, seed) for seed in range(4)]

    class Drawn:
        def __getitem__(self, step: int) -> dict[str, Any]:
            return {name: rows.copy() for name, rows in drawn[step % 4].items()}

        def __len__(self) -> int:
            return sys.maxsize

    program = build(config)
    compiled, state = program.compile(), program.init(jax.random.key(0))
    path = pathlib.Path(tempfile.mkdtemp(prefix="bigmodel-bench-"))
    data: Any = Drawn()
    run = train._Run(program, path, data, data, Ledger())
    writer = log.Writer(path, first_step=0, tensorboard=True)
    receipt = planner.of_run(program, compiled)
    the_loop = train._Loop(run, compiled, state, Checkpoints(path / "checkpoints"), writer, receipt)
    the_loop.progress = log.Progress()
    the_loop.window.reset()
    batches = Prefetch(data, 0, program.put, config.data.prefetch)

    def step() -> Any:
        index, batch, wait_s = next(batches)
        the_loop._step(index + 1, batch, wait_s)
        return the_loop.state

    return step


def bare(config: Config) -> Step:
    """What one writes by hand: value_and_grad, a scan over microbatches, optax, jit with donation."""
    import jax
    import jax.numpy as jnp
    import optax

    from bigmodel import optim
    from bigmodel.program import microbatches

    program = build(config)
    model, pieces = program.model, microbatches(config, program.mesh)
    o = config.optim
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optim.schedule(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay),
    )
    label = "label" if config.task.name == "classify" else "targets"

    def loss(params: Any, batch: Any) -> Any:
        logits, _ = model.apply(params, {}, batch, key=None, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[label]).mean()

    def grads(params: Any, batch: Any) -> Any:
        if pieces == 1:
            return jax.value_and_grad(loss)(params, batch)
        cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)

        def add(sums: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, piece)), None

        sums, _ = jax.lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), cut)
        return jax.tree.map(lambda x: x / pieces, sums)

    def train_step(params: Any, opt: Any, batch: Any) -> Any:
        value, g = grads(params, batch)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt, value

    params, _ = model.init(jax.random.key(0))
    return _jax_steps(config, jax.jit(train_step, donate_argnums=(0, 1)), params, tx.init(params))


def flax(config: Config) -> Step:
    """The same shapes in idiomatic Flax NNX: its own layers, no microbatches, none of our array functions."""
    import jax
    import optax
    from flax import nnx

    def make() -> Any:
        return (_flax_cnn if config.task.name == "classify" else _flax_gpt)(config, nnx.Rngs(0))

    graph, state = nnx.split(make(), nnx.Param)
    params, o = nnx.to_pure_dict(state), config.optim
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(o.lr, o.b1, o.b2, weight_decay=o.weight_decay)
    )
    image = config.task.name == "classify"

    def loss(params: Any, batch: Any) -> Any:
        logits = nnx.merge(graph, params)(batch["image" if image else "tokens"])
        labels = batch["label" if image else "targets"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train_step(params: Any, opt: Any, batch: Any) -> Any:
        value, g = jax.value_and_grad(loss)(params, batch)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return _jax_steps(config, jax.jit(train_step, donate_argnums=(0, 1)), params, tx.init(params))


def _jax_steps(config: Config, jitted: Any, params: Any, opt: Any) -> Step:
    import jax

    batches = [jax.device_put(random_batch(config, seed)) for seed in range(4)]
    state, count = [params, opt], [0]

    def step() -> Any:
        state[0], state[1], value = jitted(state[0], state[1], batches[count[0] % 4])
        count[0] += 1
        return value

    return step


def _flax_gpt(config: Config, rngs: Any) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    c: Any = config.model

    class Block(nnx.Module):
        def __init__(self) -> None:
            self.norm1, self.norm2 = (nnx.LayerNorm(c.width, rngs=rngs) for _ in range(2))
            self.qkv = nnx.Linear(c.width, 3 * c.width, rngs=rngs)
            self.out = nnx.Linear(c.width, c.width, rngs=rngs)
            self.up = nnx.Linear(c.width, c.mlp_width, rngs=rngs)
            self.down = nnx.Linear(c.mlp_width, c.width, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            b, length, _ = x.shape
            q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(b, length, 3 * c.heads, -1), 3, axis=2)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.reshape(b, length, -1))
            return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))

    class GPT(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(c.vocab_size, c.width, rngs=rngs)
            self.positions = nnx.Embed(config.seq_len, c.width, rngs=rngs)
            self.blocks = nnx.List([Block() for _ in range(c.depth)])
            self.norm = nnx.LayerNorm(c.width, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.embed.attend(self.norm(x))

    return GPT()


def _flax_cnn(config: Config, rngs: Any) -> Any:
    import jax
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self) -> None:
            self.conv1 = nnx.Conv(1, 64, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(64, 128, (3, 3), rngs=rngs)
            self.hidden = nnx.Linear(14 * 14 * 128, 256, rngs=rngs)
            self.head = nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.max_pool(jax.nn.relu(self.conv1(x)), (2, 2), (2, 2))
            x = jax.nn.relu(self.conv2(x))
            return self.head(jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1))))

    return CNN()


def torch(config: Config, compiled: bool = False) -> Step:
    """PyTorch as nanoGPT writes it: fused attention, AdamW, gradient clipping."""
    import torch as t

    t.set_num_threads(os.cpu_count() or 1)
    t.manual_seed(0)
    image, o = config.task.name == "classify", config.optim
    model: Any = (_torch_cnn if image else _torch_gpt)(config)
    optimizer = t.optim.AdamW(model.parameters(), o.lr, (o.b1, o.b2), weight_decay=o.weight_decay)
    call = t.compile(model) if compiled else model
    batches = []
    for seed in range(4):
        batch = {name: t.from_numpy(x) for name, x in random_batch(config, seed).items()}
        x = batch["image"].permute(0, 3, 1, 2).contiguous() if image else batch["tokens"]
        batches.append((x, batch["label" if image else "targets"].long()))
    count = [0]

    def step() -> None:
        x, y = batches[count[0] % 4]
        count[0] += 1
        logits = call(x)
        value = t.nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
        value.backward()
        t.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()

    return step


def _torch_gpt(config: Config) -> Any:
    import torch as t

    c: Any = config.model

    class Block(t.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = t.nn.LayerNorm(c.width), t.nn.LayerNorm(c.width)
            self.qkv, self.out = t.nn.Linear(c.width, 3 * c.width), t.nn.Linear(c.width, c.width)
            self.up, self.down = t.nn.Linear(c.width, c.mlp_width), t.nn.Linear(c.mlp_width, c.width)

        def forward(self, x: Any) -> Any:
            b, length, d = x.shape
            parts = self.qkv(self.norm1(x)).split(d, dim=2)
            q, k, v = (p.view(b, length, c.heads, -1).transpose(1, 2) for p in parts)
            y = t.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(b, length, d))
            return x + self.down(t.nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(t.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = t.nn.Embedding(c.vocab_size, c.width)
            self.positions = t.nn.Embedding(config.seq_len, c.width)
            self.blocks = t.nn.Sequential(*(Block() for _ in range(c.depth)))
            self.norm = t.nn.LayerNorm(c.width)
            for table in (self.embed, self.positions):
                t.nn.init.normal_(table.weight, 0, 0.02)

        def forward(self, tokens: Any) -> Any:
            x = self.embed(tokens) + self.positions(t.arange(tokens.shape[1]))
            return self.norm(self.blocks(x)) @ self.embed.weight.T

    return GPT()


def _torch_cnn(config: Config) -> Any:
    import torch as t

    return t.nn.Sequential(
        t.nn.Conv2d(1, 64, 3, padding=1), t.nn.ReLU(), t.nn.MaxPool2d(2),
        t.nn.Conv2d(64, 128, 3, padding=1), t.nn.ReLU(), t.nn.Flatten(),
        t.nn.Linear(14 * 14 * 128, 256), t.nn.ReLU(), t.nn.Linear(256, 10),
    )  # fmt: skip


MAKERS: dict[str, Callable[[Config], Step]] = {
    "ours": ours, "loop": loop, "bare": bare, "flax": flax, "torch": torch,
    "torch-compile": lambda config: torch(config, compiled=True),
}  # fmt: skip


# -------------------------------------------------------------------------------------- taking turns


def work(case: str, rival: str) -> None:
    """A worker: for each number read, runs so many steps and answers with their times, as JSON lines."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the rival prints must not mix with the answers
    began = time.perf_counter()
    cli.no_accelerator_needed()
    if rival in ("ours", "loop", "bare"):  # the others keep the allocator that Python comes with
        cli.keep_memory()
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # optax as one uses it by hand mixes dtypes
    step = MAKERS[rival](load_case(case))
    for _ in range(3):
        _wait(step())
    answers.write(json.dumps({"start_s": time.perf_counter() - began}) + "\n")
    for line in sys.stdin:
        steps, before, began = int(line), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(steps):
            last = step()
        _wait(last)  # steps are dispatched ahead, as in training; none may run on into a rival's turn
        step_s = (time.perf_counter() - began) / steps
        after = resource.getrusage(resource.RUSAGE_SELF)
        faults = (after.ru_minflt - before.ru_minflt) / steps
        row = {"step_s": step_s, "faults": faults, "peak_mib": after.ru_maxrss / 1024}
        answers.write(json.dumps(row) + "\n")


def _wait(result: Any) -> None:
    if result is not None:  # PyTorch has waited already
        import jax

        jax.block_until_ready(result)


def compare(case: str, rivals: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Runs the rivals of a case in turn -> {rival: medians}."""
    workers: dict[str, subprocess.Popen[str]] = {}
    complaints = []
    starts: dict[str, float] = {}
    for rival in rivals:
        command = [sys.executable, __file__, f"--worker={case}:{rival}"]
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed below, when the worker has ended
        complaints.append(said)
        pipe = subprocess.PIPE
        workers[rival] = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True)
        answer = workers[rival].stdout.readline()  # type: ignore[union-attr]
        if not answer:
            said.seek(0)
            sys.stderr.write(said.read())
            raise InputError(f"--rivals: {rival} failed on {case}, as shown above; leave it out")
        starts[rival] = json.loads(answer)["start_s"]
    rows: dict[str, list[dict[str, float]]] = {rival: [] for rival in rivals}
    for index in range(rounds):
        for rival in rivals if index % 2 == 0 else reversed(rivals):
            worker: Any = workers[rival]
            worker.stdin.write(f"{steps}\n")
            worker.stdin.flush()
            rows[rival].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    for said in complaints:
        said.close()
    out = {}
    for rival in rivals:
        ratios = [a["step_s"] / b["step_s"] for a, b in zip(rows[rival], rows[rivals[0]], strict=True)]
        out[rival] = {
            "step_ms": 1e3 * statistics.median(row["step_s"] for row in rows[rival]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "faults_per_step": statistics.median(row["faults"] for row in rows[rival]),
            "peak_mib": max(row["peak_mib"] for row in rows[rival]),
            "start_s": starts[rival],
        }
    return out


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    flags.add_argument("--rivals", default=",".join(RIVALS), help="comma-separated; the first is the measure")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--steps", type=int, default=0, help="steps a round; 0: about 3 seconds' worth")
    flags.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    args, _ = cli.parse(flags)
    cases, rivals = args.cases.split(","), args.rivals.split(",")
    for name, known, flag in [(c, CASES, "cases") for c in cases] + [(r, MAKERS, "rivals") for r in rivals]:
        if name not in known:
            raise InputError(f"--{flag}={name!r} is unknown; choose from {', '.join(known)}")
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        rivals = [rival for rival in rivals if not rival.startswith("torch")]
        print("torch is not installed: left out (pip install torch==2.13.0)")
    results: dict[str, Any] = {}
    for case in cases:
        steps = args.steps or {"gpt": 2, "gpt-small": 40, "cnn-32": 20, "cnn-128": 5}[case]
        results[case] = compare(case, rivals, args.rounds, steps)
        print(
            f"\n{case:<15}{'ms a step':>10}{'x ' + rivals[0]:>10}{'range':>14}{'faults':>10}{'peak MiB':>10}"
        )
        for rival, r in results[case].items():
            low, high = r["ratio_range"]
            print(
                f"  {rival:<13}{r['step_ms']:>10.1f}{r['ratio']:>10.3f}{f'{low:.2f}-{high:.2f}':>14}"
                f"{r['faults_per_step']:>10.0f}{r['peak_mib']:>10.0f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if not sys.argv[-1].startswith("--worker="):
        cli.run(main)
    work(*sys.argv[-1].removeprefix("--worker=").split(":"))
