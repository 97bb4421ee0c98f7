"""The house: imports go down only, each outside package has its keeper, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dememo_jax

PACKAGE = Path(__file__).parent.parent / "dememo_jax"
FLOORS = {
    0: ("bounds", "callbacks", "convolution", "keys", "modes", "tree", "values"),
    1: ("adapters", "arithmetic", "augment", "data", "likelihood", "losses", "mesh", "models", "nets", "noise", "projected"),
    2: ("curvature", "evaluate", "loop", "montecarlo", "train"),
    3: ("audit", "certify", "protect", "sharpness", "unlearn"),
    4: ("cells", "checkpoint", "files", "release", "report", "sources"),
    5: ("__init__", "__main__", "cli"),
}
VOCABULARY = ("types", "errors")  # words that every floor speaks; they import nothing of ours
# Folders, whose own files may import each other.
ROOMS = ("bounds", "augment", "curvature", "nets", *FLOORS[3], "sources", "cli")
KEEPERS = {
    "PIL": ("release", "sources"),
    "dp_accounting": ("bounds",),
    "flax": ("models", "modes", "nets"),
    "grain": ("sources",),
    "matplotlib": ("report",),
    "orbax": ("checkpoint",),
    "rich": ("cli",),
    "safetensors": ("sources",),
    "scipy": ("bounds",),
    "sklearn": ("audit", "protect", "sources"),
    "tensorflow_datasets": ("sources",),
    "tokenizers": ("sources",),
    "tyro": ("cli",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    """The module or room that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(number for number, names in FLOORS.items() if name in names)


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    here = place(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("dememo_jax.")} - {"__version__"}
    if here in VOCABULARY:
        assert not ours
        return
    ours -= set(VOCABULARY)
    if here in ROOMS:
        ours -= {here}
    if floor(here) == 4:
        ours -= {"files"}  # how the doors write
    allowed = {0: (), 1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1), 5: (0, 1, 2, 3, 4, 5)}[floor(here)]
    wrong = sorted(name for name in ours if floor(name) not in allowed)
    assert not wrong, f"{here}, on floor {floor(here)}, may not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_outside_packages_have_keepers(path):
    here, outside = place(path), {name.split(".")[0] for name in imports(path)}
    wrong = sorted(name for name in outside if here not in KEEPERS.get(name, (here,)))
    assert not wrong, f"{here} imports {wrong}, which others keep"
    if here == "bounds":
        assert "jax" not in outside, "theorems are NumPy in float64"
    if here not in VOCABULARY and floor(here) < 2:
        assert "optax" not in outside
    if here != "mesh":
        assert "shard_map" not in path.read_text()


def test_every_module_has_a_floor():
    assert {place(path) for path in FILES} <= {name for names in FLOORS.values() for name in names} | set(VOCABULARY)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_import_opens_no_door():
    code = (
        "import sys, dememo_jax\n"
        "from dememo_jax import audit, bounds, certify, protect, sharpness, unlearn\n"
        "doors = ('orbax', 'tensorflow_datasets', 'grain', 'matplotlib', 'tyro', 'sklearn', 'dp_accounting')\n"
        "print([name for name in doors if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_a_command_and_typed():
    done = subprocess.run([sys.executable, "-m", "dememo_jax", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dememo {dememo_jax.__version__}\n"
    assert (PACKAGE / "py.typed").exists()
    assert {"checkpoint", "report", "sources", "unlearn"} <= set(dir(dememo_jax))
