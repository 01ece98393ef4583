"""The floors of the design: a module imports only from lower floors, files stay small, names say
something."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparse_llama"
FLOORS: list[set[str]] = [
    {"errors"},
    {"config"},
    {"layouts", "distributed", "reporting"},
    {"attention", "data"},
    {"adapters"},
    {"memory"},
    {"model"},
    {"generation"},
    {"evaluation", "export"},
    {"training"},
    {"planning"},
    {"benchmark"},
    {"study", "doctor", "demo"},
    {"cli"},
    {"launch"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
DEEPSPEED_FLOORS = {"distributed", "memory", "model", "training"}
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py")])
ids = [str(path.relative_to(ROOT)) for path in SOURCES]


def home_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "launch" else parts[1]


def imports_of(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_module_imports_only_from_lower_floors(path: Path):
    home = home_of(path)
    if home == "__init__":
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "sparse_llama" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1]
        assert other == home or FLOOR_OF[other] < FLOOR_OF[home], f"{home} imports {name} from floor {other}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_third_parties_stay_on_their_floors(path: Path):
    home = home_of(path)
    roots = {name.split(".")[0] for name in imports_of(path)}
    if home in {"errors", "config"}:
        assert not roots & {"torch", "deepspeed", "transformers"}
    if home not in DEEPSPEED_FLOORS:
        assert "deepspeed" not in roots


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_files_are_short_and_have_names_that_say_something(path: Path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= (60 if home_of(path) == "launch" else 400), f"{lines} lines"
    assert path.stem not in {"utils", "helpers", "common", "misc"}


def test_launch_scripts_do_not_shadow_the_standard_library():
    """The launcher puts ``launch/`` first on ``sys.path``: a script named ``profile.py`` would replace the
    module."""
    assert not {path.stem for path in (ROOT / "launch").glob("*.py")} & set(sys.stdlib_module_names)


def test_every_floor_that_exists_is_known():
    homes = {home_of(path) for path in SOURCES} - {"__init__"}
    assert homes <= set(FLOOR_OF)
