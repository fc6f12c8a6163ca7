import csv
import errno
import json
import math
import multiprocessing
import random
import re
import resource
import shutil
import signal
import time
from dataclasses import asdict, replace

import pytest
import torch

from convmixer_hub import DataError, TrainingError, UnknownModelError
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.evaluate import evaluate_on
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.load import load_trained
from convmixer_hub.machine import refuse_torchrun
from convmixer_hub.training import network as network_module
from convmixer_hub.training import run as run_module
from convmixer_hub.training.folder import lock_run
from convmixer_hub.training.images import choose_images, hold_out, load_images, serve_batches
from convmixer_hub.training.run import train
from convmixer_hub.training.settings import TrainingSettings

from .conftest import (
    ARCH,
    CONFIG,
    PICTURES,
    convmixer,
    limited,
    weights_of,
    write_split,
    write_tree,
)

SETTINGS = TrainingSettings(
    "convmixer_96_8_ks5_p1",
    epochs=2,
    final_share=0.5,
    small_crop_size=16,
    whole_share=1.0,
    batch_size=10,
    rand_augment="",
    random_erasing=0.0,
    late_augmentation=False,
    held_out=10,
    covariance_init=False,
    precision="fp32",  # which is faster here, two runs might answer differently
)
SHARES = "whole_share random_erasing label_smoothing ema_decay layer_decay".split()
NUMBERS = [name for name, value in asdict(SETTINGS).items() if type(value) in (int, float)]


def run(settings, data, output, **options):
    return train(settings, open_dataset(data), output, **options)


@pytest.fixture(scope="module")
def first_run(cifar_sample, tmp_path_factory):
    """A finished run with SETTINGS, for all tests."""
    return run(SETTINGS, cifar_sample, tmp_path_factory.mktemp("first_run") / "run")


@pytest.fixture
def finished_run(first_run, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(first_run, tmp_path / "run")


def test_a_run_folder_tells_everything(first_run, cifar_sample):
    files = {".lock", "config.json", "metrics.csv", "model.safetensors", "training_state.pt"}
    assert {file.name for file in first_run.iterdir()} == files
    config = json.loads((first_run / "config.json").read_text())
    assert config["training"] == asdict(SETTINGS)
    assert re.fullmatch(r"(1 × .+|\d+ CPU cores \(.+\)), fp32", config["machine"])
    rows = read_metrics(first_run)
    assert [(row["epoch"], row["crop_size"]) for row in rows] == [("1", "16"), ("2", "32")]
    model = load_trained(str(first_run))
    # One image of each class is held out: the ten that the test split has.
    tested = evaluate_on(model, open_dataset(cifar_sample))
    assert (float(rows[-1]["held_out_top1"]), tested.count) == (tested.top1, 10)
    assert tuple(model.pretrained_cfg["label_names"]) == CIFAR10.classes


@pytest.mark.slow
def test_a_model_learns(cifar_sample, tmp_path):
    settings = replace(SETTINGS, epochs=12, held_out=0)
    folder = run(settings, cifar_sample, tmp_path / "run")
    losses = [float(row["train_loss"]) for row in read_metrics(folder)]
    assert losses[-1] < losses[0] - 0.5


def test_a_run_may_start_from_trained_weights(first_run, cifar_sample, tmp_path):
    settings = replace(SETTINGS, model=str(first_run), pretrained=True, learning_rate=1e-9)
    settings = replace(settings, covariance_init=True)  # which is for other kernels
    second = run(settings, cifar_sample, tmp_path / "second")
    before, after = (
        dict(load_trained(folder).named_parameters()) for folder in (first_run, second)
    )
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_a_run_gives_probabilities_fitted_to_its_held_out_images(cifar_sample, tmp_path):
    settings = replace(SETTINGS, held_out=20, batch_size=5, label_smoothing=0.5)
    folder = run(settings, cifar_sample, tmp_path / "run")
    state = torch.load(folder / "training_state.pt", weights_only=True)
    temperature = state["temperature"]
    assert json.loads((folder / "config.json").read_text())["temperature"] == temperature != 1.0
    found = load_trained(folder).state_dict()
    for name, tensor in state["model"].items():
        expected = tensor / temperature if "classification" in name else tensor
        torch.testing.assert_close(found[name], expected, atol=0, rtol=0)
    before = (folder / "model.safetensors").read_bytes()
    run(settings, cifar_sample, folder)  # a finished run is only written out again
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_run_from_a_repository_keeps_its_owner(cifar_sample, tmp_path, hub):
    name = "hf-hub:convmixer-hub/convmixer_cifar.cifar10"
    settings = replace(SETTINGS, model=name, pretrained=True, epochs=1)
    folder = run(settings, cifar_sample, tmp_path / "run")
    assert json.loads((folder / "config.json").read_text())["training"]["model"] == name


def run_until(saves: int, *arguments) -> None:
    """Begin a run, and stop it when it has saved its state so many times."""
    save_state, count = run_module.save_state, iter(range(saves - 1))

    def save_and_stop(folder, state):
        save_state(folder, state)
        if next(count, None) is None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "save_state", save_and_stop)
        run(*arguments)


