"""Imports point one way, and importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "gearshift"
# A layer may import itself and what stands before it; layers in one set do not know each other.
LAYERS = [
    {"runtime"},
    {"execution", "data"},
    {"backbones"},
    {"diffusion"},
    {"policies", "objectives"},
    {"sampling"},
    {"assembly"},
    {"integrations"},
    {"training", "evaluation", "stages", "planning"},
    {"api"},
    {"verbs"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Modules of the package that a file imports at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gearshift"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gearshift."))


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    for other in imports(file):
        if other in RANK and other != layer:
            assert RANK[other] < RANK[layer], f"{layer} imports {other}"


def test_no_file_outgrows_one_idea():
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_importing_the_package_imports_no_heavy_library():
    heavy = "wandb datasets diffusers torchvision torchmetrics lightning matplotlib sklearn torch"
    code = f"import sys, gearshift; print([m for m in {heavy.split()!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    # What sampling needs must not pull in what only training and evaluation need.
    code = f"import sys, gearshift.api; print([m for m in {heavy.split()[:-1]!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
