"""`convmixer verify`: does a model compute here what it computed when it was made."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch

from convmixer_hub import CheckpointError, find_checkpoint
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.hub.records import RECORDS
from convmixer_hub.release.golden import TOLERANCE, make_golden_input, verify, write_golden

from .conftest import ARCH, NAME, convmixer
from .test_doctor import cached_and_offline


@pytest.fixture
def run(untrained):
    """The folder of an untrained model, and its recorded logits."""
    write_golden(untrained)
    return untrained


def test_the_golden_input_has_every_dtype_exactly():
    images = make_golden_input((3, 32, 32))
    assert images.shape == (4, 3, 32, 32)
    assert images.flatten()[:4].tolist() == [-125 / 64, -124 / 64, -117 / 64, -98 / 64]
    assert images.abs().max() <= 2
    assert 1 < images.std() < 1.3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(images.to(dtype).double(), images)


@pytest.mark.parametrize("name", RECORDS)
def test_shipped_models_compute_what_they_should(name):
    result = verify(name)
    assert result <= TOLERANCE


def test_a_run_computes_what_it_should(run):
    result = convmixer("verify", run)
    assert (result.exit_code, result.output.count("\n")) == (0, 1)
    assert result.output.startswith(f"{run}: its logits match the reference; largest difference ")
    assert " of the largest logit, tolerance 2e-05 (torch " in result.output


def test_the_packages_own_logits_count_before_those_in_the_cache(hub, monkeypatch):
    cached_and_offline(hub, monkeypatch)
    find_checkpoint(NAME).with_name("golden.json").write_text("{}")
    assert verify(NAME) <= TOLERANCE


def rewrite(run, **changes):
    golden = json.loads((run / "golden.json").read_text())
    (run / "golden.json").write_text(json.dumps({**golden, **changes}))


def test_a_path_is_no_name(run, monkeypatch):
    logits = json.loads((run / "golden.json").read_text())["logits"]
    rewrite(run, logits=[[logit + 1 for logit in row] for row in logits])
    monkeypatch.chdir(run.rename(run.with_name("convmixer_cifar")).parent)
    assert verify("convmixer_cifar") <= TOLERANCE < verify(Path("convmixer_cifar"))


def test_a_file_alone_has_no_reference(tmp_path):
    file = shutil.copy(find_checkpoint(NAME), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="golden.json: no such file; name a model of this pa"):
        verify(str(file))


def test_a_gelu_that_computes_something_else_is_noticed(run, monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional, "gelu", lambda x, approximate: x * (1.702 * x).sigmoid()
    )
    result = convmixer("verify", run)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    message = f"{run}: its logits do NOT match the reference (try another version of torch, and "
    assert result.output.startswith(message)


def test_a_logit_that_is_no_number_is_noticed(run):
    [[_, *others], *rows] = json.loads((run / "golden.json").read_text())["logits"]
    rewrite(run, logits=[[math.nan, *others], *rows])
    assert not verify(str(run)) <= TOLERANCE
    assert "its logits do NOT match the reference" in convmixer("verify", run).output


def test_the_input_of_large_images_follows_its_formula():
    n = 4 * 3 * 1024 * 1024 - 1
    expected = (n**3 % 65521 % 251 - 125) / 64
    assert make_golden_input((3, 1024, 1024)).flatten()[-1] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "golden.json").unlink(), "no such file"),
        (lambda run: (run / "golden.json").write_text("{"), r"cannot be read \(JSONDecodeError: "),
        (lambda run: (run / "golden.json").write_text("[]"), r"cannot be read \(TypeError: "),
        (lambda run: rewrite(run, logits="many"), r"cannot be read \("),
        (lambda run: rewrite(run, logits=[[1.0]]), "holds logits of another model"),
        (lambda run: rewrite(run, input="another"), "is for another input than this version's"),
        (lambda run: save_model(timm.create_model(ARCH), run, {}), "is of weights with another "),
    ],
    ids=["missing", "no JSON", "no object", "no numbers", "shape", "input", "weights"],
)
def test_a_golden_file_that_does_not_serve_is_one_line(run, change, message):
    change(run)
    with pytest.raises(
        CheckpointError,
        match=rf"golden.json: {message}.*; `convmixer card {run} --data DIR` writes it$",
    ):
        verify(str(run))
