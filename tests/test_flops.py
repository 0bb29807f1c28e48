"""FLOPs of every task and family against XLA's input program, whose products are counted anew."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, batch_spec, build, saved, tiny
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxlib.mlir import ir, passmanager

from bigmodel import config as config_lib
from bigmodel import mesh, optim, program, tasks
from bigmodel.config import Config, InputError
from bigmodel.plan import candidates, costs_chip, flops, hlo
from bigmodel.program import Program

# --------------------------------------------------------------------- the count in XLA's input program


def xla_flops(function: Callable[..., Any], *specs: Any) -> float:
    """FLOPs of the products in the StableHLO that JAX gives to XLA, without what no result needs."""
    module: Any = jax.jit(function).lower(*specs).compiler_ir("stablehlo")
    with module.context:
        passmanager.PassManager.parse("builtin.module(inline,canonicalize,symbol-dce)").run(module.operation)
        functions = {str(f.attributes["sym_name"]).strip('"'): f for f in module.body.operations}
        return _of_region(functions["main"].regions[0], functions)


def _of_region(region: Any, functions: dict[str, Any]) -> float:
    return sum(_of(op, functions) for block in region.blocks for op in block.operations)


def _of(op: Any, functions: dict[str, Any]) -> float:
    name, inner = op.operation.name, [_of_region(region, functions) for region in op.regions]
    if name in ("func.call", "call"):
        return _of_region(functions[str(op.attributes["callee"]).strip('@"')].regions[0], functions)
    if name == "stablehlo.while":
        return _length(op.regions[0]) * inner[1] if inner[1] else 0.0
    if name == "stablehlo.case":
        return max(inner)
    if name == "stablehlo.dot_general":
        numbers = str(op.attributes["dot_dimension_numbers"])
        axes = re.search(r"lhs_contracting_dimensions = \[([\d, ]*)\]", numbers)
        lhs = _shape(op.operands[0])
        contracted = [lhs[int(axis)] for axis in axes.group(1).split(",")] if axes else []
        return 2.0 * math.prod(_shape(op.results[0])) * math.prod(contracted)
    if name == "stablehlo.convolution":
        numbers, kernel = str(op.attributes["dimension_numbers"]), _shape(op.operands[1])
        labels = re.search(r"x\[([^\]]*)\]", numbers)
        assert labels is not None
        outputs = kernel[[label.strip() for label in labels.group(1).split(",")].index("o")]
        spread = 1  # inputs between which a stride's gradient puts zeros
        if "lhs_dilation" in op.attributes:
            spread = math.prod(ir.DenseI64ArrayAttr(op.attributes["lhs_dilation"]))
        return 2.0 * math.prod(_shape(op.results[0])) * math.prod(kernel) / outputs / spread
    return sum(inner)


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _length(condition: Any) -> int:
    """Length of a loop that JAX made of a scan: the constant that its counter is compared with."""
    compared = next(op for op in condition.blocks[0].operations if op.operation.name == "stablehlo.compare")
    constant = compared.operands[1].owner
    return int(np.array(ir.DenseElementsAttr(constant.attributes["value"])))


def shapes(spec: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), spec)


def build_any(config: Config) -> Program:
    """Like `build`; also with labels that are numbers, one for each class."""
    spec = batch_spec(config)
    if config.task.name in ("regress", "multilabel"):
        size = (config.batch_size, config.model.num_classes)
        spec["label"] = jax.ShapeDtypeStruct(size, np.float32)
    return program.build(config, mesh.make_mesh(config, jax.devices()[:1]), spec)


def loss_of(part: Program, count: Callable[..., float], differentiate: bool = False) -> float:
    """FLOPs that `count` finds in the training loss, or in its gradient by the trained parameters."""
    task, key = tasks.make(part.config), jax.random.key(0)

    def loss(trained: Any, frozen: Any, rest: Any, batch: Any) -> Any:
        with mesh.plain():
            params = optim.join(trained, frozen)
            outputs, _ = part.model.apply(params, rest, batch, key=key, train=True)
            return task.terms(outputs, batch, True)["loss"][0]

    function = jax.grad(loss) if differentiate else loss
    parts = optim.split(part.config, shapes(part.state_spec["params"]))
    return count(function, *parts, shapes(part.state_spec["rest"]), shapes(part.batch_spec))


# ------------------------------------------------------------------------------- every task and family

CLASSES = {"task__name": "classify", "model__num_classes": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {}),
    "gpt-llama": (
        "gpt",
        {
            "model__kv_heads": 2,
            "model__mlp": "swiglu",
            "model__position": "rope",
            "model__tie_embeddings": False,
        },
    ),
    "gpt-unrolled": ("gpt", {"model__scan": False, "model__dropout": 0.1}),
    "gpt-remat": ("gpt", {"remat": "full"}),
    "gpt-classify": ("gpt", CLASSES),
    "gpt-regress": ("gpt", {"task__name": "regress", "model__num_classes": 1}),
    "gpt-multilabel": ("gpt", CLASSES | {"task__name": "multilabel"}),
    "moe": ("moe", {}),
    "moe-one-expert": ("moe", {"model__experts_per_token": 1}),
    "bert-next-sentence": ("bert", {}),
    "bert-classify": ("bert", CLASSES),
    "t5": ("t5", {}),
    "t5-classify": ("t5", CLASSES),
    "lstm": ("rnn", {}),
    "gru": ("rnn", {"model__cell": "gru", "model__dropout": 0.1}),
    "gru-classify": ("rnn", {"model__cell": "gru", **CLASSES}),
    "vit": ("vit", {}),
    "mlp": ("mlp", {"model__dropout": 0.2}),
    "cnn": ("cnn", {}),
    "alexnet": ("alexnet", {}),
    "vgg": ("vgg", {}),
    "resnet": ("resnet", {}),
    "inception-aux": ("inception", {"model__version": "v1", "model__aux": True}),
    "inception-v3-aux": ("inception", {"model__version": "v3", "model__aux": True}),
    "detector": ("detector", {}),
}


SLOW = {
    "gpt-unrolled", "gpt-remat", "gpt-multilabel", "moe-one-expert", "t5-classify", "gru", "gru-classify",
    "bert-classify", "alexnet", "vgg", "inception-aux", "inception-v3-aux", "bert-lora", "gpt-frozen",
    "gan-spectral", "gpt-codes",
}  # fmt: skip


def each(cases: dict[str, Any]) -> list[Any]:
    """The names of the cases, some of them for the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in cases]


