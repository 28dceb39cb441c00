"""Imports point one way: a module may import only from units on lines below its own."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsseg.commands.train import wait_passively

PACKAGE = Path(__file__).parents[1] / "rsseg"

LAYERS = """
cli
commands
report | export
training | scene
evaluation | datasets
inference
methods.registry
recipe
methods.supervised | methods.ktda | methods.mtdf | methods.dasegnet
methods.plain
methods.base
methods.plain_recipe
data | backbones | layers | runs
checkpoint | metrics | vector
foreign | raster
task | config | files | distributed | gdal | text
fields
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


def module_name(path: Path) -> str:
    return ".".join(("rsseg", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that the file imports, at its top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def first_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring, the first one also last; empty if there are none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if cycle := visit(other, [*trail, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def test_a_ring_of_imports_is_found() -> None:
    assert first_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert first_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_one_another_in_a_ring() -> None:
    known = {module_name(path) for path in MODULES} - {"rsseg"}  # `rsseg` alone holds the version
    assert first_cycle({module_name(path): imported_modules(path, known) for path in MODULES}) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


HEAVY = {
    *("torch", "torchvision", "timm", "rasterio", "pyogrio", "shapely", "cv2"),
    *("matplotlib", "jinja2", "ray", "onnx", "onnxruntime", "openvino", "tensorboard", "wandb"),
}


@pytest.mark.parametrize("command", ["--help", "predict --help", "recipe ls", "recipe validate demo-ktda", "runs ls"])
def test_commands_that_compute_nothing_import_no_heavy_package(command: str, tmp_path: Path) -> None:
    code = (
        f"import sys, rsseg.runs; from rsseg.cli import run; assert run({command.split()!r}) == 0; "
        f"sys.exit(', '.join({HEAVY!r} & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert result.returncode == 0, f"imported: {result.stderr}"


def test_loading_a_network_imports_neither_torchs_compiler_nor_wandb_nor_changes_them() -> None:
    code = (
        "import sys, rsseg.inference.network; assert not {'torch._dynamo', 'wandb'} & set(sys.modules); "
        "import torch, torchvision; from torch._dynamo import utils; "
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2; "
        "known = torchvision.ops.roi_align.__globals__['is_compile_supported']; "
        "assert known('cpu') == utils.is_compile_supported('cpu')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_openmp_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
