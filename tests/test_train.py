import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from convmixer_hub import DataError, TrainingError, UnknownModelError
from convmixer_hub import train as train_module
from convmixer_hub.train import TrainingSettings, train
from convmixer_hub.zoo import CIFAR10_CLASSES, load_trained

from .conftest import CHECKOUT, IMAGES

SETTINGS = TrainingSettings(
    "convmixer_96_8_ks5_p1",
    epochs=2,
    small_crop_epochs=1,
    small_crop_size=16,
    batch_size=10,
    held_out=8,
)


def run(settings, data, output):
    return train(settings, data, output, workers=0, progress=False)


@pytest.fixture
def weights_after():
    """Load the weights of a run folder."""
    return lambda folder: safetensors.torch.load_file(folder / "model.safetensors")


def test_a_run_folder_tells_everything(cifar_sample, tmp_path):
    folder = run(SETTINGS, cifar_sample, tmp_path / "run")
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "metrics.csv",
        "model.safetensors",
        "training_state.pt",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["learning_rate"] == SETTINGS.learning_rate
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["crop_size"]) for row in rows] == [("1", "16"), ("2", "32")]
    assert all(0 <= float(row["held_out_top1"]) <= 100 for row in rows)
    model = load_trained(str(folder))
    assert tuple(model.pretrained_cfg["label_names"]) == CIFAR10_CLASSES


@pytest.mark.slow
def test_a_model_learns(cifar_sample, tmp_path):
    settings = replace(SETTINGS, epochs=12, small_crop_epochs=0, held_out=0)
    folder = run(settings, cifar_sample, tmp_path / "run")
    with (folder / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.5


def test_the_same_seed_gives_the_same_weights(cifar_sample, tmp_path, weights_after):
    settings = replace(SETTINGS, epochs=1, small_crop_epochs=0)
    first, second, other = (
        weights_after(run(replace(settings, seed=seed), cifar_sample, tmp_path / str(i)))
        for i, seed in enumerate([1, 1, 2])
    )
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    name = "classification.linear.weight"
    assert not torch.equal(first[name], other[name])


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    cifar_sample, tmp_path, weights_after, monkeypatch
):
    whole = run(SETTINGS, cifar_sample, tmp_path / "whole")
    real_save = train_module._save

    def interrupt_after_first_epoch(*arguments):
        real_save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_save", interrupt_after_first_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(SETTINGS, cifar_sample, tmp_path / "parts")
    parts = run(SETTINGS, cifar_sample, tmp_path / "parts")
    torch.testing.assert_close(weights_after(parts), weights_after(whole), atol=0, rtol=0)
    epochs = [line.split(",")[0] for line in (parts / "metrics.csv").read_text().splitlines()]
    assert epochs == ["epoch", "1", "2"]


@pytest.mark.slow
def test_ctrl_c_keeps_the_last_epoch(cifar_sample, tmp_path):
    output = tmp_path / "run"
    options = ["--data", str(cifar_sample), "--output", str(output)]
    options += ["--epochs", "500", "--batch-size", "10"]
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "convmixer_hub", "train", SETTINGS.model, *options],
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )
    try:
        deadline = time.monotonic() + 300
        while not (output / "metrics.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    last_line = errors.read_text().strip().splitlines()[-1]
    assert last_line.startswith(f"stopped; {output} keeps what the finished epochs gave, and")
    assert "Traceback" not in errors.read_text()
    load_trained(str(output))


def test_a_loss_that_is_no_number_stops_the_run(cifar_sample, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e30, warmup=0.0, epochs=3)
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) in epoch \d \(finished epochs, wh"
    ):
        run(settings, cifar_sample, tmp_path / "run")


def test_a_run_with_other_settings_is_not_overwritten(cifar_sample, tmp_path, weights_after):
    settings = replace(SETTINGS, epochs=1, small_crop_epochs=0)
    folder = run(settings, cifar_sample, tmp_path / "run")
    before = weights_after(folder)
    message = "holds a run with epochs 1, not 2; give the same settings and data to resume it, or"
    with pytest.raises(TrainingError, match=message):
        run(SETTINGS, cifar_sample, folder)
    torch.testing.assert_close(weights_after(folder), before, atol=0, rtol=0)


