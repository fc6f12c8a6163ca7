import configparser
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from convmixer_hub.version import NEEDED

from .conftest import CHECKOUT


def test_what_is_checked_is_what_is_installed():
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    specifiers = {r.name: str(r.specifier) for r in map(Requirement, filter(None, lines))}
    for name, version in NEEDED.items():
        assert specifiers[name] == f">={version}"


def test_a_build_of_the_oldest_version_is_taken(run_python):
    code = (
        "import torch; torch.__version__ = '2.6.0a0+df5bbc09d1.nv24.12'; import convmixer_hub; "
        "print(convmixer_hub.__version__)"
    )
    assert run_python(code, PYTHONPATH=str(CHECKOUT))


@pytest.mark.parametrize(
    ("name", "old", "needed"),
    [("timm", "1.0.9", "1.0.31"), ("huggingface_hub", "0.36.2", "1.31"), ("torch", "2.5.1", "2.6")],
)
def test_an_older_library_is_one_line_that_names_it(tmp_path, name, old, needed):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"__version__ = '{old}'\n")
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import convmixer_hub"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: convmixer_hub needs {name} {needed} or later, but "
        f"{tmp_path}/{name}/__init__.py is {old}; run: pip install --upgrade '{name}>={needed}'"
    )
