import shutil

import pytest
import safetensors.torch
import timm
import torch

import hubconf
from convmixer_hub import find_checkpoint
from convmixer_hub.zoo import default_cfgs

from .conftest import CHECKOUT

TIMM_ARCHS = ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]


@pytest.fixture
def plain_checkout(tmp_path):
    """The files that a clone or a GitHub zip has, in torch.hub's cache, nothing installed."""
    folder = tmp_path / "torch" / "hub" / "someone_convmixer-hub_main"
    folder.mkdir(parents=True)
    shutil.copy(CHECKOUT / "hubconf.py", folder)
    for name in ("convmixer_hub", "weights"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, folder / name, ignore=ignored)
    return folder


def test_every_arch_and_timms_own_have_an_entry_point():
    # As torch.hub.list finds them.
    callables = {name for name, value in vars(hubconf).items() if callable(value)}
    entry_points = {name for name in callables if not name.startswith("_")}
    assert entry_points == {*default_cfgs, *TIMM_ARCHS}
    assert all(getattr(hubconf, name).__doc__ for name in entry_points)


@pytest.mark.parametrize("arch", [*default_cfgs, *TIMM_ARCHS])
def test_an_entry_point_builds_what_timm_does_by_its_name(arch):
    ours = getattr(hubconf, arch)(False, device="meta", num_classes=3)
    theirs = timm.create_model(arch, device="meta", num_classes=3)
    assert type(ours) is type(theirs)
    assert repr(ours) == repr(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "'{folder}', 'convmixer_cifar', source='local'",
        "'someone/convmixer-hub:main', 'convmixer_cifar', skip_validation=True, trust_repo=True",
    ],
    ids=["checkout", "zip in the cache"],
)
def test_torch_hub_loads_from_a_plain_checkout(plain_checkout, run_python, arguments, tmp_path):
    code = (
        "import safetensors.torch, sys, torch\n"
        f"model = torch.hub.load({arguments.format(folder=plain_checkout)}, pretrained=True)\n"
        "safetensors.torch.save_file(model.state_dict(), 'loaded.safetensors')\n"
        "print(sys.modules['convmixer_hub'].__file__)\n"
    )
    # -I: neither the current folder nor PYTHONPATH is searched.
    output = run_python(code, "-I", TORCH_HOME=str(tmp_path / "torch"))
    assert output.splitlines()[-1] == str(plain_checkout / "convmixer_hub" / "__init__.py")
    found, expected = (
        safetensors.torch.load_file(file)
        for file in (tmp_path / "loaded.safetensors", find_checkpoint("convmixer_cifar"))
    )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.slow
def test_a_copy_that_was_imported_before_is_named(plain_checkout, run_python):
    code = (
        "import sys, warnings\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "import torch, convmixer_hub\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    torch.hub.load({str(plain_checkout)!r}, 'convmixer_96_8_ks5_p1', source='local')\n"
        "print([str(w.message) for w in caught if 'convmixer_hub' in str(w.message)])\n"
    )
    message = (
        f"convmixer_hub was imported from {CHECKOUT} before, and is used instead of the copy in "
        f"{plain_checkout}; restart Python to use that"
    )
    assert run_python(code, "-I").splitlines()[-1] == repr([message])
