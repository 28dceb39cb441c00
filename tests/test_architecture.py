"""Imports point one way: a module may import only from units on lines below its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rsseg"

LAYERS = """
cli
commands
training | scene | report | export
evaluation | datasets
inference
methods.registry
recipe
methods.supervised | methods.ktda | methods.mtdf | methods.dasegnet
methods.base
data | backbones | layers | runs
checkpoint | metrics | vector
foreign | raster
task | config | files | distributed | text
errors
"""

RANK = {unit.strip(): rank for rank, line in enumerate(LAYERS.strip().splitlines()) for unit in line.split("|")}
FREE = {"__init__", "__main__"}
"""The lazy public API names functions of any layer."""


def unit_of(dotted: str) -> str | None:
    """The unit of `rsseg.x.y`, such as `methods.ktda`; None for the package itself."""
    parts = dotted.split(".")[1:]
    if not parts:
        return None
    return ".".join(parts[:2]) if parts[0] == "methods" and len(parts) > 1 else parts[0]


def imported_units(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.module
            else []
        )
        for name in names:
            if name.startswith("rsseg.") and (unit := unit_of(name)) not in (None, "__version__"):
                yield unit


MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_from_below(path: Path) -> None:
    dotted = ".".join(("rsseg", *path.relative_to(PACKAGE).with_suffix("").parts))
    own = unit_of(dotted.removesuffix(".__init__")) or "__init__"
    if own in FREE or own == "methods":
        return
    assert own in RANK, f"{dotted}: give the unit {own!r} a line in LAYERS"
    for other in imported_units(path):
        if other == own or (other not in RANK and other.startswith("methods.")):
            continue
        assert other in RANK, f"{dotted} imports rsseg.{other}, which has no line in LAYERS"
        assert RANK[other] > RANK[own], (
            f"{dotted} imports rsseg.{other}: move the shared part down, or pass it in as an argument"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_help_and_validate_do_not_import_torch() -> None:
    heavy = "{'torch', 'timm', 'rasterio'} & set(sys.modules)"
    code = f"import sys, rsseg, rsseg.cli, rsseg.recipe; sys.exit(', '.join({heavy}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"imported at start: {result.stderr}"
