"""Transfers between chips: which HLO moves how much, and how long that takes."""

from __future__ import annotations

import itertools
import textwrap
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny

from bigmodel import mesh
from bigmodel.machines import chips
from bigmodel.plan import candidates, costs_cpu, hlo, machine, schedule
from bigmodel.plan.schedule import Costs, Transfer
from bigmodel.plan.target import Target, _unravel

BYTES = 2.0**30


class Places:
    """A mesh's devices, as `Machine.costs` asks for them."""

    def __init__(self, count: int) -> None:
        self.devices = np.arange(count)


def costs(chip: str, *shape: int, slices: int = 1) -> Costs:
    """Costs on a slice of TPUs, or on hosts x GPUs, with devices in the order of their places."""
    known = chips.BY_NAME[chip]
    count = int(np.prod(shape)) * slices
    aim = Target(chip, known, tuple(range(count)), shape, slices, "analytic")
    mesh_like: Any = Places(count)
    return machine.of(aim).costs(mesh_like, "bfloat16")


def seconds(on: Costs, kind: str, group: tuple[int, ...] = ()) -> float:
    return on.transfer_s(Transfer(kind, BYTES, group))


# ------------------------------------------------------------------------------------------ all to all


def worst_link(shape: tuple[int, ...], closed: tuple[bool, ...], members: list[int]) -> float:
    """The bytes that pass the busiest link, one way, when each member sends every other its share of one
    byte, along shortest paths, dimension by dimension; a path of half a ring is shared by both ways."""
    load: dict[tuple[Any, ...], float] = {}
    for a, b in itertools.permutations(members, 2):
        here, there = list(_unravel(a, shape)), _unravel(b, shape)
        for d, size in enumerate(shape):
            ahead = (there[d] - here[d]) % size if closed[d] else there[d] - here[d]
            ways = [(1, ahead)] if ahead >= 0 else [(-1, -ahead)]
            if closed[d]:
                ways = [(1, ahead)] if 2 * ahead < size else [(-1, size - ahead)]
                ways = [(1, ahead), (-1, ahead)] if 2 * ahead == size else ways
            for sign, hops in ways:
                at = list(here)
                for _ in range(hops):
                    key = (tuple(at), d, sign)
                    load[key] = load.get(key, 0.0) + 1 / len(members) / len(ways)
                    at[d] = (at[d] + sign) % size
            here[d] = there[d]
    return max(load.values())


@pytest.mark.parametrize(
    ("chip", "shape", "closed"),
    [
        ("v5e", (16, 1), (True, False)),
        ("v5e", (8, 1), (False, False)),
        ("v5e", (2, 1), (False, False)),
        ("v5e", (4, 8), (False, False)),
        ("v6e", (16, 16), (True, True)),
        ("v5p", (4, 4, 4), (True, True, True)),
        ("v5p", (8, 1, 1), (True, False, False)),
        ("v4", (2, 2, 4), (False, False, True)),
    ],
)
def test_an_all_to_all_takes_what_its_busiest_link_takes(chip, shape, closed):
    """Every byte is sent over the torus's links, one by one."""
    on = costs(chip, *shape)
    link = chips.BY_NAME[chip].link_bytes_per_s
    expected = BYTES * worst_link(shape, closed, list(range(int(np.prod(shape))))) / link
    assert seconds(on, "all-to-all") == pytest.approx(expected, rel=0.02)
    assert seconds(on, "ragged-all-to-all") == seconds(on, "all-to-all")


@pytest.mark.parametrize(("chip", "n"), [("v5e", 16), ("v6e", 16), ("v5p", 4), ("v5p", 8), ("v5p", 16)])
def test_on_a_full_ring_of_n_it_is_n_over_four_all_gathers(chip, n):
    """The scaling book's 1/4 is of the global array, n times what a device has."""
    on = costs(chip, n, *[1] * (chips.BY_NAME[chip].dimensions - 1))
    gathered = seconds(on, "all-gather") * n / (n - 1)  # the book's all-gather leaves no own part out
    assert seconds(on, "all-to-all") / gathered == pytest.approx(n / 4, rel=0.01)


