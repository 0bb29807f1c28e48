"""FLOPs by hand, HLO by hand, the walk by hand; and memory as planned against memory as it lies there."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import pytest
from conftest import built, mesh_keys, random_batch, start, tiny

from bigmodel.plan import calibrate, costs_cpu, cpu_schedule, estimate, flops, hlo, machine, schedule, target
from bigmodel.plan import compiled as compiled_lib

# ---------------------------------------------------------------------------------- FLOPs, counted by hand

A = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 4 * 8 * 8  # a @ w


def test_flops_of_a_product():
    assert flops.count(lambda a, w: a @ w, A, W) == ONE


def test_flops_of_a_scan_count_every_iteration():
    def model(a, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), a, None, length=7)[0]

    assert flops.count(model, A, W) == 7 * ONE


def test_flops_of_nested_scans_multiply():
    def inner(a, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), a, None, length=3)[0]

    def model(a, w):
        return jax.lax.scan(lambda x, _: (inner(x, w), None), a, None, length=5)[0]

    assert flops.count(model, A, W) == 15 * ONE


def test_flops_of_a_gradient_are_two_products_more():
    assert flops.count(jax.value_and_grad(lambda a, w: ((a @ w) ** 2).sum(), (0, 1)), A, W) == 3 * ONE


def test_flops_of_remat_count_what_is_computed_again():
    def loss(wrap):
        layer = wrap(lambda a, w: jnp.sin(jnp.sin(a @ w) @ w))
        return jax.grad(lambda a, w: layer(a, w).sum(), (0, 1))

    assert flops.count(loss(lambda f: f), A, W) == 6 * ONE
    assert flops.count(loss(jax.checkpoint), A, W) == 8 * ONE


def test_flops_of_a_cond_are_the_costliest_branch_s():
    def model(a, w):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ w @ w, lambda: a @ w)

    assert flops.count(model, A, W) == 2 * ONE


@pytest.mark.parametrize(("groups", "by_hand"), [(1, 2 * 2 * 6 * 6 * 8 * 3 * 3 * 4), (2, 2304 * 9)])
def test_flops_of_a_convolution(groups, by_hand):
    """Out [2, 6, 6, 8], a 3 x 3 window over 4 channels; in two groups each output sees 2 of them."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    w = jax.ShapeDtypeStruct((3, 3, 4 // groups, 8), jnp.float32)

    def model(x, w):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=names, feature_group_count=groups
        )

    assert flops.count(model, x, w) == by_hand


def test_what_a_compiled_program_executes_is_counted_loops_as_run():
    def function(a, w):
        return jax.lax.scan(lambda a, _: (jnp.tanh(a @ w), None), a, None, length=5)[0]

    text = jax.jit(function).lower(jnp.ones((4, 8)), jnp.ones((8, 8))).compile().as_text()
    assert estimate.executed_flops(text, devices=3) == 3 * 5 * 2 * 4 * 8 * 8


def test_a_while_with_products_has_no_length():
    def model(a, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, a)

    with pytest.raises(ValueError, match="write it as a scan"):
        flops.count(model, A, W)


# ----------------------------------------------------------------------------------------------------- HLO


def module(text: str) -> hlo.Module:
    return hlo.parse(textwrap.dedent(text))


LOOP = """\
    HloModule loop

    %body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
      %p = (s32[], f32[4,8]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
      %by = s32[] constant(STEP)
      %next = s32[] add(%i, %by)
      %double = f32[4,8]{1,0} add(%x, %x)
      ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %double)
    }

    %condition (q: (s32[], f32[4,8])) -> pred[] {
      %q = (s32[], f32[4,8]{1,0}) parameter(0)
      %j = s32[] get-tuple-element(%q), index=0
      %bound = s32[] constant(BOUND)
      ROOT %less = pred[] compare(%j, %bound), direction=LT
    }

    ENTRY %main (a: f32[4,8]) -> f32[4,8] {
      %a = f32[4,8]{1,0} parameter(0)
      %zero = s32[] constant(0)
      %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
      %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
      ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
    }
"""


def loop(bound: int, step: int) -> hlo.Module:
    return module(LOOP.replace("BOUND", str(bound)).replace("STEP", str(step)))


@pytest.mark.parametrize(("bound", "step", "times"), [(12, 1, 12), (12, 3, 4), (13, 3, 5), (1, 1, 1)])
def test_a_loop_s_length_is_read_from_its_condition_and_its_step(bound, step, times):
    found = loop(bound, step)
    assert found.trip_count(found.tables["main"]["loop"]) == times


