"""Who imports whom, and that no setting is left unread."""

import ast
import subprocess
import sys

import pytest

from tiny import REPO, SCRIPTS

LIGHT = "settings chat sources synthetic quality instructions memorisation".split()
MODULES = sorted(path.stem for path in (REPO / "nanosynth").glob("[!_]*.py"))


def imports(path) -> set[str]:
    """Dotted names of all that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    names = imports(REPO / f"nanosynth/{module}.py")
    return {name.split(".")[1] for name in names if name.startswith("nanosynth.")} & set(MODULES)


def test_scripts_are_all_known():
    top = {path.stem for path in REPO.glob("*.py")}
    assert top >= {*SCRIPTS, "model"}


@pytest.mark.parametrize("path", sorted(REPO.glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_another(path):
    scripts = {other.stem for other in REPO.glob("*.py")} - {"model"}
    if path.stem == "bench":
        scripts -= {"train"}  # an instrument imports what it measures
    assert not {name.split(".")[0] for name in imports(path)} & scripts


def test_model_imports_torch_only():
    roots = {name.split(".")[0] for name in imports(REPO / "model.py")}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("module", MODULES)
def test_nanosynth_imports_no_script_and_no_model(module):
    roots = {name.split(".")[0] for name in imports(REPO / f"nanosynth/{module}.py")}
    assert not roots & {path.stem for path in REPO.glob("*.py")}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module):
    check = f"import sys, nanosynth.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPO).returncode == 0


def test_no_circle_within_nanosynth():
    below: dict[str, set[str]] = {}
    left = set(MODULES)
    while left:
        free = {module for module in left if ours(module) <= set(below)}
        assert free, f"a circle among {sorted(left)}"
        below |= {module: ours(module) for module in free}
        left -= free
    assert "chat" in below["dataset"]  # the walk sees arrows at all


def reads(tree: ast.Module) -> set[str]:
    """Names read as config.NAME, or self.NAME outside __post_init__."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("config", "self") else set()
    return found


@pytest.mark.parametrize("script", [*SCRIPTS, "bench"])
def test_every_setting_is_read(script):
    tree = ast.parse((REPO / f"{script}.py").read_text())
    fields = {
        statement.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    assert fields
    assert not fields - reads(tree)
