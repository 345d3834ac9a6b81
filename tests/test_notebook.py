"""notebooks/unroll.ipynb runs from its first cell to its last."""

import pytest
from helpers import ROOT

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")


@pytest.mark.learning
def test_the_notebook_runs(tmp_path, monkeypatch):
    """In a folder where algos/ is found, nothing is cloned or installed."""
    (tmp_path / "algos").symlink_to(ROOT / "algos")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "unroll.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    runs = {path.name.split("__")[1]: path for path in (tmp_path / "runs").iterdir()}
    assert set(runs) == {"dyna_q", "pets"} and all((path / "picture.png").is_file() for path in runs.values())
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
