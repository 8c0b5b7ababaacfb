"""The tutorials of ``notebooks/`` are committed clean, open in Colab, and run from beginning to end."""

import ast
import importlib
import json
import os
import pathlib
import re
from typing import Any

import pytest

from scripts import release

ROOT = pathlib.Path(__file__).parents[2]
REPOSITORY = release.repositories()["pyproject.toml"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: pathlib.Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text())
    return notebook


def code_of(cell: dict[str, Any]) -> str:
    """The Python of a cell, magics replaced by ``pass``."""
    return re.sub(r"^(\s*)%.*$", r"\1pass", "".join(cell["source"]), flags=re.M)


def test_notebooks_are_five() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@each
def test_notebook_is_committed_without_outputs_and_with_sorted_keys(path: pathlib.Path) -> None:
    """`jupyter nbconvert --clear-output --inplace` makes it so again."""
    notebook = read(path)
    assert path.read_text() == json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
        assert "".join(cell["source"]).strip(), "an empty cell"


@each
def test_notebook_badge_opens_it_and_its_first_code_installs_the_repository(path: pathlib.Path) -> None:
    cells = read(path)["cells"]
    badge = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name}"
    assert f"]({badge})" in "".join(cells[0]["source"]).splitlines()[0]
    first = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    assert f'%pip install --quiet "git+https://github.com/{REPOSITORY}"' in first and "find_spec" in first


@each
def test_notebook_code_is_python_and_its_end_links_to_the_next(path: pathlib.Path) -> None:
    notebook = read(path)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            compile(code_of(cell), path.name, "exec")
        for link in re.findall(r"\]\((?!https:)([^)]+)\)", source if cell["cell_type"] == "markdown" else ""):
            assert (path.parent / link).exists(), link
    after = NOTEBOOKS[NOTEBOOKS.index(path) + 1 :]
    assert not after or f"]({after[0].name})" in "".join(notebook["cells"][-1]["source"])


@each
def test_notebook_imports_names_that_exist(path: pathlib.Path) -> None:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(code_of(cell)))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nashswarm")]
    for node in imports:
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.slow
@each
def test_notebook_runs_to_its_end_without_a_download(path: pathlib.Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env=os.environ | offline)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown) or path.name.startswith("1")
    assert not any(output.get("name") == "stderr" and "Traceback" in output.text for output in shown)
