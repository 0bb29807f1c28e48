"""What is counted while a run goes on: joules by the machine's counters, the memory of the process."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bigmodel import energy
from bigmodel.ledger import Ledger, ProcessMemory


@pytest.fixture
def rapl(tmp_path):
    """Two CPU packages; the first has a part of its own, which must not count twice."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("5000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
    return tmp_path


def test_a_meter_adds_packages_and_survives_a_counter_that_starts_anew(rapl):
    meter = energy.Meter(jax.devices()[:1], rapl)
    assert meter.joules() == 0
    (rapl / "intel-rapl:0/energy_uj").write_text("90000000")
    (rapl / "intel-rapl:0:0/energy_uj").write_text("70000000")
    assert meter.joules() == pytest.approx(85)
    (rapl / "intel-rapl:0/energy_uj").write_text("2000000")
    (rapl / "intel-rapl:1/energy_uj").write_text("6000000")
    assert meter.joules() == pytest.approx(85 + 12 + 1)


def test_without_a_counter_there_are_no_joules(tmp_path):
    assert energy.Meter(jax.devices()[:1], tmp_path).joules() is None


def test_a_run_s_joules_are_counted_or_modelled_and_say_so(rapl, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path / "nothing")
    ledger = Ledger()
    ledger.watch(jax.devices()[:1])
    ledger.steps, ledger.seconds["step"] = 10, 5.0
    watts, _ = energy.watts(jax.devices()[:1])
    report = ledger.report(1.0)
    assert report["step_j"] == pytest.approx(watts * 0.5)
    assert report["joules_from"].startswith("modelled")

    monkeypatch.setattr(energy, "RAPL", rapl)
    ledger = Ledger()
    ledger.watch(jax.devices()[:1])
    ledger.steps = 10
    with ledger.timing("eval"):
        (rapl / "intel-rapl:0/energy_uj").write_text("15000000")
    (rapl / "intel-rapl:1/energy_uj").write_text("45000000")
    report = ledger.report(1.0)
    assert (report["joules"], report["step_j"]) == (pytest.approx(50), pytest.approx(4))
    assert report["joules_from"].startswith("measured")


def test_the_memory_that_a_process_takes_is_seen_and_what_it_held_before_is_not():
    before = np.ones(2**25)
    memory = ProcessMemory()
    memory.begin(held_bytes=0)
    taken = np.ones(2**25)  # 256 MiB, touched
    memory.end()
    assert memory.peak_bytes == pytest.approx(taken.nbytes, rel=0.05)
    assert before.sum() == taken.sum() == 2**25