@pytest.mark.parametrize("name", each(FAMILIES))
def test_training_is_three_times_the_forward_pass_that_xla_is_given(name):
    family, keys = FAMILIES[name]
    part = build_any(tiny(family, **keys))
    assert flops.model_flops(part) == 3 * loss_of(part, xla_flops)


@pytest.mark.parametrize("loss", ["softmax", "binary", "rating"])
@pytest.mark.parametrize("kind", ["mf", "ncf", "two_tower"])
def test_recommenders_count_every_pair_of_the_batch_that_the_loss_scores(kind, loss):
    keys = {"model.users": 64, "model.items": 32, "task.rank_loss": loss, "batch_size": 24, "microbatches": 1}
    try:
        config = config_lib.load(f"{ROOT}/configs/recommender.py:kind={kind}", keys)
    except InputError:
        pytest.skip("no such loss")
    part = build(config)
    assert flops.model_flops(part) == 3 * loss_of(part, xla_flops)
    if kind == "mf" and loss == "softmax":
        assert flops.model_flops(part) == 3 * 2 * 24 * 24 * config.model.width


def test_pieces_of_a_batch_have_fewer_pairs_and_a_search_knows():
    path = f"{ROOT}/configs/recommender.py:kind=mf"
    keys = {"model.users": 64, "model.items": 32, "task.rank_loss": "softmax", "batch_size": 32}
    one, four = (config_lib.load(path, {**keys, "microbatches": n}) for n in (1, 4))
    width = one.model.width
    assert flops.model_flops(build(one)) == 6 * 32 * 32 * width
    assert flops.model_flops(build(four)) == 4 * 6 * 8 * 8 * width
    counted = candidates._step_flops(one, candidates._on_one_device(one))
    assert [counted(n) for n in (8, 32, 64)] == pytest.approx([6 * n * n * width for n in (8, 32, 64)])
    linear = tiny("gpt")
    counted = candidates._step_flops(linear, candidates._on_one_device(linear))
    assert counted(24) == pytest.approx(3 * flops.model_flops(build(linear)))


WHOLE_GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gan": ("gan", {}),
    "gan-spectral": ("gan", {"model__norm": "spectral", "model__num_classes": 10}),
    "gan-penalty": ("gan", {"model__norm": "none", "task__gan_loss": "wgan-gp"}),
    "gpt-lora": ("gpt", {"lora__rank": 2, "lora__on": "/(attention|mlp)/"}),
    "bert-lora": ("bert", {"lora__rank": 2, "lora__on": "/attention/"}),
    "gpt-frozen": ("gpt", {"optim__freeze": "^/(embed|positions)/"}),
    "resnet-frozen": ("resnet", {"optim__freeze": "^/stem/"}),
    "gpt-codes": ("gpt", {"quantize__weights": "int8"}),
    "cnn-codes": ("cnn", {"quantize__weights": "int8", "quantize__on": "/hidden/"}),
}


@pytest.mark.parametrize("name", each(WHOLE_GRADIENTS))
def test_where_not_all_is_trained_the_gradient_itself_is_counted(name):
    family, keys = WHOLE_GRADIENTS[name]
    part = build(tiny(family, **keys))
    assert flops.model_flops(part) == loss_of(part, xla_flops, differentiate=True)
    if not name.startswith("gan"):
        assert flops.model_flops(part) < 3 * loss_of(part, xla_flops)


@pytest.mark.parametrize("keys", [{}, {"distill__hidden": 1.0}], ids=str)
def test_a_teacher_is_counted_once_and_forward(tmp_path, keys):
    teacher = saved(tmp_path / "teacher", tiny("cnn", data__name="digits"))
    part = build(tiny("cnn", model__width=8, data__name="digits", distill__teacher=str(teacher), **keys))
    if keys:
        assert flops.model_flops(part) == loss_of(part, xla_flops, differentiate=True)
        return
    alone = loss_of(build(tiny("cnn")), xla_flops)
    student = loss_of(build(tiny("cnn", model__width=8)), xla_flops)
    assert flops.model_flops(part) == 3 * student + alone


