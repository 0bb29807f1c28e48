"""Every notebook runs from top to bottom, at tiny size."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
# Notebook -> what its outputs say, at any size.
SAYS = {
    "01_quickstart": ("did you mean 'optim.lr'", "parameters", "image/png"),
    "02_plan": ("libtpu's own schedule|CPU devices", "h100:1x8", "needs", "image/png"),
    "03_sweep_and_law": ("sum ", "4 complete", "predicted loss", "image/png"),
    "04_finetune_compress_serve": ("eval/test/loss", "--- int8", "completion_tokens", "image/png"),
    "05_own_model_and_task": ("class Mixer", "eval/test/nearest", "image/png"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name[:2] != "01" else []) for name in SAYS]
)
# nbclient and zmq leave sockets and event loops to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("BIGMODEL_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    text = str([cell.get("outputs") for cell in notebook.cells])
    for said in SAYS[name]:
        assert any(each in text for each in said.split("|")), said


def test_every_notebook_is_run():
    assert sorted(SAYS) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_is_stored_with_its_outputs(name):
    cells = [c for c in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    outputs = str([cell.outputs for cell in cells])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "image/png" in outputs
    assert not any(text in outputs for text in ("Traceback", "'error'", "stderr", str(FOLDER.parents[1])))


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_begins_with_its_claim_and_its_cost(name):
    first = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "Costs about" in first.source.replace("\n", " ")
