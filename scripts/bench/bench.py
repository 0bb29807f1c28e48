"""Times our train step beside a bare jitted one, plain Flax and PyTorch, and generation beside PyTorch's.

Each rival is a process of its own, run in turn.

    python scripts/bench/bench.py --json=bench.json   # all cases and rivals that are installed
    python scripts/bench/bench.py --cases=gpt-small,bert --rivals=ours,bare --rounds=5
    python scripts/bench/bench.py --cases=decode-1,decode-8            # bench_decode.py says what these are

Rivals in training (all float32, AdamW, clipping to norm 1, no dropout, as many parameters):
    ours     the compiled Program, fed batches that are in place; like `loop` and `bare` with the allocator
             setting of our scripts (cli.keep_memory)
    loop     the training loop around it: data, prefetch, metrics, logging
    bare     a hand-written jax.jit step of the same model with the same number of microbatches
    flax     the model as one writes it in plain Flax NNX (bench_flax.py), split and merged around jax.jit
    torch    PyTorch eager (bench_torch.py), if installed (pip install torch==2.13.0); torch-compile: with
             torch.compile

Every round runs a few steps of each rival, in this order and then in the reverse, so that the machine's drift
hits all alike. Printed: the median over rounds of a step's time and of its ratio to `ours` in the same round,
page faults a step, and each process's peak memory; of a generation, new tokens a second too.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import bench_decode
import interleave

from bigmodel import config as config_lib
from bigmodel.config import Config
from bigmodel.config.task import MLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # scripts/
import cli


class Case(NamedTuple):
    config: str
    overrides: dict[str, Any]
    steps: int  # a round
    image: tuple[int, ...] = ()  # shape of the model's images


GPT = {"model.vocab_size": 264}
MNIST, COLOR = (28, 28, 1), (32, 32, 3)
CASES = {
    "gpt": Case(
        "gpt.py:size=small,seq_len=256",
        {"model.depth": 6, "model.heads": 6, "model.width": 384, "batch_size": 16, **GPT}, 2,
    ),
    "gpt-small": Case(
        "gpt.py:size=toy,seq_len=64",
        {"model.depth": 4, "model.heads": 4, "model.width": 128, "batch_size": 12, **GPT}, 40,
    ),
    "bert": Case(
        "bert.py:seq_len=128",
        {"model.depth": 4, "model.width": 256, "model.norm_order": "post", "batch_size": 16}, 4,
    ),
    "rnn": Case("rnn.py:cell=lstm,depth=2,width=256,seq_len=128", {"batch_size": 32}, 4),
    "cnn-32": Case("cnn.py", {"batch_size": 32}, 20, MNIST),
    "cnn-128": Case("cnn.py", {"batch_size": 128}, 5, MNIST),
    "resnet-18": Case("resnet.py:depth=18,width=64", {"batch_size": 32}, 1, COLOR),
    "vit": Case(
        "vit.py", {"model.depth": 12, "model.heads": 3, "model.width": 192, "batch_size": 32}, 2, COLOR
    ),
}  # fmt: skip
TARGETS = {  # of a task: what is to be predicted, and what weighs it
    "lm": ("targets", "segments"),
    "mlm": ("masked_targets", "masked_real"),
    "classify": ("label", "mask"),
}


def load_case(case: str) -> Config:
    fixed = {"optim.name": "adamw", "optim.lr": 3e-4, "steps": 10**6, "log.tensorboard": False}
    from bigmodel import tasks

    path = f"{interleave.ROOT}/configs/{CASES[case].config}"
    return tasks.sized(config_lib.load(path, CASES[case].overrides | fixed))


def random_batch(case: str, config: Config, seed: int) -> dict[str, Any]:
    """A batch of the case's shapes, numpy."""
    import numpy as np

    from bigmodel.data import objectives

    rng, b, length = np.random.default_rng(seed), config.batch_size, config.seq_len
    mask = np.ones(b, np.float32)
    if shape := CASES[case].image:
        image = rng.normal(size=(b, *shape)).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 10, b, np.int32), "mask": mask}
    stream = rng.integers(0, 256, (b, length + 1), np.int32)
    batch = {
        "tokens": stream[:, :-1], "targets": stream[:, 1:], "segments": np.ones((b, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (b, 1)),
        "target_bytes": np.ones((b, length), np.uint8),
    }  # fmt: skip
    if isinstance(config.task, MLM):
        batch = objectives.mask_words(
            batch, np.arange(b), seed=seed, rate=config.task.mask_rate, mask_id=257, words=256, fixed=(),
            token_bytes=np.ones(264, np.uint8),
        )  # fmt: skip
    return {**batch, "mask": mask}


def four_batches(case: str, config: Config) -> list[dict[str, Any]]:
    return [random_batch(case, config, seed) for seed in range(4)]


# ------------------------------------------------------------------------------------------- the rivals


def build(case: str, config: Config) -> Any:
    import jax

    from bigmodel import mesh, program

    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in random_batch(case, config, 0).items()}
    return program.build(config, mesh.make_mesh(config, jax.devices()[:1]), spec)


