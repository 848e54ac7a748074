"""The house's rules: which package may import which, and that what is public is documented."""

import ast
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "pallas_kernels": set(),
    "m3_jax": {"pallas_kernels"},
    "checkpoints_convert": {"m3_jax"},
}
# Of the extra `triton`.
OPTIONAL = {"jax_triton", "triton"}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows(package: str) -> None:
    """checkpoints_convert -> m3_jax -> pallas_kernels -> jax."""
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = (imported_packages(path) & ALLOWED.keys()) - {package}
        assert ours <= ALLOWED[package], path
        assert not imported_packages(path) & {"torch", "transformers", "tests"}, path


def test_the_walk_finds_imports(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("import m3_jax.model\ndef f():\n    from checkpoints_convert import cli\n")
    assert imported_packages(source) == {"m3_jax", "checkpoints_convert"}


def public_objects() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for package in ALLOWED:
        root = importlib.import_module(package)
        modules = [package, *(m.name for m in pkgutil.walk_packages(root.__path__, f"{package}."))]
        for name in modules:
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                continue
            found.append((name, module))
            for key, value in vars(module).items():
                if key.startswith("_") or getattr(value, "__module__", None) != name:
                    continue
                if isinstance(value, type) or inspect.isfunction(value):
                    found.append((f"{name}.{key}", value))
                if isinstance(value, type):
                    found += [
                        (f"{name}.{key}.{attribute}", member)
                        for attribute, member in vars(value).items()
                        if not attribute.startswith("_")
                        and isinstance(member, types.FunctionType | property | classmethod | staticmethod)
                    ]
    return found


def test_public_names_have_docstrings() -> None:
    objects = public_objects()
    assert len(objects) > 50
    assert [name for name, value in objects if not (getattr(value, "__doc__", None) or "").strip()] == []