UNROLLED = """\
    HloModule m

    %body (p: (f32[4,8], u32[], u32[])) -> (f32[4,8], u32[], u32[]) {
      %p = (f32[4,8]{1,0}, u32[], u32[]) parameter(0)
      %x = f32[4,8]{1,0} get-tuple-element(%p), index=0
      %i = u32[] get-tuple-element(%p), index=1
      %kept = u32[] get-tuple-element(%p), index=2
      %one = u32[] constant(1)
      %next = u32[] add(%i, %one)
      %after = u32[] add(%next, %one)
      %copied = u32[] copy(%after)
      ROOT %out = (f32[4,8]{1,0}, u32[], u32[]) tuple(%x, %copied, %kept)
    }

    %condition (q: (f32[4,8], u32[], u32[])) -> pred[] {
      %bound = u32[] constant(8)
      %q = (f32[4,8]{1,0}, u32[], u32[]) parameter(0)
      %j = u32[] get-tuple-element(%q), index=1
      ROOT %less = pred[] compare(%j, %bound), direction=LT
    }

    ENTRY %main (a: f32[4,8]) -> f32[4,8] {
      %a = f32[4,8]{1,0} parameter(0)
      %zero = u32[] constant(0)
      %start = (f32[4,8]{1,0}, u32[], u32[]) tuple(%a, %zero, %zero)
      %loop = (f32[4,8]{1,0}, u32[], u32[]) while(%start), condition=%condition, body=%body
      ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=0
    }
"""


def test_a_loop_that_the_compiler_unrolled_twice_runs_half_as_often():
    """A windowed product over the tensor axis does so; its counter is not the first that it carries."""
    found = module(UNROLLED)
    assert found.trip_count(found.tables["main"]["loop"]) == 4


def test_a_loop_s_known_length_is_believed():
    found = module(
        LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
        .replace("BOUND", "12").replace("STEP", "1")
    )  # fmt: skip
    assert found.trip_count(found.tables["main"]["loop"]) == 9


def test_tuples_and_calls_that_span_lines_are_read():
    found = module("""\
        HloModule m

        ENTRY %main (a: bf16[2,3], b: s4[8]) -> (bf16[2,3], f32[]) {
          %a = bf16[2,3]{1,0} parameter(0)
          %b = s4[8]{0} parameter(1)
          %k = (bf16[2,3]{1,0:T(8,128)S(1)}, f32[]) custom-call(%a, %b), custom_call_target="kernel", metadata={op_name="a {
        }
        b"}
          ROOT %r = (bf16[2,3]{1,0}, f32[]) tuple(%k, %k)
        }
    """)  # noqa: E501
    call = found.tables["main"]["k"]
    assert call.opcode == "custom-call"
    assert call.target == "kernel"
    assert call.operands == ("a", "b")
    assert [(s.dtype, s.dims, s.space) for s in call.shapes] == [("bf16", (2, 3), 1), ("f32", (), 0)]
    assert call.bytes == 2 * 3 * 2 + 4
    assert found.tables["main"]["b"].bytes == 4


def test_flops_of_dots_and_convolutions_in_hlo():
    """A 3 x 3 window with a padding of 1 over 5 x 5: a corner of it falls outside at every edge."""
    found = module("""\
        HloModule m

        ENTRY %main (a: f32[2,4,8], b: f32[2,8,16], x: f32[2,5,5,4], w: f32[3,3,4,8]) -> f32[2,5,5,8] {
          %a = f32[2,4,8]{2,1,0} parameter(0)
          %b = f32[2,8,16]{2,1,0} parameter(1)
          %x = f32[2,5,5,4]{3,2,1,0} parameter(2)
          %w = f32[3,3,4,8]{3,2,1,0} parameter(3)
          %d = f32[2,4,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
          ROOT %c = f32[2,5,5,8]{3,2,1,0} convolution(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
        }
    """)  # noqa: E501
    table = found.tables["main"]
    assert found.instruction_flops("main", table["d"]) == 2 * 2 * 4 * 16 * 8
    assert found.instruction_flops("main", table["c"]) == 2 * 2 * 8 * 4 * (3 * 5 - 2) ** 2


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="it has no ENTRY"):
        hlo.parse("hello")


# ------------------------------------------------------------------------------------------------- the walk


class Fixed:
    """An addition takes 1 s, a collective 5 s."""

    def compute_s(self, module, computation, i, kind, flops):
        return 1.0 if i.opcode == "add" and i.shapes[0].dims else 0.0

    def transfer_s(self, transfer):
        return 5.0

    def stream(self, transfer):
        return "network"