def test_groups_that_lie_between_each_other_share_the_links():
    on = costs("v5e", 16, 1)
    near, far = tuple(range(4)), tuple(range(0, 16, 4))
    assert seconds(on, "all-to-all", near) == pytest.approx(BYTES / 45e9, rel=0.01)  # a line of four
    assert seconds(on, "all-to-all", far) == pytest.approx(2 * BYTES / 45e9, rel=0.01)  # a ring, all of it


def test_on_nvswitch_it_takes_what_an_all_gather_takes():
    """NCCL on 8 H100s, measured: 1.06 times an all-gather of the same bytes a device."""
    for chip, n in (("h100", 8), ("h100", 4), ("a100-80", 8), ("b200", 8)):
        on = costs(chip, 1, n)
        ratio = seconds(on, "all-to-all") / seconds(on, "all-gather")
        assert ratio == pytest.approx(1.06, rel=0.1)


def test_between_hosts_and_slices_every_device_sends_its_own_part():
    on = costs("h100", 4, 8)
    across = BYTES * 24 / 32 / (50e9 * 0.8)
    inside = BYTES * 7 / 32 / (450e9 * 0.8)
    assert seconds(on, "all-to-all") == pytest.approx(across + inside, rel=0.01)
    on = costs("v5e", 4, 4, slices=2)
    alone = seconds(costs("v5e", 4, 4), "all-to-all")
    assert seconds(on, "all-to-all") == pytest.approx(BYTES / 2 / 6.25e9 + alone / 2, rel=0.01)


def test_no_collective_is_free_on_any_chip():
    for chip in chips.BY_NAME.values():
        on = costs(chip.name, *[4] * (chip.dimensions or 2))
        for kind in hlo.COLLECTIVES:
            least = BYTES / (8 * chip.link_bytes_per_s)
            assert seconds(on, kind) > least, (chip.name, kind)
        with pytest.raises(KeyError):
            seconds(on, "all-to-some")
    measured: Any = costs_cpu.CpuCosts.__new__(costs_cpu.CpuCosts)
    line = ((1e3, 1e-6), (1e9, 1.0))
    measured.c = type(
        "Measured", (), {"collectives": {"all-gather": line, "all-to-all": ((1e3, 2e-6), (1e9, 2.0))}}
    )
    assert [measured.transfer_s(Transfer(kind, 1e6)) for kind in ("ragged-all-to-all", "all-gather")] == [
        pytest.approx(2e-3), pytest.approx(1e-3),
    ]  # fmt: skip


def test_a_mixture_moves_every_token_to_each_of_its_experts():
    one, two = (
        tiny("moe", model__experts_per_token=k, mesh__data=1, mesh__expert=4, compute_dtype="bfloat16")
        for k in (1, 2)
    )
    devices = mesh.make_mesh(one, jax.devices()[:4])

    class Seen:
        def transfer_s(self, transfer: Transfer) -> float:
            return transfer.bytes if transfer.kind == "all-to-all" else 0.0

    resident = candidates._Resident(0.0, 0.0)
    moved = [candidates._moved(c, devices, Seen(), resident)[1] for c in (one, two)]
    tokens = one.batch_size * one.seq_len / 4
    assert moved == [4 * one.model.depth * tokens * one.model.width * 2 * k for k in (1, 2)]


# ----------------------------------------------------------------------------------- which HLO moves what


