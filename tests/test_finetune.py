import json
import re
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image

from convmixer_hub import CheckpointError, DataError, TrainingError
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.data.images import open_image
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.evaluate import evaluate_on
from convmixer_hub.load import load_trained
from convmixer_hub.model.config import get_label_names
from convmixer_hub.predict import predict
from convmixer_hub.release.publish import list_uploads
from convmixer_hub.training import finetune as finetune_module
from convmixer_hub.training.finetune import choose_settings, finetune

from .conftest import CHECKOUT, IMAGES, KINDS, NAME, convmixer, weights_of, write_photos

QUICK = {"epochs": 1, "batch_size": 4, "rand_augment": ""}


@pytest.fixture
def photos(tmp_path):
    """Two class folders, not split."""
    return write_photos(tmp_path / "photos", "")


@pytest.fixture
def split_photos(tmp_path):
    """Two class folders for training, and two with the same images for validation."""
    return write_photos(tmp_path / "split", "train", "val")


def choose(name, data, **changes):
    return choose_settings(name, open_dataset(data), **changes)


def run(settings, data, output, **options):
    return finetune(settings, open_dataset(data), output, **options)


def run_command(data, output, *options):
    """Fine-tune as QUICK says, by the command."""
    command = ["finetune", "convmixer_cifar", "--data", data, "--output", output]
    return convmixer(*command, "--epochs=1", "--batch-size=4", "--rand-augment=", *options)


@pytest.mark.slow
def test_a_trained_model_learns_other_classes(split_photos, tmp_path):
    folder = tmp_path / "run"
    result = run(choose("convmixer_cifar", split_photos, epochs=6), split_photos, folder)
    assert result.count == 20 and result.top1 >= 90
    assert evaluate_on(load_trained(str(folder)), open_dataset(split_photos)) == result

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert get_label_names(model) == list(KINDS)
    [[first, _]] = predict(model, [open_image(IMAGES / "ship.png")], top_k=2)
    assert first.label == "machine"
    uploads = [upload.path_in_repo for upload in list_uploads(str(folder))]
    assert "model.safetensors" in uploads and "mistakes.png" not in uploads
    again = tmp_path / "again"  # from the run folder, of which all classes are known
    settings = choose(str(folder), split_photos, **QUICK | {"epochs": 2}, learning_rate=1e-12)
    assert run(settings, split_photos, again) == result


def test_settings_are_chosen_for_the_data(photos, split_photos, monkeypatch):
    settings = choose("convmixer_cifar", photos)
    assert settings.held_out == 4 and settings.batch_size == 4
    assert settings.pretrained
    assert settings.rand_augment and settings.epochs * 16 >= 4 * settings.batch_size
    assert settings.model == NAME
    assert choose("convmixer_cifar", photos, held_out=10).held_out == 10
    assert choose("convmixer_cifar", photos, batch_size=8).epochs == 100
    assert choose("convmixer_cifar", split_photos).held_out == 0
    changed = choose("convmixer_cifar", photos, epochs=3, mixup=None, rand_augment="")
    assert (changed.epochs, changed.mixup, changed.rand_augment) == (3, 0.0, "")
    assert (settings.optimizer, settings.learning_rate) == ("adamw", 0.005)
    assert (settings.layer_decay, settings.random_erasing) == (0.8, 0.25)
    monkeypatch.setattr("convmixer_hub.training.finetune.FEW_IMAGES", 16)
    many = choose("convmixer_cifar", photos)
    assert (many.rand_augment, many.random_erasing) == ("", 0.0)