@pytest.mark.parametrize(("between", "exposed_s"), [(0, 5.0), (2, 3.0), (7, 0.0)])
def test_compute_hides_an_async_collective(between, exposed_s):
    adds = "\n".join(f"  %x{n} = f32[4,8]{{1,0}} add(%a, %a)" for n in range(between))
    found = hlo.parse(
        "HloModule m\n\nENTRY %main (a: f32[4,8]) -> f32[4,8] {\n"
        "  %a = f32[4,8]{1,0} parameter(0)\n"
        "  %s = f32[4,8]{1,0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}, to_apply=%sum\n"
        f"{adds}\n"
        "  ROOT %d = f32[4,8]{1,0} all-reduce-done(%s)\n}\n"
    )
    plan = schedule.walk(found, Fixed())
    transfer = next(e for e in plan.events if e.kind == "all-reduce")
    assert plan.total_s == max(between, 5)
    assert transfer.exposed_s == exposed_s
    assert transfer.group == (0, 1)
    assert transfer.bytes == 4 * 8 * 4
    assert sum(plan.breakdown().values()) == plan.total_s


def test_a_loop_s_body_counts_as_often_as_it_runs():
    plan = schedule.walk(loop(12, 3), Fixed())
    assert plan.total_s == 4.0
    assert [(e.name, e.times) for e in plan.events] == [("double", 4)]


# -------------------------------------------------------------------------------------------- this machine


def rates(**changes) -> calibrate.Calibration:
    """A machine of round figures: 1 GFLOP/s, 1 GB/s, 1 ns an operation."""
    products = tuple(
        calibrate.Product("float32", "nn", 1, m, m, m, 2e-9 * m**3, 4e-9 * m**3) for m in (16, 64, 256, 1024)
    )
    line = ((1e3, 1e-6), (1e9, 1.0))
    kinds = ("add", "divide", "sqrt", "exponential", "log", "tanh", "cosine", "power")
    elements = dict.fromkeys(kinds, 1e-9)
    made = calibrate.Calibration(
        "here", products, line, line, line, line, elements, 1e-9, 0.0, 0.0, {"all-reduce": line}
    )
    return dataclasses.replace(made, **changes)