class Seen:
    """A second for every byte that moves; the transfers that were asked for."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []

    def compute_s(self, module: Any, computation: str, i: Any, kind: str, flops: float) -> float:
        return 0.0

    def transfer_s(self, transfer: Transfer) -> float:
        self.transfers.append(transfer)
        return transfer.bytes

    def stream(self, transfer: Transfer) -> str:
        return "network"


def walk(lines: str) -> tuple[schedule.Schedule, list[Transfer]]:
    """A program of these lines over a [2, 4] and b [8, 4], float32."""
    text = "\n".join(f"  {line.strip()}" for line in lines.strip().split("\n"))
    seen = Seen()
    head = "HloModule m\n\nENTRY %main (a: f32[2,4], b: f32[8,4]) -> f32[2,4] {\n"
    head += "  %a = f32[2,4]{1,0} parameter(0)\n  %b = f32[8,4]{1,0} parameter(1)\n"
    plan = schedule.walk(hlo.parse(f"{head}{text}\n}}\n"), seen)
    return plan, seen.transfers


GROUPS = "replica_groups={{0,1,2,3}}"
PAIRS = '_xla_send_recv_source_target_pairs="{{0,1},{1,2}}"'
A, B = 2 * 4 * 4, 8 * 4 * 4


@pytest.mark.parametrize(
    ("lines", "kind", "size"),
    [
        (f"ROOT %x = f32[8,4]{{1,0}} all-gather(%a), {GROUPS}, dimensions={{0}}", "all-gather", B),
        (
            f"""%s = (f32[2,4]{{1,0}}, f32[8,4]{{1,0}}) all-gather-start(%a), {GROUPS}
            ROOT %x = f32[8,4]{{1,0}} all-gather-done(%s)""",
            "all-gather", B,
        ),
        (
            f"""%s = ((f32[2,4], f32[2,4]), (f32[8,4], f32[8,4])) all-gather-start(%a, %a), {GROUPS}
            ROOT %x = (f32[8,4], f32[8,4]) all-gather-done(%s)""",
            "all-gather", 2 * B,
        ),
        (f"ROOT %x = f32[2,4]{{1,0}} reduce-scatter(%b), {GROUPS}, to_apply=%sum", "reduce-scatter", B),
        (f"ROOT %x = f32[8,4]{{1,0}} all-to-all(%b), {GROUPS}, dimensions={{0}}", "all-to-all", B),
        (
            f"ROOT %x = (f32[2,4]{{1,0}}, f32[2,4]{{1,0}}) all-to-all(%a, %a), {GROUPS}",
            "all-to-all", 2 * A,
        ),
        (
            f"""%n = s32[4]{{0}} constant({{2,2,2,2}})
            ROOT %x = f32[8,4]{{1,0}} ragged-all-to-all(%a, %b, %n, %n, %n, %n), {GROUPS}""",
            "ragged-all-to-all", A,
        ),
        (f"ROOT %x = f32[2,4]{{1,0}} collective-broadcast(%a), {GROUPS}", "collective-broadcast", A),
        (
            "ROOT %x = f32[2,4]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}",
            "collective-permute", A,
        ),
        (
            f"""%t = token[] after-all()
            %r = (f32[2,4], u32[], token[]) recv(%t), channel_id=1, frontend_attributes={{{PAIRS}}}
            %s = (f32[2,4], u32[], token[]) send(%a, %r), channel_id=1, frontend_attributes={{{PAIRS}}}
            %d = token[] send-done(%s), channel_id=1
            ROOT %x = (f32[2,4], token[]) recv-done(%r), channel_id=1""",
            "collective-permute", A,
        ),
        (
            """%t = token[] after-all()
            %s = (f32[2,4]{1,0}, u32[], token[]) send(%a, %t), channel_id=1, is_host_transfer=true
            ROOT %d = token[] send-done(%s), channel_id=1, is_host_transfer=true""",
            "offload", A,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)  # fmt: skip
def test_every_collective_moves_its_bytes(lines, kind, size):
    plan, transfers = walk(lines)
    assert [(t.kind, t.bytes) for t in transfers if t.bytes] == [(kind, size)]
    assert plan.total_s == size
    assert plan.breakdown()["communication"] == size


def test_an_async_collective_is_waited_for_where_it_ends():
    """Also through an update, and inside a wrapper."""
    text = """
        HloModule m

        %wrapped (p: f32[8,4]) -> f32[8,4] {
          %p = f32[8,4]{1,0} parameter(0)
          ROOT %x = f32[8,4]{1,0} all-to-all(%p), replica_groups={{0,1,2,3}}, dimensions={0}
        }

        ENTRY %main (b: f32[8,4]) -> f32[8,4] {
          %b = f32[8,4]{1,0} parameter(0)
          %s = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]) async-start(%b), calls=%wrapped
          %u = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]) async-update(%s)
          ROOT %x = f32[8,4]{1,0} async-done(%u)
        }
        """
    seen = Seen()
    plan = schedule.walk(hlo.parse(textwrap.dedent(text)), seen)
    assert seen.transfers == [Transfer("all-to-all", B, (0, 1, 2, 3))]
    assert plan.total_s == B


def test_a_collective_that_nobody_knows_is_no_plan():
    for attribute in (GROUPS, "source_target_pairs={{0,1}}"):
        with pytest.raises(ValueError, match="x: the collective all-to-some has no price"):
            walk(f"ROOT %x = f32[2,4]{{1,0}} all-to-some(%a), {attribute}")
