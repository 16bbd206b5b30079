"""The floors of the house: who may import whom, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mixflow"
FLOORS = {
    1: {"flow", "config", "runtime"},
    2: {"models", "autoencoders", "data", "training", "sampling", "evaluation", "tables", "report"},
    3: {"stages"},
    4: {"cli"},
    5: {"__main__"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """Rooms of this package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mixflow":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("mixflow."))


def test_rooms_import_only_from_the_floors_below():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room == "__init__":
            continue
        for other in imports(path):
            if other in FLOOR_OF and other != room and FLOOR_OF[other] >= FLOOR_OF[room] > 1:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
            if FLOOR_OF[room] == 1 and FLOOR_OF.get(other, 0) > 1:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_every_room_is_on_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR_OF)


def test_the_package_knows_nothing_of_snakemake():
    for path in PACKAGE.rglob("*.py"):
        modules = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )
        }  # fmt: skip
        assert "snakemake" not in modules, path


@pytest.mark.parametrize("module", ["mixflow.config", "mixflow.tables", "mixflow.cli", "mixflow.runtime.paths"])
def test_what_the_snakefile_and_help_need_stays_without_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
