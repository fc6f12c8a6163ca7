"""The house: which part of the package may import which, and that all of it is installed."""

import ast
import configparser
import subprocess
import sys

import pytest

from .conftest import CHECKOUT

PACKAGE = CHECKOUT / "convmixer_hub"
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
# From the ground up: a part may import those of lower floors, and itself.
FLOORS = [
    {"errors", "version"},
    {"files", "machine"},
    {"hub", "model", "data"},
    {"checkpoints"},
    {"zoo"},
    {"predict", "evaluate", "figures"},
    {"training"},
    {"release", "bench"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def get_part(module: str) -> str:
    """Name the folder or file at the top of the package that a module is in."""
    return module.partition(".")[0]


def find_imports(module: str) -> set[str]:
    """Find the modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[: -node.level] + (node.module or "").split(".")
            base = [name for name in base if name]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in MODULES else ".".join(base))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward_only(module):
    part = get_part(module)
    for imported in find_imports(module):
        assert imported in MODULES, f"{module} imports {imported}, which is no module"
        to = get_part(imported)
        allowed = part == to or FLOOR_OF[to] < FLOOR_OF[part] or {part, to} <= FLOORS[5]
        assert allowed, f"{module} imports {imported}, which is not below it"


def test_no_imports_run_in_a_circle():
    imports = {module: find_imports(module) for module in MODULES}
    while leaves := [module for module, of in imports.items() if not of & imports.keys()]:
        for module in leaves:
            del imports[module]
    assert not imports, f"in a circle: {', '.join(imports)}"


def test_finding_weights_needs_no_timm():
    for module, file in MODULES.items():
        if get_part(module) == "hub":
            assert "import timm" not in file.read_text() and "from timm" not in file.read_text()


def test_every_folder_is_installed():
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    packages = set(setup["options"]["packages"].split()) - {
        "convmixer_hub.weights",
        "convmixer_cli",
    }
    folders = {file.parent.relative_to(CHECKOUT) for file in PACKAGE.rglob("__init__.py")}
    assert packages == {".".join(folder.parts) for folder in folders}


def test_the_first_look_is_short():
    names = [f for f in PACKAGE.iterdir() if f.name != "__pycache__" and f.name[0] != "."]
    assert len(names) <= 20


@pytest.mark.slow
def test_every_module_is_imported_by_itself(tmp_path):
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    names = [f"convmixer_hub.{name}" for name in MODULES if name != "__main__"]
    subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=tmp_path,
        env={"PYTHONPATH": str(CHECKOUT), "PATH": ""},
        check=True,
    )
