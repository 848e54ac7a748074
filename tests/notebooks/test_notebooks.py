"""The notebooks run, on the public interface alone, and show what they show in the repository.

They are stored with their outputs: the plots are what a reader comes for, and a page on the web does not run them.
The comparison below keeps the stored text true. After a change: `jupyter execute --inplace notebooks/NAME.ipynb`.
"""

from __future__ import annotations

import ast
import copy
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLIC = {"m3_jax", "m3_jax.text"}
OURS = ("m3_jax", "pallas_kernels", "checkpoints_convert")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _text(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def _plots(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["01_generate.ipynb"]


@each_notebook
def test_it_runs_and_shows_what_is_stored(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command lines of this environment, wherever it was started from.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # where the stored outputs come from
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    for cell in _code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    for old, new in zip(_code_cells(stored), _code_cells(fresh), strict=True):
        assert _text(new) == _text(old), new.source
        assert _plots(new) == _plots(old), new.source
    assert sum(map(_plots, _code_cells(fresh))) >= 1


@each_notebook
def test_it_is_stored_as_it_ran(path: Path) -> None:
    cells = _code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
    assert path.stat().st_size < 300_000


@each_notebook
def test_it_uses_the_public_interface_alone(path: Path) -> None:
    for cell in _code_cells(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
                assert not any(alias.name.startswith("_") for alias in node.names)
            else:
                assert not (isinstance(node, ast.Attribute) and node.attr.startswith("_")), ast.unparse(node)
                continue
            assert {name for name in modules if name.split(".")[0] in OURS} <= PUBLIC