def read_metrics(folder):
    """Read what does not depend on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"precision": "bf16"},
        {"ema_decay": 0.9, "optimizer": "adamw"},
        {"mixup": 0.5, "cutmix": 0.5, "random_erasing": 0.5, "rand_augment": "rand-m9-n2"},
        {"pretrained": True, "layer_decay": 0.5, "freeze_batch_norm": True},
        {"flip": "random", "train_images": 30, "covariance_init": True},
    ],
    ids=["defaults", "bf16", "ema and adamw", "all augmentations", "as in fine-tuning", "others"],
)
def test_a_run_stopped_at_every_save_goes_on_as_if_nothing_had_happened(
    cifar_sample, tmp_path, monkeypatch, change
):
    settings = replace(SETTINGS, **change)
    whole = run(settings, cifar_sample, tmp_path / "whole")
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_SAVES", 0.0)
    state_file = tmp_path / "parts" / "training_state.pt"
    # An epoch saves after each of its three steps and at its end; a run resumed there saves first.
    for saves, place in [(1, (0, 1)), (3, (1, 0)), (2, (1, 1))]:
        run_until(saves, settings, cifar_sample, tmp_path / "parts")
        state = torch.load(state_file, weights_only=True)
        assert (state["epoch"], state["step"]) == place
    parts = run(settings, cifar_sample, tmp_path / "parts")
    torch.testing.assert_close(weights_of(parts), weights_of(whole), atol=0, rtol=0)
    assert read_metrics(parts) == read_metrics(whole)


def test_a_run_goes_on_here_that_began_on_a_gpu(first_run, cifar_sample, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_SAVES", math.inf)
    run_until(1, SETTINGS, cifar_sample, tmp_path / "parts")
    state = torch.load(tmp_path / "parts" / "training_state.pt", weights_only=True)
    assert state["epoch"] == 1
    for group in state["optimizer"]["param_groups"]:  # as they are there
        group |= {"capturable": True, "lr": torch.tensor(group["lr"])}
    torch.save(state, tmp_path / "parts" / "training_state.pt")
    parts = run(SETTINGS, cifar_sample, tmp_path / "parts")
    torch.testing.assert_close(weights_of(parts), weights_of(first_run), atol=0, rtol=0)


def serve(settings, data, step=0, workers=0):
    chosen = choose_images(settings, open_dataset(data))
    images, _ = load_images(settings, chosen, CONFIG, skip_damaged=False)
    return list(serve_batches(settings, images, 0, step, workers))


def test_batches_from_other_processes_are_the_same(cifar_sample):
    settings = replace(SETTINGS, rand_augment="rand-m9-n2", random_erasing=0.5)
    here, there = (serve(settings, cifar_sample, 1, workers) for workers in (0, 2))
    assert len(here) == 5
    torch.testing.assert_close(there, here, atol=0, rtol=0)


def test_a_run_keeps_the_precision_it_began_with(cifar_sample, tmp_path, monkeypatch, capsys):
    def choose(precision):
        choice = (precision, "it is faster")
        monkeypatch.setattr(run_module, "choose_precision", lambda *_: choice)

    settings = replace(SETTINGS, precision="auto", epochs=1)
    choose("bf16")
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_SAVES", 0.0)
    run_until(1, settings, cifar_sample, tmp_path / "run")
    assert "computes in bf16: it is faster\n" in capsys.readouterr().out
    choose("fp32")
    run(settings, cifar_sample, tmp_path / "run")
    assert "computes in" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["machine"].endswith(", bf16")


def save_at_every_step(settings, data, output):
    run_module.SECONDS_BETWEEN_SAVES = 0.0
    run(settings, data, output)


@pytest.mark.slow
def test_a_run_killed_five_times_at_random_goes_on_as_if_nothing_had_happened(
    cifar_sample, tmp_path
):
    settings = replace(SETTINGS, epochs=10)
    whole = run(settings, cifar_sample, tmp_path / "whole")
    parts = tmp_path / "parts"
    state = parts / "training_state.pt"
    processes = multiprocessing.get_context("forkserver")  # which imports torch once for all
    processes.set_forkserver_preload([__name__])
    moments = random.Random(0)
    kills = 0
    for _ in range(5):
        saved = state.stat().st_mtime_ns if state.exists() else 0
        process = processes.Process(target=save_at_every_step, args=(settings, cifar_sample, parts))
        process.start()
        while process.is_alive() and (not state.exists() or state.stat().st_mtime_ns == saved):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 2  # the later ones may find the run finished
    run(settings, cifar_sample, parts)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), atol=0, rtol=0)
    assert read_metrics(parts) == read_metrics(whole)


def test_the_moving_average_is_what_a_run_gives(cifar_sample, tmp_path, monkeypatch):
    key = "classification.linear.bias"
    seen = []
    update = network_module.ModelEmaV3.update

    def update_and_note(self, model, step):
        update(self, model, step)
        seen.append((self.get_decay(step), model.get_parameter(key).detach().clone()))

    monkeypatch.setattr(network_module.ModelEmaV3, "update", update_and_note)
    folder = run(replace(SETTINGS, ema_decay=0.9), cifar_sample, tmp_path / "run")
    average = seen[0][1]
    for decay, weight in seen:
        average = decay * average + (1 - decay) * weight
    assert 0 < seen[-1][0] <= 0.9
    torch.testing.assert_close(weights_of(folder)[key], average)


def test_crops_grow(cifar_sample):
    settings = replace(SETTINGS, epochs=8, first_crop_size=8)
    shapes = [tuple(images.shape) for images, _ in serve(settings, cifar_sample)]
    sides = [8] * 2 + [16] * 2 + [32] * 4
    assert shapes == [(10, 3, side, side) for side in sides for _ in range(3)]


def test_augmentation_and_whole_images_come_late(cifar_sample, tmp_path):
    settings = replace(SETTINGS, epochs=4, whole_share=0.5)
    change = {"random_erasing": 1.0, "cutmix": 0.5, "rand_augment": "rand-m9-n2"}
    augmented = replace(settings, late_augmentation=True, **change)
    plain = read_metrics(run(settings, cifar_sample, tmp_path / "plain"))
    late = read_metrics(run(augmented, cifar_sample, tmp_path / "late"))
    assert [row["crop_size"] for row in late] == ["16", "16", "16", "32"]
    for epoch, (row, plain_row) in enumerate(zip(late, plain)):
        assert (row == plain_row) == (epoch < 2)


def test_a_file_system_without_locks_is_no_hindrance(cifar_sample, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    dataset = open_dataset(cifar_sample)
    monkeypatch.setattr("fcntl.flock", refuse)
    train(replace(SETTINGS, epochs=1), dataset, tmp_path / "run")


def test_two_processes_do_not_train_in_one_folder(cifar_sample, tmp_path):
    message = "run: another process trains in it; wait for that, or name another --output"
    with lock_run(tmp_path / "run"), pytest.raises(TrainingError, match=message):
        run(SETTINGS, cifar_sample, tmp_path / "run")


@pytest.mark.parametrize(("before", "now"), [(30, 29), (29, 30)])
def test_a_run_does_not_go_on_with_fewer_or_more_images(
    cifar_sample, tmp_path, finished_run, before, now
):
    change_state(finished_run, lambda state: state.update(epoch=1, readable_images=before))
    images = [*PICTURES.values()] * 4
    kept, _ = hold_out(open_dataset(cifar_sample), 10, seed=0)
    if now < 30:
        images[kept[0]] = b"damaged"
    data = write_split(tmp_path / "data", "train", images, list(range(10)) * 4)
    message = f"run: holds a run on {before} training images, now {now} can be read; give the same"
    with pytest.raises(TrainingError, match=message):
        run(SETTINGS, data, finished_run, skip_damaged=True)


def test_a_full_disk_loses_nothing(first_run, cifar_sample, tmp_path):
    run_until(1, SETTINGS, cifar_sample, tmp_path / "parts")
    message = r"parts: cannot be written \(.+\); it keeps what was saved before, so free .+$"
    with limited(resource.RLIMIT_FSIZE, 100_000), pytest.raises(TrainingError, match=message):
        run(SETTINGS, cifar_sample, tmp_path / "parts")
    parts = run(SETTINGS, cifar_sample, tmp_path / "parts")
    torch.testing.assert_close(weights_of(parts), weights_of(first_run), atol=0, rtol=0)


def test_several_processes_are_refused(cifar_sample, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a launch")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="torchrun started 2 processes, but this trains in one"):
        run(SETTINGS, cifar_sample, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "")
    refuse_torchrun()


def test_the_last_line_names_the_dataset_as_it_was_given(cifar_sample, tmp_path, monkeypatch):
    monkeypatch.setattr("convmixer_hub.cli.train.train", lambda *_: None)
    data = ["--data", str(cifar_sample.parent), "--config", "data", "--label-column", "label"]
    result = convmixer("train", SETTINGS.model, *data, "--output", tmp_path)
    command = f"convmixer evaluate {tmp_path} {' '.join(data)}"
    assert result.output == f"{tmp_path}: finished; measure it with: {command}\n"


def test_a_worker_that_outlives_a_run_does_not_keep_it_locked(tmp_path):
    with lock_run(tmp_path / "run"):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        with lock_run(tmp_path / "run"):
            pass
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize(
    ("epoch", "kept"),
    [
        (0, "has nothing yet; the same command begins again"),
        (1, "keeps all but the last minute; the same command resumes it"),
    ],
)
def test_ctrl_c_keeps_the_last_epoch(cifar_sample, tmp_path, monkeypatch, epoch, kept):
    train_epoch = run_module._Run.train_epoch

    def interrupt(run):
        if run.state.epoch == epoch:
            raise KeyboardInterrupt
        train_epoch(run)

    monkeypatch.setattr(run_module._Run, "train_epoch", interrupt)
    output = tmp_path / "run"
    options = ["--data", cifar_sample, "--output", output, "--epochs=2", "--batch-size=10"]
    result = convmixer("train", SETTINGS.model, *options)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"stopped; {output} {kept}"
    assert not epoch or load_trained(output)


def test_a_loss_that_is_no_number_stops_the_run(cifar_sample, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e30, warmup_epochs=0.0, epochs=3)
    message = r"loss or gradient is not finite in epoch 1, by step \d; .*run keeps what was saved"
    with pytest.raises(TrainingError, match=message):
        run(settings, cifar_sample, tmp_path / "run")


def change_state(folder, change) -> None:
    """Apply a function to the state of a run."""
    state = torch.load(folder / "training_state.pt")
    change(state)
    torch.save(state, folder / "training_state.pt")


def test_a_run_goes_on_under_a_version_with_more_settings(finished_run, cifar_sample):
    change_state(finished_run, lambda state: state["settings"].pop("layer_decay"))
    before = weights_of(finished_run)
    with pytest.raises(TrainingError, match="holds a run with layer_decay 1.0, not 0.5; give the"):
        run(replace(SETTINGS, layer_decay=0.5), cifar_sample, finished_run)
    after = weights_of(run(SETTINGS, cifar_sample, finished_run))
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"settings": asdict(SETTINGS) | {"new": 3}}, "holds a run with new 3, not None; give the"),
        ({"image_digest": "another"}, "holds a run on other images; give the same settings and"),
        ({"classes": ["cat", "dog"]}, r"holds a run with classes \['cat', 'dog'\], not \['airpla"),
    ],
    ids=["of another version", "other images", "other classes"],
)
def test_another_run_is_not_gone_on_with(finished_run, cifar_sample, difference, message):
    change_state(finished_run, lambda state: state.update(difference))
    with pytest.raises(TrainingError, match=message):
        run(SETTINGS, cifar_sample, finished_run)


@pytest.mark.parametrize("overlay", [{}, {"input_size": (3, 48, 48)}], ids=["weights", "config"])
def test_a_run_from_another_model_is_another_run(first_run, cifar_sample, tmp_path, overlay):
    start = shutil.copytree(first_run, tmp_path / "start")
    settings = replace(SETTINGS, model=str(start), pretrained=True, epochs=1)
    folder = run(settings, cifar_sample, tmp_path / "run")
    model = load_trained(start if overlay else ARCH)
    model.pretrained_cfg.update(overlay)
    save_model(model, start, {})
    with pytest.raises(TrainingError, match="holds a run from another trained model; give the sam"):
        run(settings, cifar_sample, folder)
    change_state(folder, lambda state: state.pop("start_digest"))  # of an earlier version
    run(settings, cifar_sample, folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.unlink(), "holds files but no training_state.pt, so it is no run to"),
        (lambda state: state.write_bytes(b"x"), "_state.pt: cannot be read .*; name another --ou"),
    ],
    ids=["missing", "damaged"],
)
def test_without_a_state_the_finished_weights_stay(finished_run, cifar_sample, damage, message):
    before = weights_of(finished_run)
    damage(finished_run / "training_state.pt")
    with pytest.raises(TrainingError, match=message) as refused:
        run(SETTINGS, cifar_sample, finished_run)
    assert "\n" not in str(refused.value)
    torch.testing.assert_close(weights_of(finished_run), before, atol=0, rtol=0)


def test_a_folder_that_cannot_be_made_is_named_at_once(cifar_sample, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"file/run: cannot be made or written to \(.*\); n"):
        run(SETTINGS, cifar_sample, tmp_path / "file" / "run")


def test_leftovers_of_a_process_killed_in_its_first_save_are_no_hindrance(cifar_sample, tmp_path):
    left = tmp_path / "run" / ".saving-abcdefgh"
    left.mkdir(parents=True)
    (left / "training_state.pt").write_bytes(b"half of it")
    run(replace(SETTINGS, epochs=1), cifar_sample, tmp_path / "run")


def test_what_is_derived_from_the_state_is_restored(first_run, finished_run, cifar_sample):
    for name in ("model.safetensors", "config.json", "metrics.csv"):
        (finished_run / name).unlink()
    run(SETTINGS, cifar_sample, finished_run)
    before, after = weights_of(first_run), weights_of(finished_run)
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    for name in ("config.json", "metrics.csv"):
        assert (finished_run / name).read_text() == (first_run / name).read_text()


@pytest.mark.parametrize(
    ("first", "machines"),
    [("2 cores", "2 cores, fp32"), ("12 cores", "12 cores, fp32, then 2 cores, fp32")],
)
def test_each_machine_of_a_run_is_named(cifar_sample, tmp_path, monkeypatch, first, machines):
    names = [first, "2 cores"]
    monkeypatch.setattr(run_module, "describe_machine", lambda device: names.pop(0))
    run_until(1, SETTINGS, cifar_sample, tmp_path / "run")
    run(SETTINGS, cifar_sample, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["machine"] == machines


def test_a_finished_run_stays_as_it_is(finished_run, tmp_path, monkeypatch):
    config = (finished_run / "config.json").read_text()
    unreadable = write_split(tmp_path / "data", "train", [b"no image"] * 40, list(range(10)) * 4)
    monkeypatch.setattr(run_module, "describe_machine", lambda device: "another machine")
    assert run(SETTINGS, unreadable, finished_run) == finished_run
    assert (finished_run / "config.json").read_text() == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: -1}, f"{name} is -1: must be ") for name in NUMBERS),
        ({"epochs": 0}, "epochs is 0: must be at least 1"),
        *(({name: 1.5}, f"{name} is 1.5: must be ") for name in SHARES),
        ({"final_share": 1.5}, "final_share is 1.5: must be from 0 to 1"),
        ({"optimizer": "sgd"}, "optimizer is sgd: must be muon or adamw"),
        ({"rand_augment": "m9"}, "rand_augment is m9: must be one like rand-m9-n2-inc1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: must be at least 0 and below 1"),
        ({"batch_size": 1}, "batch_size is 1: must be at least 2"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0: must be above 0 and at most 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: must be above 0"),
        ({"clip_grad": 0.0}, "clip_grad is 0.0: must be above 0"),
        ({"flip": "never"}, "flip is never: must be alternating or random or none"),
        ({"precision": "fp16"}, "precision is fp16: must be auto or fp32 or bf16"),
        ({"mixup": -1.0}, "mixup is -1.0: must be at least 0"),
        ({"img_size": 4}, "img_size is 4: must be 0 or at least 8"),
        ({"seed": -1}, "seed is -1: must be from 0 to 2147483647"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(TrainingError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"small_crop_size": 48}, "48: must be from 1, one patch, to 32, the whole image "),
        ({"model": "convmixer_cifar", "small_crop_size": 1}, "1: must be from 2, one patch,"),
        ({"small_crop_size": 16, "first_crop_size": 17}, "is 17, small_crop_size 16: must be"),
        ({"model": "convmixer_cifar", "img_size": 33}, "is 33: must be a multiple of 2, the patch"),
        ({"train_images": 33}, "is 33: only 30 training images are not held out; give at most 30"),
        ({"cutmix": 0.5, "batch_size": 9}, "is 9: must be even, as images are mixed in pairs"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(cifar_sample, tmp_path, change, message):
    with pytest.raises(TrainingError, match=f"{list(change)[-1]} {message}"):
        run(replace(SETTINGS, **change), cifar_sample, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "count"), [({"batch_size": 33}, 30), ({"batch_size": 21, "train_images": 20}, 20)]
)
def test_fewer_images_than_a_batch_are_refused(cifar_sample, tmp_path, change, count):
    with pytest.raises(
        DataError, match=f"{count} training .* are fewer than one batch of .*; give"
    ):
        run(replace(SETTINGS, **change), cifar_sample, tmp_path / "run")


def test_first_kernels_that_are_drawn_by_depth_are_narrow(cifar_sample, tmp_path):
    settings = replace(SETTINGS, covariance_init=True, learning_rate=1e-9, held_out=0, epochs=1)
    weights = weights_of(run(settings, cifar_sample, tmp_path / "run"))
    first, last = (weights[f"conv_mixer_layers.{i}.depth_wise_conv.weight"] for i in (0, 7))
    assert first[:, :, 0, 0].abs().max() < 1e-4 < first[:, :, 2, 2].abs().mean()
    assert last[:, :, 0, 0].abs().mean() > 1e-2


@pytest.mark.parametrize("above", ["", "archive"])
@pytest.mark.parametrize("place", ["run", "cat/run"])
def test_a_run_among_class_folders_is_refused(tmp_path, place, above):
    write_tree(tmp_path / above, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)))
    with pytest.raises(TrainingError, match=f"{place}: lies among the class folders in .*; name"):
        run(SETTINGS, tmp_path, tmp_path / place)
    assert not (tmp_path / place).exists()


@pytest.mark.parametrize("name", ["convmixer_cifr", "convmixer_cifar.cifar10", "resnet18"])
def test_an_unknown_arch_is_refused(cifar_sample, tmp_path, name):
    with pytest.raises(UnknownModelError, match=f"no model is named '{name}'; (did|known)"):
        run(replace(SETTINGS, model=name), cifar_sample, tmp_path / "run")
