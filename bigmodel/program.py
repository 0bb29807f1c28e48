"""The Program: everything a run is, known before any array exists.

`plan` compiles it for a cluster that need not be there, `train` runs the same compiled object, and
`checkpoint` restores into its `state_spec`. There is no second path, so a plan cannot drift from the run.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bigmodel import mesh as mesh_lib
from bigmodel import models, optim, sparsity, tasks, trees, workdir
from bigmodel.config import Config, InputError
from bigmodel.machines import chips
from bigmodel.metrics import Metrics
from bigmodel.models.module import Definition
from bigmodel.tasks import distill

State = dict[str, Any]  # step, key, params, rest, opt [, ema] [, loss_scale]: nested dicts of arrays
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """The parts of a training step that its gradient needs, besides the state and the batch."""

    config: Config
    model: Definition
    task: tasks.Task
    pieces: int  # microbatches


@dataclass(frozen=True)
class Program(Step):
    """A run's computation. Specs are trees of `jax.ShapeDtypeStruct` with shape, dtype AND sharding."""

    mesh: Mesh
    state_spec: State
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[jax.Array], State]  # jitted straight into its sharding
    train_step: Any  # jitted (state, batch) -> (state, metrics); the state is donated
    eval_step: Any  # jitted (state, batch) -> Metrics; reads only params (or ema) and rest
    predict: Any  # jitted (state, batch) -> the task's predictions, [B, ...] on every device
    examine: Any  # jitted (state, batch) -> what eval_step and predict give, from one forward pass

    def evaluated(self, state: State) -> Any:
        """Returns the parameters that evaluation, serving, export, compression and students use.

        These are moving averages where the state has them, in the parameters' own dtypes.
        """
        return evaluated(state)

    def on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that `shard` and `attend` see the mesh wherever it is traced."""
        return _on_mesh(self.mesh, function)

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers the train step for the mesh's devices, without compiling it."""
        return self.train_step.trace(self.state_spec, self.batch_spec).lower()

    def compile(self) -> Any:
        """Compiles the train step: call it, or read its `cost_analysis`, `memory_analysis`, `as_text`."""
        return self.lower().compile(dict(self.config.compiler_options))

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts this host's rows of a batch (numpy) on the mesh and returns the global batch.

        A batch for evaluation may have arrays that `batch_spec` lacks.
        """
        sharding, size = mesh_lib.batch_sharding(self.mesh), self.config.batch_size
        return {
            name: jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))
            for name, rows in batch.items()
        }


def build(config: Config, mesh: Mesh, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Program:
    """Builds the Program of a config, a mesh and the batch's shapes. Makes no array and compiles nothing.

    Raises:
        InputError: a rule of `mesh.rules` matches no parameter, `microbatches` does not divide what each
            device gets, or its chips have no matrix units for `compute_dtype`.
    """
    chips.check_dtype(chips.chip(mesh.devices.flat[0]), config.compute_dtype)
    sharding = mesh_lib.batch_sharding(mesh)
    batch_spec = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in batch_spec.items()}
    model = define(config, batch_spec)
    task, tx = tasks.make(config), optimizer(config, model)
    step = Step(config, model, task, microbatches(config, mesh))

    init = _on_mesh(mesh, lambda key: init_state(config, model, tx, key))
    spec = jax.eval_shape(init, jax.random.key(0))
    mesh_lib.check_rules(config, trees.by_path(spec["params"]))
    state_spec = place(spec, mesh, model.rules)
    state_sharding = jax.tree.map(lambda s: s.sharding, state_spec)
    batch_sharding = {name: s.sharding for name, s in batch_spec.items()}
    everywhere = mesh_lib.replicated(mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        return update(step, tx, state, batch)

    def outputs(state: State, batch: Batch) -> Any:
        return model.apply(evaluated(state), state["rest"], batch, key=None, train=False)[0]

    def eval_step(state: State, batch: Batch) -> Metrics:
        return task.terms(outputs(state, batch), batch, False)

    def predict(state: State, batch: Batch) -> dict[str, jax.Array]:
        return task.predictions(outputs(state, batch))

    def examine(state: State, batch: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        found = outputs(state, batch)
        return task.terms(found, batch, False), task.predictions(found)

    return Program(
        config=config,
        model=model,
        task=task,
        pieces=step.pieces,
        mesh=mesh,
        state_spec=state_spec,
        batch_spec=batch_spec,
        init=jax.jit(init, out_shardings=state_sharding),
        train_step=jax.jit(
            _on_mesh(mesh, train_step),
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, everywhere),
            donate_argnums=0,
        ),
        eval_step=jax.jit(_on_mesh(mesh, eval_step), in_shardings=(None, sharding), out_shardings=everywhere),
        predict=jax.jit(_on_mesh(mesh, predict), in_shardings=(None, sharding), out_shardings=everywhere),
        examine=jax.jit(_on_mesh(mesh, examine), in_shardings=(None, sharding), out_shardings=everywhere),
    )


def define(config: Config, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Definition:
    """Returns the model that a run trains, with its teacher if it has one, whose config is read.

    Raises:
        InputError: the teacher has no config, or does not predict what the run does.
    """
    if not config.distill.teacher:
        return models.define(config, batch_spec)
    taught = workdir.read_config(pathlib.Path(config.distill.teacher))
    distill.check(config, taught)
    return models.define(config, batch_spec, taught)


def _on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    wrapped.__name__ = getattr(function, "__name__", wrapped.__name__)
    return wrapped


def microbatches(config: Config, mesh: Mesh) -> int:
    """Returns `config.microbatches` or its default.

    The default is 1, but on a CPU pieces of about 1,024 tokens, which halve the memory.

    Raises:
        InputError: the pieces do not divide over the mesh.
    """
    ways = mesh_lib.batch_ways(mesh)
    if config.microbatches:
        if config.batch_size % (config.microbatches * ways):
            raise InputError(
                f"microbatches={config.microbatches} does not divide batch_size={config.batch_size} over the "
                f"{ways} pieces of mesh.data x mesh.fsdp x mesh.expert; choose a divisor of "
                f"{config.batch_size // ways}"
            )
        return config.microbatches
    if mesh.devices.flat[0].platform != "cpu" or not config.task.predicts_tokens:
        return 1
    small = max(1024 // config.seq_len, 1)
    most = max(config.batch_size // max(small, ways), 1)
    return next(n for n in range(most, 0, -1) if config.batch_size % (n * ways) == 0)


def init_state(config: Config, model: Definition, tx: optax.GradientTransformation, key: jax.Array) -> State:
    """Initializes the state at step 0."""
    init_key, step_key = jax.random.split(key)
    return state_of(config, tx, *model.init(init_key), step_key)


def start(program: Program, params: Any, rest: Any, key: jax.Array) -> State:
    """Returns the state at step 0 of a run that starts from these parameters."""
    sharding = jax.tree.map(lambda s: s.sharding, program.state_spec)
    tx = optimizer(program.config, program.model)
    make = jax.jit(
        lambda params, rest, key: state_of(program.config, tx, params, rest, key), out_shardings=sharding
    )
    return make(params, rest, key)


def optimizer(config: Config, model: Definition) -> optax.GradientTransformation:
    """Returns the config's optimizer, which keeps pruned weights at zero."""
    return sparsity.hold(optim.make(config), config.prune, model.products)


