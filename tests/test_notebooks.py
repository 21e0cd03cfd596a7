"""The notebooks run as they are, were committed with output, and hold no code of their own worth testing elsewhere."""

import ast
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("fit_quality", "thresholds", "compare_models")


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks, which forgets what the one before defined: each kernel loads pandas and plots anew."""
    client = "jupyter_client.asynchronous.AsyncKernelClient"
    manager = KernelManager(kernel_name="python3", client_class=client)
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, kernel):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    place = {"metadata": {"path": str(FOLDER.parent)}}
    NotebookClient(notebook, km=kernel, timeout=120, resources=place).execute()
    assert any(
        "image/png" in output.get("data", {})
        for cell in code_of(notebook)
        for output in cell.outputs
    )


@pytest.mark.parametrize("name", NAMES)
def test_notebook_was_committed_with_its_output(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_of(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert all(cell.outputs for cell in code_of(notebook))
    assert not any(
        output.output_type == "error" for cell in code_of(notebook) for output in cell.outputs
    )


@pytest.mark.parametrize("name", NAMES)
def test_notebook_only_calls_the_package(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in code_of(notebook):
        tree = ast.parse(cell.source.replace("%matplotlib inline", ""))
        assert not [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert all(
                    module.split(".")[0] in ("calibrate", "coeffs", "runtime")
                    for module in modules
                )
