"""The house: which part of the package may import which, and that all of it is installed."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from .conftest import CHECKOUT, IMAGES

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
    {"load"},
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
        allowed = part == to or FLOOR_OF[to] < FLOOR_OF[part] or {part, to} <= FLOORS[6]
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


def test_the_package_loads_little_but_timm_and_opens_no_socket_for_embedded_weights(run_python):
    code = """
import sys

def forbid(event, _):
    assert not event.startswith("socket.connect"), event

sys.addaudithook(forbid)
import timm
before = {*sys.modules}
import convmixer_hub
print(*{name.partition(".")[0] for name in {*sys.modules} - before})
timm.create_model("convmixer_cifar", pretrained=True)
"""
    output = run_python(code, HF_HUB_OFFLINE="0")
    assert {*output.split()} <= {"convmixer_hub", "packaging"}


def test_the_first_listing_of_the_package_is_short():
    names = [f for f in PACKAGE.iterdir() if f.name != "__pycache__" and f.name[0] != "."]
    assert len(names) <= 20


def list_tracked(*paths: str) -> list[str]:
    """List the files that git keeps, at these paths alone if any are given."""
    if not (CHECKOUT / ".git").exists():
        pytest.skip("git keeps no files here, as in an unpacked source distribution")
    command = ["git", "ls-files", "-z", "--", *paths]
    output = subprocess.check_output(command, cwd=CHECKOUT, text=True)
    return [name for name in output.split("\0") if name]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build the source distribution, and from it the wheel; give the folder."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in list_tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, checkout / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    return checkout / "dist"


@pytest.mark.slow
def test_the_wheel_has_every_module_and_the_weights(distributions, tmp_path, run_python):
    [wheel] = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [f for f in PACKAGE.rglob("*") if f.suffix in (".py", ".cpp", ".h", ".md", ".typed")]
    expected = {f"convmixer_hub/{file.relative_to(PACKAGE)}" for file in files}
    expected |= {f"convmixer_hub/{name}" for name in list_tracked("weights")}
    expected |= {f"convmixer_hub/examples/{file.name}" for file in IMAGES.glob("*.png")}
    assert expected <= names
    assert wheel.stat().st_size < 20e6

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    modules = [f"convmixer_hub.{m}".removesuffix(".__init__") for m in MODULES if m != "__main__"]
    found = run_python(
        "import importlib\n"
        f"for name in {modules}: module = importlib.import_module(name)\n"
        "print(module.__file__)",
        PYTHONPATH=str(installed),
    )
    assert found.startswith(str(installed))


@pytest.mark.slow
def test_the_source_distribution_has_tests_docs_and_weights(distributions):
    [archive] = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = list_tracked("tests", "docs", "weights", "hubconf.py", "CHANGELOG.md")
    assert set(tracked) <= names
    readme = (CHECKOUT / "README.md").read_text()
    assert set(re.findall(r"\]\((?!http)([^)#]+)\)", readme)) <= names