def state_of(
    config: Config, tx: optax.GradientTransformation, params: Any, rest: Any, step_key: jax.Array
) -> State:
    """Returns the state at step 0. Frozen parameters have neither optimizer state nor moving average."""
    trained, _ = optim.split(config, params)
    state = {
        "step": jnp.int32(0),
        "key": jax.random.key_data(step_key),
        "params": params,
        "rest": rest,
        "opt": tx.init(trained),
    }
    if config.optim.ema_decay:
        state["ema"] = jax.tree.map(lambda p: p.astype(jnp.float32), trained)
    if config.compute_dtype == "float16":
        state["loss_scale"] = optim.loss_scale_init()
    return state


def steps_left(config: Config, state: State) -> int:
    """Returns how many of `config.steps` are left.

    Steps that float16's loss scale or `train.on_divergence` skipped are repeated, so that schedules reach
    their end, unless a budget of FLOPs decides the steps.
    """
    skips = ("loss_scale" in state or config.train.on_divergence != "stop") and not config.budget
    return max(config.steps - int(optim.updates(state["opt"]) if skips else state["step"]), 0)


def evaluated(state: State) -> Any:
    """Returns the parameters of `Program.evaluated`. Averaged parameters may be specs in `params`."""
    params = state["params"]
    if "ema" not in state:
        return params
    return jax.tree.map(lambda x, p: x.astype(p.dtype), optim.join(state["ema"], params), params)


