"""Every case of scripts/bench/bench.py with every rival: each trains as many parameters, and takes a step."""

from __future__ import annotations

import pytest
from conftest import run_script

CASES = ["gpt-small", "bert", "rnn", "cnn-32", "resnet-18", "vit"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_rivals_are_of_one_size(case, tmp_path):
    """The script itself refuses rivals of other sizes."""
    pytest.importorskip("torch")
    flags = ["--rivals=ours,loop,bare,flax,torch", "--rounds=1", "--steps=1", f"--json={tmp_path}/figures"]
    ran = run_script("bench/bench.py", f"--cases={case}", *flags, limit_s=600)
    assert ran.code == 0, ran


def test_a_case_that_is_none_is_named():
    ran = run_script("bench/bench.py", "--cases=gpt2")
    assert ran.code == 2, ran
    assert "--cases='gpt2' is unknown; choose from gpt, gpt-small, bert" in ran.err