def ours(case: str, config: Config) -> interleave.Rival:
    import jax

    program = build(case, config)
    compiled = program.compile()
    batches = [program.put(batch) for batch in four_batches(case, config)]
    return _steps(compiled, program.init(jax.random.key(0)), batches, program.state_spec["params"])


def loop(case: str, config: Config) -> interleave.Rival:
    """The real loop of bigmodel/train.py over a pipeline that draws the same random batches."""
    import jax

    from bigmodel import log, train
    from bigmodel.checkpoint.checkpoints import Checkpoints
    from bigmodel.data import Prefetch
    from bigmodel.ledger import Ledger
    from bigmodel.plan import planner

    drawn = four_batches(case, config)

    class Drawn:
        def __getitem__(self, step: int) -> dict[str, Any]:
            return {name: rows.copy() for name, rows in drawn[step % 4].items()}

        def __len__(self) -> int:
            return sys.maxsize

    program = build(case, config)
    compiled, state = program.compile(), program.init(jax.random.key(0))
    path = pathlib.Path(tempfile.mkdtemp(prefix="bigmodel-bench-"))
    data: Any = Drawn()
    run = train.Run(program, path, data, {}, Ledger())
    writer = log.Writer(path, first_step=0, tensorboard=True)
    receipt = planner.of_run(program, compiled)
    the_loop = train.Loop(run, compiled, state, Checkpoints(path / "checkpoints"), writer, receipt)
    batches = Prefetch(data, 0, program.put, config.data.prefetch)

    def step() -> Any:
        index, batch, wait_s = next(batches)
        the_loop.step(index + 1, batch, wait_s)
        return the_loop.state

    return interleave.Rival(step, wait=jax.block_until_ready)


def bare(case: str, config: Config) -> interleave.Rival:
    """The step written by hand: value_and_grad, a scan over microbatches, optax, jit with donation."""
    import jax
    import jax.numpy as jnp
    import optax

    from bigmodel import optim

    program = build(case, config)
    model, pieces, o = program.model, program.pieces, config.optim
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optim.schedule(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay),
    )

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        outputs, rest = model.apply(params, rest, batch, key=None, train=True)
        return _mean_loss(config, outputs["logits"], batch), rest

    gradient = jax.value_and_grad(loss, has_aux=True)

    def gradients(params: Any, rest: Any, batch: Any) -> Any:
        if pieces == 1:
            return gradient(params, rest, batch)
        cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)

        def add(carry: Any, piece: Any) -> tuple[Any, None]:
            (value, rest), g = gradient(params, carry[0], piece)
            return (rest, *jax.tree.map(jnp.add, carry[1:], (value, g))), None

        zeros = (rest, jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (rest, *sums), _ = jax.lax.scan(add, zeros, cut)
        value, g = jax.tree.map(lambda x: x / pieces, sums)
        return (value, rest), g

    def train_step(state: Any, batch: Any) -> Any:
        params, rest, opt = state
        (value, rest), g = gradients(params, rest, batch)
        updates, opt = tx.update(g, opt, params)
        return (optax.apply_updates(params, updates), rest, opt), value

    params, rest = model.init(jax.random.key(0))
    return _jax_steps(case, config, train_step, (params, rest, tx.init(params)))


def flax(case: str, config: Config) -> interleave.Rival:
    import bench_flax
    import jax
    import optax
    from flax import nnx

    model = bench_flax.MODELS[config.model.name](config, random_batch(case, config, 0), nnx.Rngs(0))
    states: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = states[0], *map(nnx.to_pure_dict, states[1:])
    o = config.optim
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(o.lr, o.b1, o.b2, weight_decay=o.weight_decay)
    )

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        value = _mean_loss(config, model(batch), batch)
        after: Any = nnx.split(model, nnx.Param, ...)
        return value, nnx.to_pure_dict(after[2])

    def train_step(state: Any, batch: Any) -> Any:
        params, rest, opt = state
        (value, rest), g = jax.value_and_grad(loss, has_aux=True)(params, rest, batch)
        updates, opt = tx.update(g, opt, params)
        return (optax.apply_updates(params, updates), rest, opt), value

    return _jax_steps(case, config, train_step, (params, rest, tx.init(params)))