def update(
    step: Step, tx: optax.GradientTransformation, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    """Runs one training step and returns the next state and metrics: loss, grad_norm, lr and the task's own.

    Each metric is a float32 [2], sum and weight, so that steps add up as the batches of an evaluation do.
    """
    config = step.config
    grads, rest, terms = gradients(step, state, batch)
    trained, frozen = optim.split(config, state["params"])
    with jax.named_scope("optimizer"):  # a plan reports its time separately
        updates, opt = tx.update(grads, state["opt"], trained)
        trained = optax.apply_updates(trained, updates)
        new = dict(state, rest=rest, opt=opt, params=optim.join(trained, frozen))
    if config.optim.ema_decay:
        d = config.optim.ema_decay
        new["ema"] = jax.tree.map(lambda e, p: d * e + (1 - d) * p.astype(jnp.float32), state["ema"], trained)
    grad_norm = optim.norm(grads)
    scalars = {"grad_norm": grad_norm, **optim.learning_rates(config, optim.updates(state["opt"]))}
    skips = config.train.on_divergence != "stop"
    if skips or "loss_scale" in state:
        finite = jnp.isfinite(grad_norm)
        if skips:
            finite &= jnp.isfinite(terms["loss"][0])
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        if "loss_scale" in state:  # float16: an overflow skips the update and halves the scale
            new["loss_scale"] = optim.loss_scale_update(state["loss_scale"], finite)
            scalars["loss_scale"] = state["loss_scale"]["scale"]
        scalars["skipped"] = 1.0 - finite.astype(jnp.float32)
    new["step"] = state["step"] + 1
    pairs = {**terms, **{name: (value, 1.0) for name, value in scalars.items()}}
    return new, {name: jnp.stack([jnp.float32(x) for x in pair]) for name, pair in pairs.items()}


def gradients(step: Step, state: State, batch: Batch) -> tuple[Any, Any, Metrics]:
    """Returns gradients of the batch's mean loss, rest, and metric sums, over the step's microbatches.

    Differentiates by the parameters that are trained alone; frozen ones cost nothing. The loss is divided by
    the entire batch's weight, so that cutting it into pieces changes only rounding.
    """
    model, task, pieces = step.model, step.task, step.pieces
    scale = state["loss_scale"]["scale"] if "loss_scale" in state else None
    trained, frozen = optim.split(step.config, state["params"])
    grad = jax.grad(objective(model, task, scale, batch, frozen), has_aux=True)
    if pieces == 1:
        grads, (rest, terms) = grad(trained, state["rest"], batch, step_key(state))
        return _unscale(grads, scale), rest, terms

    xs = cut(state, batch, pieces)

    def piece(index: jax.Array | int) -> tuple[Batch, jax.Array]:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), xs)

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        # x was sliced a round ahead: a carry cannot be fused, and XLA:CPU vectorizes no loop that slices.
        sums, rest, terms, x = carry
        grads, (rest, new_terms) = grad(trained, rest, *x)
        sums, terms = jax.tree.map(jnp.add, (sums, terms), (grads, new_terms))
        return (sums, rest, terms, piece((index + 1) % pieces)), None

    grads, (_, terms) = jax.eval_shape(grad, trained, state["rest"], *piece(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, terms))
    start = (zeros[0], state["rest"], zeros[1], piece(0))
    (grads, rest, terms, _), _ = jax.lax.scan(body, start, jnp.arange(pieces))
    return _unscale(grads, scale), rest, terms


Objective = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]


def objective(
    model: Definition, task: tasks.Task, scale: jax.Array | None, batch: Batch, frozen: Any
) -> Objective:
    """Returns the function that training minimizes.

    It maps (trained parameters, rest, a microbatch, key) to (the microbatch's part of the mean loss of
    `batch`, times `scale` if given; (rest, metric sums)).
    """
    total = jnp.maximum(task.weight(batch), 1e-9)

    def loss(trained: Any, rest: Any, piece: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Any, Metrics]]:
        outputs, rest = model.apply(optim.join(trained, frozen), rest, piece, key=key, train=True)
        terms = task.terms(outputs, piece, True)
        value = terms["loss"][0] / total
        return value if scale is None else value * scale, (rest, terms)

    return loss


def step_key(state: State) -> jax.Array:
    """Returns the random key of this state's next step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])


def cut(state: State, batch: Batch, pieces: int) -> tuple[Batch, jax.Array]:
    """Splits a batch into stacked microbatches [pieces, B / pieces, ...] and their keys."""
    return jax.tree.map(lambda x: _cut(x, pieces), dict(batch)), jax.random.split(step_key(state), pieces)


def _cut(x: jax.Array, pieces: int) -> jax.Array:
    """Reshapes [B, ...] to [pieces, B / pieces, ...], strided so that every device keeps its own examples."""
    x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
    return mesh_lib.shard(x, None, "batch", *(None,) * (x.ndim - 2))


def _unscale(grads: Any, scale: jax.Array | None) -> Any:
    if scale is None:
        return grads
    return jax.tree.map(lambda g: (g.astype(jnp.float32) / scale).astype(g.dtype), grads)


def place(spec: State, mesh: Mesh, rules: mesh_lib.Rules) -> State:
    """Returns a state's shapes with their shardings on a mesh.

    Optimizer state and moving averages follow the rule of their parameter.
    """
    names = trees.by_path(spec["params"]).keys()

    def placed(path: Any, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = trees.path_str(path).split("/")
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        name = next((end for end in ends if end in names), "/".join(keys))
        where = mesh_lib.param_sharding(mesh, rules, name, s.shape)
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(placed, spec)