@pytest.mark.parametrize(
    ("window", "scan"),
    [(1, True), (4, True), (16, True), (40, True), pytest.param(4, False, marks=pytest.mark.slow)],
)
def test_of_a_window_its_keys_count(window, scan):
    config = tiny("gpt", model__window=window, model__scan=scan)
    m, tokens = config.model, config.batch_size * config.seq_len
    dense = 2 * m.depth * (4 * m.width**2 + 2 * m.width * m.mlp_width) + 2 * m.width * m.vocab_size
    attention = 4 * m.depth * m.width * min(window, 16)
    part = build(config)
    assert flops.model_flops(part) == pytest.approx(3 * tokens * (dense + attention))
    assert flops.gradient_flops(part) == pytest.approx(flops.model_flops(part))
    assert flops.by_formula(config) == pytest.approx(3 * (dense + attention))
    seen = sum(min(n + 1, window) for n in range(16)) / 16  # keys that a token sees, on average
    unseen = flops.masked_per_token(config) / (12 * m.depth * m.width)
    assert min(window, 16) - unseen == pytest.approx(seen, abs=0.5)


def test_the_gradients_own_count_is_xlas():
    for family in ("gpt", "cnn", "rnn"):
        part = build(tiny(family))
        assert flops.gradient_flops(part) == loss_of(part, xla_flops, differentiate=True), family


# ------------------------------------------------------------------------------- an attention kernel's call


def seen_blocks(length: int, rows: int, causal: bool, window: int) -> float:
    """The share of blocks of rows x rows in which some query sees some key."""
    at = np.arange(length)
    mask = np.ones((length, length), bool)
    if causal:
        mask = at[:, None] >= at[None]
    if window:
        mask &= at[:, None] - at[None] < window
    n = length // rows
    return float(mask.reshape(n, rows, n, rows).any((1, 3)).mean())


@pytest.mark.parametrize(
    ("causal", "window"), [(True, 0), (True, 128), (True, 300), (True, 700), (True, 1024), (False, 0)]
)
@pytest.mark.parametrize("part", ["fwd", "dq", "dkv"])
def test_a_splash_kernel_takes_the_blocks_that_its_mask_does_not_empty(part, causal, window):
    """The grids are those that the kernel's own code makes of the mask."""
    length, rows = 1024, 128
    mask = (
        masks.LocalMask((length, length), (window - 1, 0), 0) if window else masks.CausalMask((length,) * 2)
    )
    if not causal:
        mask = masks.FullMask((length, length))
    blocks = {f"block_{name}": rows for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * 4), head_shards=1, q_seq_shards=1, interpret=True,
        block_sizes=splash.BlockSizes(**blocks, block_kv_dkv_compute=rows),
    )  # fmt: skip
    grid = "x".join(map(str, getattr(kernel, f"{part}_mask_info").data_next.shape)).replace("x", ",")
    where = "jit(train_step)/sees_all/splash" if not causal else "jit(train_step)/splash"
    text = f"""HloModule m

ENTRY %main (g: s8[{grid}], q: bf16[2,4,1024,64]) -> bf16[2,4,1024,64] {{
  %g = s8[{grid}] parameter(0)
  %q = bf16[2,4,1024,64] parameter(1)
  ROOT %splash_{part} = bf16[2,4,1024,64] custom-call(%g, %q, %q, %q), custom_call_target="tpu_custom_call", metadata={{op_name="{where}"}}
}}
"""  # noqa: E501
    module = hlo.parse(text)
    products = {"fwd": 2, "dq": 3, "dkv": 4}[part]
    share = seen_blocks(length, rows, causal, window)
    expected = 2.0 * products * 2 * 4 * length * length * 64 * share
    got = costs_chip.attention_flops(module, "main", module.computations["main"][-1])
    assert got == pytest.approx(expected, rel=0.05 if window else 1e-9)


@pytest.mark.parametrize(("config", "share"), [
    ('"mask_type":"NO_MASK"', 1.0), ('"mask_type":"PADDING_CAUSAL"', 0.5),
    ('"mask_type":"CAUSAL","sliding_window_length":128', 0.125),
    ('"mask_type":"CAUSAL","sliding_window_length":1024', 0.5),
])  # fmt: skip
def test_cudnns_kernel_takes_what_its_mask_and_window_leave(config, share):
    text = f"""HloModule m

ENTRY %main (q: bf16[2,1024,4,64]) -> bf16[2,1024,4,64] {{
  %q = bf16[2,1024,4,64] parameter(0)
  ROOT %x = bf16[2,1024,4,64] custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={{{config}}}
}}
"""  # noqa: E501
    module = hlo.parse(text)
    got = costs_chip.attention_flops(module, "main", module.computations["main"][-1])
    assert got == pytest.approx(2.0 * 2 * 2 * 4 * 1024 * 1024 * 64 * share)