def _mean_loss(config: Config, logits: Any, batch: Any) -> Any:
    import optax

    target, weight = (batch[name] for name in TARGETS[config.task.name])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return (nats * weight).sum() / weight.sum()


def _jax_steps(case: str, config: Config, train_step: Callable[..., Any], state: Any) -> interleave.Rival:
    import jax

    batches = [jax.device_put(batch) for batch in four_batches(case, config)]
    return _steps(jax.jit(train_step, donate_argnums=0), state, batches, state[0])


def _steps(train_step: Callable[..., Any], state: Any, batches: list[Any], params: Any) -> interleave.Rival:
    """(state, batch) -> (state, what is waited for), over the batches in turn."""
    import jax

    count = 0

    def step() -> Any:
        nonlocal state, count
        state, last = train_step(state, batches[count % len(batches)])
        count += 1
        return last

    parameters = sum(x.size for x in jax.tree.leaves(params))
    return interleave.Rival(step, parameters, jax.block_until_ready)


def torch(case: str, config: Config, compiled: bool = False) -> interleave.Rival:
    """PyTorch as nanoGPT writes it: AdamW, gradient clipping."""
    import bench_torch
    import torch as t

    t.set_num_threads(os.cpu_count() or 1)
    t.manual_seed(0)
    batches, o = four_batches(case, config), config.optim
    model: Any = bench_torch.MODELS[config.model.name](config, batches[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = t.optim.AdamW(trained, o.lr, (o.b1, o.b2), weight_decay=o.weight_decay)
    call = t.compile(model) if compiled else model
    target, weight = TARGETS[config.task.name]
    placed, count = [bench_torch.tensors(batch) for batch in batches], 0

    def step() -> None:
        nonlocal count
        batch = placed[count % 4]
        count += 1
        logits = call(batch)
        nats = t.nn.functional.cross_entropy(logits.flatten(0, -2), batch[target].flatten(), reduction="none")
        value = (nats * batch[weight].flatten()).sum() / batch[weight].sum()
        value.backward()
        t.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()

    return interleave.Rival(step, sum(p.numel() for p in trained))


MAKERS: dict[str, Callable[[str, Config], interleave.Rival]] = {
    "ours": ours, "loop": loop, "bare": bare, "flax": flax, "torch": torch,
    "torch-compile": lambda case, config: torch(case, config, compiled=True),
}  # fmt: skip


def rival(case: str, name: str) -> interleave.Rival:
    if name in ("ours", "int8", "loop", "bare"):  # the others keep the allocator that Python comes with
        cli.keep_memory()
    if case in bench_decode.CASES:
        return bench_decode.rival(case, name)
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # optax as one uses it by hand mixes dtypes
    return MAKERS[name](case, load_case(case))


def main() -> int:
    flags = cli.parser(__doc__)
    decoded, trained = bench_decode.CASES, CASES
    known = dict.fromkeys(trained, tuple(MAKERS)) | dict.fromkeys(decoded, tuple(bench_decode.MAKERS))
    needs = dict.fromkeys(trained, ("torch",)) | dict.fromkeys(decoded, ("torch", "transformers"))
    interleave.add_flags(flags, known, rounds=7)
    flags.add_argument("--steps", type=int, default=0, help="steps a round; 0: a few seconds' worth")
    args, _ = cli.parse(flags)
    results: dict[str, Any] = {}
    for case, rivals in interleave.chosen(args, known, needs).items():
        steps = args.steps or (trained[case].steps if case in trained else 1)
        made = ("tokens", decoded[case][1] * bench_decode.NEW) if case in decoded else None
        results[case] = interleave.compare(__file__, case, rivals, args.rounds, steps)
        interleave.show(case, results[case], made)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if (mine := interleave.worker_of(sys.argv)) is None:
        cli.run(main)
    else:
        interleave.work(*mine, rival)
