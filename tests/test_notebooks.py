"""Every notebook runs from top to bottom, at tiny size."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# nbclient and zmq leave sockets and event loops to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("BIGMODEL_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    text = str([cell.get("outputs") for cell in notebook.cells])
    assert "did you mean 'optim.lr'" in text
    assert "parameters" in text
    assert "image/png" in text
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = str([cell.outputs for cell in cells])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "image/png" in outputs
    assert not any(text in outputs for text in ("Traceback", "'error'", "stderr", str(path.parents[2])))
