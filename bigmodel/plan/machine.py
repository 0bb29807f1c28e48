"""Machines: what a plan asks of hardware, be it a TPU, a GPU, this CPU or a chip that is not listed."""

from __future__ import annotations

import abc
from typing import NamedTuple

from jax.sharding import Mesh

from bigmodel import disk
from bigmodel.machines import energy
from bigmodel.plan import calibrate, cpu_schedule, flops, hlo, schedule
from bigmodel.plan.calibrate import Calibration
from bigmodel.plan.compiled import Compiled
from bigmodel.plan.costs_chip import ChipCosts, GpuCosts, TpuCosts
from bigmodel.plan.costs_cpu import CpuCosts
from bigmodel.plan.schedule import Costs, Event, Schedule
from bigmodel.plan.target import Target
from bigmodel.program import Program

GUESSED_EFFICIENCY = 0.45  # of a lone matrix product's speed, for a step: 0.3-0.7 was measured on CPUs


class TimeSource(NamedTuple):
    """Where a planned time is from, and by what share of it a plan may be off."""

    name: str
    uncertainty: float
    text: str


LIBTPU = TimeSource("libtpu", 0.12, "libtpu's own schedule")
CUDA = TimeSource("cuda", 0.3, "the CUDA compiler's own schedule; efficiencies not calibrated on a GPU")
ANALYTIC = TimeSource(
    "analytic",
    0.4,
    "ANALYTIC: the CPU compiler's partitioned program, as the target's compiler is not installed "
    "(pip install -e '.[plan]'); memory is the CPU's too",
)
CPU = TimeSource("cpu", 0.25, "this machine's own schedule and microbenchmark")
GUESS = TimeSource(
    "guess", 0.6, "a guess from one matrix product measured here; plan.py --target=cpu calibrates"
)
SOURCES = {source.name: source for source in (LIBTPU, CUDA, ANALYTIC)}  # by Target.compiler


class Machine(abc.ABC):
    """The hardware of a target."""

    def __init__(self, target: Target) -> None:
        self.target, self.chip = target, target.chip

    @property
    def capacity_bytes(self) -> float | None:
        """Bytes of one device that a program may use; None: not known (a CPU shares its host's memory)."""
        return self.chip.memory_bytes - self.chip.reserved_bytes if self.chip.memory_bytes else None

    def watts(self) -> tuple[float, str]:
        """Watts of one chip under load, and their source."""
        total, source = energy.watts(self.target.devices)
        return total / self.target.chips, source

    @abc.abstractmethod
    def costs(self, mesh: Mesh, dtype: str) -> Costs:
        """Seconds of instructions and transfers, at matrix products in `dtype`."""

    @abc.abstractmethod
    def flops_per_s(self, mesh: Mesh, dtype: str) -> float:
        """FLOP/s of one device that a training step's products reach, for a closed form."""

    @abc.abstractmethod
    def step(self, program: Program, compiled: Compiled, calibrated: bool) -> tuple[Schedule, TimeSource]:
        """One step of a compiled program, walked through the compiler's schedule.

        Args:
            calibrated: measure a CPU now if it never was (under 30 s); otherwise guess from a matrix product.
        """


class _Listed(Machine):
    """A chip with figures."""

    COSTS: type[ChipCosts]

    def costs(self, mesh: Mesh, dtype: str) -> ChipCosts:
        return self.COSTS(self.target, mesh, dtype)

    def watts(self) -> tuple[float, str]:
        return self.chip.watts, "under load, with its share of the host"

    def flops_per_s(self, mesh: Mesh, dtype: str) -> float:
        return self.chip.flops[dtype] * self.COSTS.EFFICIENCY.matmul * 0.8

    def step(self, program: Program, compiled: Compiled, calibrated: bool) -> tuple[Schedule, TimeSource]:
        costs = self.costs(program.mesh, program.config.compute_dtype)
        return schedule.walk(hlo.parse(compiled.text), costs), SOURCES[self.target.compiler]


class Tpu(_Listed):
    COSTS = TpuCosts


class Gpu(_Listed):
    COSTS = GpuCosts


class Cpu(Machine):
    """This machine's CPU, whose forced devices share its cores."""

    def costs(self, mesh: Mesh, dtype: str) -> CpuCosts:
        return CpuCosts(calibrate.load(disk.cache_dir()), mesh.size)

    def flops_per_s(self, mesh: Mesh, dtype: str) -> float:
        products = calibrate.load(disk.cache_dir()).products
        return max(2.0 * p.batch * p.m * p.k * p.n / p.seconds for p in products) * 0.6 / mesh.size

    def step(self, program: Program, compiled: Compiled, calibrated: bool) -> tuple[Schedule, TimeSource]:
        measured = (calibrate.load if calibrated else calibrate.known)(disk.cache_dir())
        if measured is None:
            hosts = {device.process_index for device in program.mesh.devices.flat}
            return _guess(program, len(hosts)), GUESS
        return self.walk(compiled.text, program.mesh, measured), CPU

    def walk(self, text: str, mesh: Mesh, measured: Calibration) -> Schedule:
        """One call of a compiled program, by a calibration."""
        walked = cpu_schedule.run(hlo.parse(text), CpuCosts(measured, mesh.size))
        return Schedule(walked.total_s + measured.call_s, walked.events)


class Unlisted(Cpu):
    """A chip of which nothing is known: a step is guessed, transfers cost what they cost on this CPU."""

    def step(self, program: Program, compiled: Compiled, calibrated: bool) -> tuple[Schedule, TimeSource]:
        return _guess(program, program.mesh.size), GUESS


def _guess(program: Program, devices: int) -> Schedule:
    """A step as one event. Args: devices: how many work at once; CPU devices share their host's cores."""
    speed = calibrate.matmul_flops(program.config.compute_dtype) * devices
    seconds = flops.model_flops(program) / (speed * GUESSED_EFFICIENCY)
    return Schedule(seconds, (Event("step", "matmul", "compute", 0.0, seconds, 1, seconds),))


KINDS: dict[str, type[Machine]] = {"tpu": Tpu, "gpu": Gpu}


def of(target: Target) -> Machine:
    """The machine that a target is made of."""
    if target.chip.platform == "cpu":
        return Cpu(target)
    return KINDS[target.chip.platform](target) if target.chip.flops else Unlisted(target)