def test_a_run_does_not_go_on_with_other_classes(cifar_sample, tmp_path):
    run(SETTINGS, cifar_sample, tmp_path / "run")
    for name in ("cat", "dog"):
        (tmp_path / "other" / "train" / name).mkdir(parents=True)
        shutil.copy(IMAGES / f"{name}.png", tmp_path / "other" / "train" / name)
    with pytest.raises(
        TrainingError, match=r"holds a run with classes \['airplane', .* not \['cat"
    ):
        run(SETTINGS, tmp_path / "other", tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.unlink(), "holds files but no training_state.pt, so it is no run to"),
        (lambda state: state.write_bytes(b"x"), "training_state.pt: damaged .*; name another --o"),
    ],
    ids=["missing", "damaged"],
)
def test_without_a_state_the_finished_weights_stay(
    cifar_sample, tmp_path, weights_after, damage, message
):
    folder = run(SETTINGS, cifar_sample, tmp_path / "run")
    before = weights_after(folder)
    damage(folder / "training_state.pt")
    with pytest.raises(TrainingError, match=message) as refused:
        run(SETTINGS, cifar_sample, folder)
    assert "\n" not in str(refused.value)
    torch.testing.assert_close(weights_after(folder), before, atol=0, rtol=0)


def test_a_folder_that_is_no_run_is_not_written_to(cifar_sample, tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(TrainingError, match="holds files but no training_state.pt"):
        run(SETTINGS, cifar_sample, tmp_path)


def test_a_folder_that_cannot_be_made_is_named_at_once(cifar_sample, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"file/run: cannot be made or read \(.*\); name anoth"):
        run(SETTINGS, cifar_sample, tmp_path / "file" / "run")


def test_leftovers_of_a_process_killed_in_its_first_save_are_no_hindrance(cifar_sample, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".training_state.pt.tmp").write_bytes(b"half of it")
    run(SETTINGS, cifar_sample, tmp_path / "run")


def test_what_is_derived_from_the_state_is_restored(cifar_sample, tmp_path, weights_after):
    folder = run(SETTINGS, cifar_sample, tmp_path / "run")
    before, metrics = weights_after(folder), (folder / "metrics.csv").read_text()
    for name in ("model.safetensors", "config.json", "metrics.csv"):
        (folder / name).unlink()
    run(SETTINGS, cifar_sample, folder)
    torch.testing.assert_close(weights_after(folder), before, atol=0, rtol=0)
    assert (folder / "metrics.csv").read_text() == metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0, "small_crop_epochs": 0}, "epochs is 0: give at least 1"),
        ({"small_crop_epochs": 2}, "small_crop_epochs is 2: give 0 to epochs - 1"),
        ({"batch_size": 1}, "batch_size is 1: give at least 2"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: give above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: give at least 0"),
        ({"clip_grad": 0.0}, "clip_grad is 0.0: give above 0"),
        ({"warmup": 1.0}, "warmup is 1.0: give at least 0 and below 1"),
        ({"held_out": -1}, "held_out is -1: give at least 0"),
        ({"seed": -1}, "seed is -1: give 0 to 2147483647"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(TrainingError, match=message):
        replace(SETTINGS, **change)


def test_a_crop_larger_than_the_image_is_refused(cifar_sample, tmp_path):
    message = "small_crop_size is 48: convmixer_96_8_ks5_p1 takes images of 32 pixels, give at most"
    with pytest.raises(TrainingError, match=message):
        run(replace(SETTINGS, small_crop_size=48), cifar_sample, tmp_path / "run")


def test_fewer_images_than_a_batch_are_refused(cifar_sample, tmp_path):
    settings = replace(SETTINGS, batch_size=64)
    with pytest.raises(DataError, match="32 training images are less than one batch of 64; give a"):
        run(settings, cifar_sample, tmp_path / "run")


def test_an_unknown_arch_is_refused(cifar_sample, tmp_path):
    message = "no model is named 'convmixer_cifr'; did you mean convmixer_cifar"
    with pytest.raises(UnknownModelError, match=message):
        run(replace(SETTINGS, model="convmixer_cifr"), cifar_sample, tmp_path / "run")
