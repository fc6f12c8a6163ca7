import configparser
import subprocess
import sys

import huggingface_hub
import pytest
import timm
from packaging.requirements import Requirement

from convmixer_hub.version import NEEDED, check_versions

from .conftest import CHECKOUT


def test_what_is_checked_is_what_is_installed():
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    specifiers = {r.name: str(r.specifier) for r in map(Requirement, filter(None, lines))}
    for name, version in NEEDED.items():
        assert specifiers[name] == f">={version}"


def test_a_build_of_the_oldest_version_is_taken(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.6.0a0+df5bbc09d1.nv24.12")
    check_versions()


@pytest.mark.parametrize(
    ("library", "old", "needed"), [(timm, "1.0.9", "1.0.31"), (huggingface_hub, "0.36.2", "1.31")]
)
def test_an_older_library_is_one_line_that_names_it(library, old, needed, monkeypatch):
    monkeypatch.setattr(library, "__version__", old)
    with pytest.raises(ImportError) as refused:
        check_versions()
    name = library.__name__
    assert str(refused.value) == (
        f"convmixer_hub needs {name} {needed} or later, but {library.__file__} is {old}; "
        f"run: pip install --upgrade '{name}>={needed}'"
    )


LIST = f"""
import runpy
main = runpy.run_path({str(CHECKOUT / "convmixer_hub" / "cli" / "main.py")!r})["main"]
main(["list"])
"""


def test_an_older_library_is_named_before_it_is_used(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.5.1'\n")
    line = (
        f"convmixer_hub needs torch 2.6 or later, but {tmp_path}/torch/__init__.py is 2.5.1; run: "
        "pip install --upgrade 'torch>=2.6'"
    )
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(CHECKOUT)!r}]"
    for code, expected in [
        ("import convmixer_hub", f"ImportError: {line}"),
        (LIST, f"Error: {line}"),
    ]:
        command = [sys.executable, "-c", f"{path}\n{code}"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.stderr.splitlines()[-1] == expected and result.returncode == 1
    assert result.stderr == f"Error: {line}\n"