def test_without_matplotlib_nothing_is_trained_in_vain(split_photos, tmp_path, monkeypatch):
    settings = choose("convmixer_cifar", split_photos, **QUICK)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="drawing needs matplotlib: pip install matplotlib"):
        run(settings, split_photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_show_what_is_still_wrong(split_photos, tmp_path, monkeypatch):
    shown = []
    draw = finetune_module.draw_predictions

    def draw_predictions(images, titles, predictions):
        shown.extend(zip(images, titles, predictions, strict=True))
        return draw(images, titles, predictions)

    monkeypatch.setattr(finetune_module, "draw_predictions", draw_predictions)
    settings = choose("convmixer_cifar", split_photos, **QUICK, learning_rate=1e-12)
    result = run(settings, split_photos, tmp_path / "run")
    assert len(shown) == result.count - result.correct > 0
    sureness = []
    for image, title, classes in shown:
        assert image.size == (32, 32) and classes[0].label != title
        sureness.append(classes[0].probability)
    assert sureness == sorted(sureness, reverse=True)
    for name in ("validation_confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert image.format == "PNG"


def test_layers_near_the_image_learn_less_and_frozen_statistics_nothing(photos, tmp_path):
    options = {"layer_decay": 1e-3, "weight_decay": 0.0, "freeze_batch_norm": True}
    run(choose("convmixer_cifar", photos, **QUICK, **options), photos, tmp_path / "run")
    before, after = load_trained("convmixer_cifar").state_dict(), weights_of(tmp_path / "run")
    for name, value in before.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(after[name], value), name
    for name, least, most in [
        ("patch_emb.conv.weight", 0, 1e-9),
        ("conv_mixer_layers.7.norm2.weight", 1e-7, 1),
    ]:
        assert least <= (after[name] - before[name]).abs().max() < most


def test_impossible_settings_are_refused(photos):
    with pytest.raises(TrainingError, match="batch_size is 0: must be at least 2"):
        choose("convmixer_cifar", photos, batch_size=0)
    with pytest.raises(TrainingError, match="has no validation images to measure the model on; gi"):
        choose("convmixer_cifar", photos, held_out=0)


def test_a_run_is_not_gone_on_with_on_images_that_it_held_out(photos, tmp_path):
    run(choose("convmixer_cifar", photos, **QUICK), photos, tmp_path / "run")
    (photos / "animal" / "cat 32.jpg").rename(photos / "animal" / "a cat 32.jpg")
    with pytest.raises(TrainingError, match="holds a run on other images; give the same"):
        run(choose("convmixer_cifar", photos, **QUICK), photos, tmp_path / "run")


def test_a_class_of_damaged_images_is_not_skipped(split_photos, tmp_path):
    for file in (split_photos / "train" / "animal").iterdir():
        file.write_bytes(b"\xff\xd8 and nothing more")
    settings = choose("convmixer_cifar", split_photos, **QUICK)
    with pytest.raises(DataError, match="no training image of the class animal can be read; repla"):
        run(settings, split_photos, tmp_path / "run", skip_damaged=True)


def test_one_class_alone_is_refused(photos, tmp_path):
    shutil.rmtree(photos / "machine")
    with pytest.raises(DataError, match="photos: has only one class, animal; add images of ano"):
        run(choose("convmixer_cifar", photos), photos, tmp_path / "run")


@pytest.mark.parametrize(("split", "count"), [("train", 20), ("val", 19)])
def test_damaged_images_are_named_or_skipped(split_photos, tmp_path, split, count):
    (split_photos / split / "animal" / "cat 32.jpg").write_bytes(b"\xff\xd8 and nothing more")
    refused = run_command(split_photos, tmp_path / "run")
    message = "Error: 1 of 20 images cannot be read, the first is .*cat 32.jpg"
    assert re.search(message, refused.stderr)
    result = run_command(split_photos, tmp_path / "run", "--skip-damaged")
    assert f"of {count} validation images correct" in result.stdout
    assert re.search("skipped: .*cat 32.jpg", result.stderr)


def test_other_validation_images_are_another_run(split_photos, tmp_path):
    settings = choose("convmixer_cifar", split_photos, **QUICK)
    folder = tmp_path / "run"
    run(settings, split_photos, folder)
    (split_photos / "val" / "animal" / "cat 32.jpg").unlink()
    with pytest.raises(TrainingError, match="holds a run on other images; give the same settings"):
        run(settings, split_photos, folder)


def test_a_run_among_validation_images_is_refused(split_photos):
    settings = choose("convmixer_cifar", split_photos, **QUICK)
    place = split_photos / "val"
    with pytest.raises(TrainingError, match=f"run: lies among the class folders in {place}; name"):
        run(settings, split_photos, place / "run")


def test_a_model_of_timm_is_refused(photos, tmp_path):
    folder = tmp_path / "timms"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "convmixer_768_32"}')
    with pytest.raises(CheckpointError, match="timms: holds timm's convmixer_768_32, which takes"):
        run(choose(str(folder), photos), photos, tmp_path / "run")


def test_a_model_without_pooling_is_refused(photos, tmp_path):
    model = timm.create_model(NAME, pretrained=True, num_classes=0, global_pool="")
    save_model(model, tmp_path / "start", {})
    with pytest.raises(TrainingError, match="start: was saved without pooling, which a head needs"):
        run(choose(str(tmp_path / "start"), photos), photos, tmp_path / "run")


def test_a_run_is_never_taken_for_a_model_of_the_same_name(split_photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run_command(split_photos, NAME).stdout
    result = evaluate_on(load_trained(f"./{NAME}"), open_dataset(split_photos))
    assert printed.splitlines()[-1] == (
        f"{NAME}: top-1 {result.top1:.2f} % ({result.correct} of 20 validation images correct); "
        f"use it with: convmixer predict IMAGE --model ./{NAME}"
    )


def test_a_run_says_what_it_started_from_without_the_path(split_photos, untrained, monkeypatch):
    monkeypatch.chdir(untrained.parent)
    settings = choose("a_run", split_photos, **QUICK)
    assert settings.model == str(untrained)
    done = run(settings, split_photos, untrained.parent / "run")
    assert run(settings, split_photos, untrained.parent / "run") == done
    config = json.loads((untrained.parent / "run" / "config.json").read_text())
    assert config["training"]["model"] == "./a_run"  # the rest of the path is of this machine


@pytest.mark.parametrize("size", [(24, 41), (33, 33), (16, 16)])
def test_images_may_have_another_shape_than_the_weights_were_trained_on(photos, tmp_path, size):
    overlay = {"input_size": (3, *size)}
    model = timm.create_model("convmixer_cifar", pretrained=True, pretrained_cfg_overlay=overlay)
    save_model(model, tmp_path / "start", {})
    folder = tmp_path / "run"
    options = QUICK | {"rand_augment": "rand-m5-n1"}
    run(choose(str(tmp_path / "start"), photos, **options), photos, folder)
    loaded = load_trained(folder)
    assert loaded.pretrained_cfg["input_size"] == (3, *size)
    side = "×".join(map(str, size)) if size[0] != size[1] else str(size[0])
    assert f"\n1,{side}," in (folder / "metrics.csv").read_text()


def test_a_run_may_take_images_of_another_size(photos, tmp_path):
    options = QUICK | {"epochs": 2, "whole_share": 0.5, "precision": "fp32"}
    overlay = {"input_size": (3, 48, 48)}
    model = timm.create_model("convmixer_cifar", pretrained=True, pretrained_cfg_overlay=overlay)
    save_model(model, tmp_path / "start", {})
    expected = run(choose(str(tmp_path / "start"), photos, **options), photos, tmp_path / "a")
    found = run(choose("convmixer_cifar", photos, img_size=48, **options), photos, tmp_path / "b")
    assert found == expected
    torch.testing.assert_close(
        weights_of(tmp_path / "b"), weights_of(tmp_path / "a"), rtol=0, atol=0
    )
    metrics = (tmp_path / "b" / "metrics.csv").read_text()
    assert "\n1,36," in metrics and "\n2,48," in metrics  # 24 of 32 pixels are 36 of 48
    model = load_trained(tmp_path / "b")
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 48, 48)
    features = model.eval().forward_features(torch.zeros(1, *config["input_size"]))
    assert tuple(config["pool_size"]) == features.shape[2:]


@pytest.mark.slow
def test_the_example_of_the_docs_runs_as_it_stands(tmp_path, run_python):
    page = (CHECKOUT / "docs" / "fine-tuning.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    [example] = [block for block in blocks if "ImageFolder" in block]
    assert example.count("\n") <= 25
    write_photos(tmp_path / "data", "train", "test")
    printed = run_python(example.replace("num_epochs=20", "num_epochs=1"))
    assert re.fullmatch(r"epoch 1: \d+ of 20 images right", printed)
    model = timm.create_model(f"local-dir:{tmp_path / 'my-model'}", pretrained=True)
    assert get_label_names(model) == list(KINDS)
