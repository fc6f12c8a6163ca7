import copy
import re
from functools import cache

import pytest
import timm
import torch

from convmixer_hub import prepare_for_inference, speed_up_on_cpu
from convmixer_hub.model import cpu, inference
from convmixer_hub.model.compiler import load_operators

from .conftest import ARCH


def test_what_was_compiled_is_kept(run_python):
    assert load_operators("cpu", "")
    code = "from convmixer_hub.model.cpu import load_passes; print(load_passes())"
    assert run_python(code, PATH="/nowhere") == "True"


COMPILERS = {
    "broken": "echo Working >&2\necho error: no space >&2\nexit 1\n",
    "garbling": 'for output; do :; done\nseq 1000 > "$output"\n',
}


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("nowhere", "nowhere"),
        ("false", "false failed without a message"),
        ("./broken", "error: no space"),
        ("c++ -DX='", "No closing quotation"),
        ("./garbling", "invalid ELF header"),
    ],
)
@pytest.mark.parametrize("what", ["training", "inference"])
def test_without_a_compiler_it_works_and_says_why_it_is_slow(
    what, compiler, reason, tmp_path, monkeypatch, caplog
):
    for name, script in COMPILERS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (cpu, inference):  # as if nothing was compiled yet
        monkeypatch.setattr(module, "load_operators", cache(load_operators.__wrapped__))
    plain = timm.create_model(ARCH)
    x = torch.randn(2, 3, 32, 32)
    if what == "training":
        model = copy.deepcopy(plain)
        speed_up_on_cpu(model)
    else:
        model = prepare_for_inference(plain.eval(), cpp=True)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x), atol=1e-4, rtol=1e-4)
    [message] = [record.getMessage() for record in caplog.records]
    effect = {
        "training": "training is several times slower than it could be: cpu.cpp",
        "inference": "inference is slower than it could be: inference.cpp",
    }[what]
    assert re.fullmatch(
        rf"{effect} cannot be compiled or loaded "
        rf"\(.*{reason}.*\); install a C\+\+ compiler such as g\+\+, or name one in CXX; if the "
        "cache folder cannot be written to, name another in XDG_CACHE_HOME",
        message,
    )
