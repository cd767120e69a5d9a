"""The one rule of the house: an arrow goes down only. And no setting is left unread."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import REPO, SCRIPTS

WINGS = ("nanosynth.data", "nanosynth.training", "nanosynth.inference")
# From the ground up. What stands on one floor does not import its neighbours there.
FLOORS = (("model",), ("nanosynth",), WINGS, SCRIPTS, ("convert",), ("verdict",), ("benchmarks",))
LIGHT = (
    *("settings", "terminal", "files", "table", "tokenizer", "data.sources", "data.conversations"),
    *("data.formats", "data.utf8", "data.splits", "data.ngrams"),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


PATHS = [
    *REPO.glob("*.py"),
    *(path for room in ("nanosynth", "convert", "verdict", "benchmarks")
      for path in (REPO / room).rglob("*.py")),
]  # fmt: skip
MODULES = {name_of(path): path for path in PATHS}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() - {"nanosynth"}  # which only has UserError


def room_of(module: str) -> str:
    """The wing, package or script that a module belongs to."""
    rooms = [room for floor in FLOORS for room in floor]
    inside = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    assert inside, f"{module} stands on no floor; see FLOORS"
    return max(inside, key=len)


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_an_arrow_goes_down_only(module):
    room = room_of(module)
    for other in imports(MODULES[module]):
        theirs = room_of(other)
        assert theirs == room or floor_of(theirs) < floor_of(room), f"{module} imports {other}"


def test_the_rooms_see_one_another():
    """The walk sees arrows at all."""
    assert "nanosynth.tokenizer" in imports(MODULES["nanosynth.data.bins"])
    assert {"model", "nanosynth.data.bins"} <= imports(MODULES["train"])


def test_only_the_scripts_are_run_from_the_root():
    assert {path.stem for path in REPO.glob("*.py")} == {*SCRIPTS, "model"}


def test_model_imports_torch_only():
    roots = set()
    for node in ast.walk(ast.parse((REPO / "model.py").read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module):
    check = f"import sys, nanosynth.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPO).returncode == 0


def test_no_circle():
    below: set[str] = set()
    left = set(MODULES)
    while left:
        free = {module for module in left if imports(MODULES[module]) - {module} <= below}
        assert free, f"a circle among {sorted(left)}"
        below |= free
        left -= free


def config_classes(tree: ast.Module) -> dict[str, set[str]]:
    """The settings that each dataclass of a file declares."""
    return {
        node.name: {
            statement.target.id for statement in node.body if isinstance(statement, ast.AnnAssign)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        if any(
            "Config" in ast.unparse(base) or "Settings" in ast.unparse(base) for base in node.bases
        )
    }


def reads(tree: ast.Module) -> set[str]:
    """Names read as config.NAME, or self.NAME in a property."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("check", "__post_init__"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            found |= {node.attr} if owner.rpartition(".")[2] in ("config", "self") else set()
    return found


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m != "nanosynth.settings"])
def test_every_setting_is_read(module):
    """By the file that declares it or, in a package, by its neighbours."""
    path = MODULES[module]
    classes = config_classes(ast.parse(path.read_text()))
    readers = [path] if path.parent == REPO else list(path.parent.glob("*.py"))
    read = set().union(*(reads(ast.parse(reader.read_text())) for reader in readers))
    for name, fields in classes.items():
        assert fields and not fields - read, f"{name} leaves {sorted(fields - read)} unread"


def test_the_settings_are_seen():
    tree = ast.parse((REPO / "train.py").read_text())
    assert "learning_rate" in config_classes(tree)["TrainConfig"] & reads(tree)