def test_a_calibration_survives_its_file(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setattr(calibrate, "measure", lambda key: rates(key=key))
    first = calibrate.load(tmp_path)
    monkeypatch.setattr(calibrate, "measure", lambda key: pytest.fail("measured again"))
    assert calibrate.load(tmp_path) == first
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    monkeypatch.setattr(calibrate, "measure", lambda key: rates(key=key))
    assert calibrate.load(tmp_path) == first


def test_cpu_costs_are_the_measured_speeds():
    costs = costs_cpu.CpuCosts(rates())
    assert costs.product_s("float32", "nn", 1, 100, 200, 300) == pytest.approx((2e-9 * 6e6, 4e-9 * 6e6))
    found = loop(12, 1)
    double = found.tables["body"]["double"]
    moved_s = 3 * 4 * 8 * 4 * 1e-9
    assert costs.compute_s(found, "body", double, "memory", 0.0) == pytest.approx(moved_s)
    assert costs.compute_s(found, "body", double, "optimizer", 0.0) == pytest.approx(moved_s * 2 / 3)
    assert costs.transfer_s(schedule.Transfer("all-reduce", 1e6)) == pytest.approx(1e-3)


def test_devices_take_turns_on_the_cores(monkeypatch):
    monkeypatch.setattr(calibrate, "cores", lambda: 2)
    found = loop(12, 1)
    double = found.tables["body"]["double"]
    one, eight = (costs_cpu.CpuCosts(rates(), n).seconds(found, "body", double, "memory") for n in (1, 8))
    assert eight.alone == pytest.approx(max(4 * one.one_core, 8 * one.memory))


NOTHING = costs_cpu.Seconds(0.0, 0.0)


@dataclasses.dataclass
class Cores:
    """Two cores; an addition and a subtraction take what is said."""

    add: costs_cpu.Seconds
    subtract: costs_cpu.Seconds = NOTHING
    share: float = 2.0

    def seconds(self, module, computation, i, kind):
        return {"add": self.add, "subtract": self.subtract}.get(i.opcode, NOTHING)

    def transfer_s(self, transfer):
        return 5.0


def sequence(*lines: str) -> hlo.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(
        "HloModule m\n\nENTRY %main (a: f32[4,8]) -> f32[4,8] {\n"
        f"  %a = f32[4,8]{{1,0}} parameter(0)\n{body}\n"
        "  ROOT %r = f32[4,8]{1,0} bitcast(%a)\n}\n"
    )


def alike(n: int) -> hlo.Module:
    return sequence(*(f"%x{k} = f32[4,8]{{1,0}} add(%a, %a)" for k in range(n)))


SINGLE, SPREAD = costs_cpu.Seconds(1.0, 1.0), costs_cpu.Seconds(1.0, 2.0)


@pytest.mark.parametrize(
    ("n", "each", "total_s"),
    [
        (8, SINGLE, 8.0),  # a short sequence runs in its order
        (10, SINGLE, 6.0),  # nine wait: the worker keeps five more, a second takes four
        (10, SPREAD, 10.0),  # the pool takes one after another, with both cores
        (10, costs_cpu.Seconds(1.0, 1.0, 1.0), 10.0),  # each wants all of the memory's bandwidth
        (10, costs_cpu.Seconds(1.0, 1.0, 0.5), 6.0),  # half of it is enough
    ],
)
def test_kernels_share_the_cores(n, each, total_s):
    plan = cpu_schedule.run(alike(n), Cores(each))
    assert plan.total_s == pytest.approx(total_s)
    assert sum(plan.breakdown().values()) == pytest.approx(total_s)


def test_what_the_pool_runs_takes_the_cores_that_are_left():
    """5 s of both cores, or 10 s of one, beside a chain of nine that takes 9 s of the other."""
    chain = [f"%x{k} = f32[4,8]{{1,0}} add(%{f'x{k - 1}' if k else 'a'}, %a)" for k in range(9)]
    found = sequence("%big = f32[4,8]{1,0} subtract(%a, %a)", *chain)
    plan = cpu_schedule.run(found, Cores(SINGLE, costs_cpu.Seconds(5.0, 10.0)))
    assert plan.total_s == pytest.approx(9 + 5 * (1 - 9 / 10))
    big = next(e for e in plan.events if e.name == "big")
    assert (big.start_s, big.duration_s) == pytest.approx((0.0, plan.total_s))
    assert big.stream != next(e for e in plan.events if e.name == "x0").stream


def test_a_loop_of_kernels_counts_as_often_as_it_runs():
    plan = cpu_schedule.run(loop(12, 3), Cores(SINGLE))
    assert plan.breakdown() == {"memory": pytest.approx(plan.total_s)}
    assert [(e.name, e.times) for e in plan.events if e.name == "double"] == [("double", 4)]


# -------------------------------------------------------------------------------------------------- memory

CASES = [
    *[("gpt", {"remat": r}) for r in ("none", "full", "minimal", "dots")],
    *[
        ("gpt", mesh_keys(m))
        for m in ({"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"fsdp": 4, "tensor": 2})
    ],
    *[("cnn", mesh_keys(m)) for m in ({"data": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})],
]


@pytest.mark.parametrize(
    ("compiler", "host", "peak"), [("cpu", 0, 17), ("libtpu", 0, 14), ("libtpu", 6, 17)], ids=str
)
def test_what_lies_on_the_host_is_none_of_the_device_s_memory(compiler, host, peak):
    """A TPU compiler's peak counts both memories: with offloading, only all that was allocated is a bound."""
    made = compiled_lib.Compiled("", 10, 10, 8, 5, 14, host)
    assert estimate.peak_bytes(made, compiler) == peak


@pytest.mark.slow
@pytest.mark.parametrize(("family", "keys"), CASES, ids=str)
def test_planned_bytes_are_live_bytes(family, keys):
    program = built(family, **keys)
    compiled = program.compile()
    here = target.here(tuple(program.mesh.devices.flat))
    planned = estimate.memory(program, compiled_lib.of(compiled), machine.of(here))
    state, batch = start(program), program.put(random_batch(program.config))
    live = device_bytes(state)
    assert planned["state_bytes"] == pytest.approx(live, rel=0.02)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments == pytest.approx(live + device_bytes(batch), rel=0.02)
    state, metrics = compiled(state, batch)
    outputs = compiled.memory_analysis().output_size_in_bytes
    pointers = 8 * len(jax.tree.leaves((state, metrics)))  # XLA counts the table of a result's parts too
    assert outputs == pytest.approx(device_bytes(state) + device_bytes(metrics) + pointers, rel=0.02)


def device_bytes(tree) -> int:
    """Bytes that the first device holds of arrays."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.device == first
    )


def test_every_remat_policy_plans_the_same_state():
    sizes = {estimate.tree_bytes(built("gpt", remat=r).state_spec) for r in ("none", "full", "offload-all")}
    assert len(sizes) == 1
    assert tiny("gpt").remat == "none"
