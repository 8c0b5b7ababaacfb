"""The house: how many rooms it has, how large they are, and that nobody looks through a neighbour's keyhole."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "nashswarm"
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Yield private names of other modules of this package that a module imports or reads."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nashswarm"):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
            yield from (f"{node.module}.{alias.name}" for alias in node.names if private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield from [f"{node.value.id}.{node.attr}"] if private(node.attr) else []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_package_directory_has_few_entries() -> None:
    packages = [path for path in PACKAGES if path.parent == PACKAGE]
    files = [path for path in FILES if path.parent == PACKAGE]
    assert len(packages) <= 14 and len(files) <= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_is_short_and_uses_no_private_name_of_another(path: pathlib.Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 300
    assert list(private_uses(ast.parse(source))) == []


def test_private_use_is_found() -> None:
    source = "from nashswarm.quant import grid\nfrom nashswarm.quant.pack import _field\ngrid._hidden\ngrid.quantize\n"
    assert list(private_uses(ast.parse(source))) == ["nashswarm.quant.pack._field", "grid._hidden"]


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: path.name)
def test_package_docstring_names_its_modules(folder: pathlib.Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    unnamed = [name for name in sorted(modules) if not name.startswith("__") and name not in text]
    assert unnamed == [], f"the docstring of {folder.name}/__init__.py does not say what is in these"
