from dataclasses import fields

import pytest

from convmixer_hub import TrainingError
from convmixer_hub.bench.ablation import CHANGES, UNCHANGED, compare_changes
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.training import run as run_module
from convmixer_hub.training.settings import TrainingSettings

from .conftest import ARCH, convmixer


def test_every_change_differs_from_plain_settings_and_fits():
    plain = TrainingSettings("convmixer_cifar")
    for name, change in CHANGES.items():
        settings = TrainingSettings("convmixer_cifar", **change)
        differs = {f.name for f in fields(settings)} - {
            f.name for f in fields(settings) if getattr(settings, f.name) == getattr(plain, f.name)
        }
        assert differs == set(change)
        assert (name == UNCHANGED) == (not differs)


def test_runs_are_compared_and_gone_on_with(cifar_sample, tmp_path, monkeypatch):
    monkeypatch.setitem(CHANGES, UNCHANGED, {"batch_size": 16})
    monkeypatch.setitem(CHANGES, "ema", {"batch_size": 16, "ema_decay": 0.5})
    options = f"bench recipe {ARCH} --data {cifar_sample} --output {tmp_path / 'runs'} --epochs 1"
    options = f"{options} --train-images 20 --held-out 10 --change plain --change ema"
    first = convmixer(*options.split())
    assert first.exit_code == 0, first.output
    title, header, *rows = first.stdout.splitlines()[-4:]
    assert title.startswith(f"{ARCH}, epochs 1, held_out 10, train_images 20, seed 0, ")
    assert header.split()[0] == "run"
    assert [row.split()[0] for row in rows] == ["plain", "ema"]
    assert "batch_size 16, ema_decay 0.5" in rows[1] and "+0.00" in rows[0]

    def fail(*_):
        raise AssertionError("an epoch was done again")

    monkeypatch.setattr(run_module._Run, "train_epoch", fail)
    again = convmixer(*options.split())
    assert again.stdout.splitlines()[-4:] == first.stdout.splitlines()[-4:]


def test_what_is_finished_is_shown_when_a_run_fails(cifar_sample, tmp_path, monkeypatch):
    monkeypatch.setitem(CHANGES, UNCHANGED, {"batch_size": 16})
    monkeypatch.setitem(CHANGES, "ema", {"batch_size": 1000})
    options = f"bench recipe {ARCH} --data {cifar_sample} --output {tmp_path / 'runs'} --epochs 1"
    options = f"{options} --train-images 20 --held-out 10 --change plain --change ema"
    result = convmixer(*options.split())
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("plain  batch_size 16")
    assert "20 training images are less than one batch of 1000" in result.stderr


def test_runs_without_held_out_images_cannot_be_compared(cifar_sample, tmp_path):
    with pytest.raises(TrainingError, match="held_out is 0: must be at least 1, for the runs to"):
        next(compare_changes(ARCH, open_dataset(cifar_sample), tmp_path, epochs=1))
