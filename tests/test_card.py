import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, fields, replace
from datetime import date

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from convmixer_hub import CheckpointError, DataError
from convmixer_hub.checkpoints.files import save_model
from convmixer_hub.cli.train import train_command
from convmixer_hub.data.images import eval_transform
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.files import hash_file
from convmixer_hub.hub.find import find_embedded
from convmixer_hub.hub.records import CIFAR10, DATASETS, RECORDS, CheckpointRecord
from convmixer_hub.release import card as card_module
from convmixer_hub.release.card import propose_record
from convmixer_hub.release.golden import TOLERANCE, verify
from convmixer_hub.release.publish import list_uploads
from convmixer_hub.training.finetune import choose_settings
from convmixer_hub.training.settings import TrainingSettings

from .conftest import ARCH, encode, write_tree
from .test_evaluate import calibration_error

SETTINGS = TrainingSettings(
    ARCH, epochs=3, learning_rate=0.004, held_out=7, late_augmentation=False, seed=5
)
METRICS = """epoch,train_loss,train_top1,seconds,held_out_top1
1,2.1,20.5,1800.0,21.25
2,1.9,30.25,1800.0,35.0
3,1.8,35,3600.0,33.75
"""
FIGURES = {name: draw for name, draw in vars(card_module).items() if name.startswith("draw_")}


@pytest.fixture(autouse=True)
def ten_images_and_no_figures(monkeypatch):
    """Let the sample be all of CIFAR-10's test images, and draw nothing, which takes long."""
    monkeypatch.setattr(card_module, "DATASETS", [replace(CIFAR10, test_images=10)])
    for name in FIGURES:
        monkeypatch.setattr(card_module, name, lambda *_: b"")


@pytest.fixture
def with_figures(monkeypatch):
    """Draw after all."""
    for name, draw in FIGURES.items():
        monkeypatch.setattr(card_module, name, draw)


@pytest.fixture
def run(untrained):
    """A run folder with an untrained model, its settings, metrics and notes."""
    change_config(untrained, training=asdict(SETTINGS), machine="7 abaci")
    (untrained / "metrics.csv").write_text(METRICS)
    (untrained / "NOTES.md").write_text("## Limits\n\nNever trained.\n")
    return untrained


def write_card(folder, data, *arguments, **options):
    return card_module.write_card(folder, open_dataset(data), *arguments, **options)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def read_command(text: str) -> TrainingSettings:
    """Find the command in a card, and what `convmixer train` makes of it."""
    [line] = re.findall(r"^convmixer train .*", text, re.M)
    given = train_command.make_context("train", shlex.split(line)[2:]).params
    names = {field.name for field in fields(SETTINGS)} & given.keys()
    return TrainingSettings(**{name: given[name] for name in names})


@pytest.mark.usefixtures("with_figures")
def test_a_card_says_what_the_files_and_the_test_images_say(run, cifar_sample):
    card = write_card(run, cifar_sample, today=date(2026, 1, 2))
    text = card.read_text()

    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = eval_transform(timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        outputs = [
            model(transform(image)[None]).softmax(1)[0]
            for image, _ in open_dataset(cifar_sample).get("test")
        ]
    right = [int(output.argmax()) == label for label, output in enumerate(outputs)]
    confidences = [float(output.max()) for output in outputs]
    correct = sum(right)
    assert f"**Top-1: {10 * correct:.2f} %** ({correct} of the 10 test images, no test-time" in text
    for name, is_right in zip(CIFAR10.classes, right):
        assert f"\n| {name} | {is_right:d} | 1 | {100 * is_right:.2f} % |\n" in text
    [error] = re.findall(r"\(ECE\): ([\d.]+) %", text)
    [confidence] = re.findall(r"Mean confidence: ([\d.]+) %", text)
    assert float(error) == pytest.approx(100 * calibration_error(confidences, right), abs=0.01)
    assert float(confidence) == pytest.approx(100 * sum(confidences) / 10, abs=0.01)

    data = ModelCard.load(card).data
    result, _ = data.eval_results
    assert (result.metric_value, result.dataset_type) == (10.0 * correct, "uoft-cs/cifar10")
    assert (data.license, data.library_name, data.datasets) == (None, "timm", ["uoft-cs/cifar10"])
    assert data.base_model is None
    assert 'timm.create_model("hf-hub:OWNER/REPO", pretrained=True)' in text
    assert "pip install .  # in a clone of convmixer-hub" in text

    assert read_command(text) == SETTINGS
    for fact in ("Epochs: 3, in 2.00 hours", "Seed: 5", "Machine: 7 abaci", "images: 33.75 %"):
        assert fact in text
    assert "8 layers × 96 channels, kernel 5, patch 1, 99,082 parameters" in text
    assert "`convmixer card RUN --data DIR` on 2026-01-02, on the 10 test images" in text
    assert "a_run" not in text and "Temperature" not in text
    assert text.endswith("\n## Limits\n\nNever trained.\n")

    pictures = {"confusion", "curve", "kernels", "patch_embedding", "reliability"}
    assert {f"{name}.png" for name in pictures} == set(re.findall(r"\]\((\w+\.png)\)", text))
    for name in pictures:
        with Image.open(run / f"{name}.png") as image:
            assert image.format == "PNG" and image.width > 200
    assert verify(str(run)) <= TOLERANCE
    files = {"config.json", "metrics.csv", "model.safetensors", "golden.json", "README.md"}
    files |= {"NOTES.md", *(f"{name}.png" for name in pictures)}
    assert {file.name for file in run.iterdir()} == files  # no temporary ones


@pytest.mark.parametrize("same", [False, True])
def test_only_the_weights_on_record_are_loaded_by_name(run, cifar_sample, same):
    name = f"{ARCH}.cifar10"
    folder = run.rename(run.with_name(name))
    if same:
        shutil.copy(find_embedded(RECORDS[name]), folder / "model.safetensors")
    card = write_card(folder, cifar_sample)
    assert (f'timm.create_model("{name}", pretrained=True)' in card.read_text()) == same
    assert ModelCard.load(card).data.license == ("mit" if same else None)


def test_the_card_of_a_fine_tuned_model_gives_a_command_for_the_same(run, cifar_sample):
    dataset = open_dataset(cifar_sample)
    settings = choose_settings("convmixer_cifar", dataset, freeze_batch_norm=True)
    change_config(run, training=asdict(settings))
    text = write_card(run, cifar_sample).read_text()
    assert read_command(text) == settings
    start = "- Start: the trained weights of [convmixer-hub/convmixer_cifar.cifar10](https://"
    assert start in text


def test_the_card_of_a_fine_tuned_model_serves_others(run, cifar_sample):
    settings = choose_settings("convmixer_cifar", open_dataset(cifar_sample))
    for model, base in [
        (settings.model, "convmixer-hub/convmixer_cifar.cifar10"),
        ("hf-hub:somebody/birds@v2", "somebody/birds"),
        ("somebody/birds", "somebody/birds"),
        ("./convmixer_cifar", None),
    ]:
        change_config(run, training=asdict(replace(settings, model=model)))
        card = ModelCard.load(write_card(run, cifar_sample, license="cc-by-4.0"))
        assert (card.data.base_model, card.data.license) == (base, "cc-by-4.0")
        assert f"convmixer train {model} --data" in card.text
    [card] = [u for u in list_uploads(str(run), "me/birds") if u.path_in_repo == "README.md"]
    assert b'timm.create_model("hf-hub:me/birds", pretrained=True)' in card.path_or_fileobj


def test_other_images_of_these_classes_are_not_called_cifar10(run, cifar_sample, monkeypatch):
    monkeypatch.setattr(card_module, "DATASETS", DATASETS)
    card = write_card(run, cifar_sample)
    assert ModelCard.load(card).data.eval_results[0].dataset_name == "imagefolder"
    assert "CIFAR" not in card.read_text() and propose_record(card) == ""


def test_validation_images_are_called_so(run, cifar_sample, tmp_path):
    data = shutil.copytree(cifar_sample, tmp_path / "data")
    [test] = (data / "plain_text").glob("test-*")
    test.rename(test.with_name("validation-00000-of-00001.parquet"))
    card = write_card(run, data)
    text = card.read_text()
    assert "of the 10 validation images" in text and "the 10 test images" not in text
    assert ModelCard.load(card).data.eval_results[0].dataset_split == "validation"


@pytest.mark.parametrize("training", [None, {"model": ARCH, "epochs": 0}, {"epochs": 3}])
def test_settings_that_were_edited_give_no_command(run, cifar_sample, training):
    change_config(run, training=training)
    assert "convmixer train convmixer" not in write_card(run, cifar_sample).read_text()


def test_the_record_of_a_model_is_proposed(run, cifar_sample, monkeypatch):
    card = write_card(run, cifar_sample)

    def read(text):
        [record] = eval(f"[{text}]", {"CheckpointRecord": CheckpointRecord, "CIFAR10": CIFAR10})
        return record

    record = read(propose_record(card))
    weights = run / "model.safetensors"
    assert (record.name, record.size) == ("a_run", weights.stat().st_size)
    assert (record.sha256, record.revision) == (hash_file(weights), "v1")
    text = card.read_text()
    assert f"**Top-1: {record.top1:.2f} %**" in text and f"(ECE): {record.ece:.2f} %" in text
    for digest, revision in [(record.sha256, "v3"), ("another", "v4")]:
        known = replace(record, sha256=digest, revision="v3")
        monkeypatch.setitem(RECORDS, "a_run", known)
        assert read(propose_record(card)).revision == revision
    weights.unlink()
    assert propose_record(card) == ""


def test_the_card_of_a_model_trained_further_gives_its_command(run, cifar_sample):
    settings = replace(SETTINGS, model="./first_run", pretrained=True, small_crop_size=32)
    settings = replace(settings, teacher=f"{ARCH},./first_run,./another")
    change_config(run, training=asdict(settings), temperature=0.66)
    text = write_card(run, cifar_sample).read_text()
    assert read_command(text) == settings
    fitted = "is divided by 0.660, fitted on the held-out training images\n"
    assert f"- Temperature scaling: the head (weight and bias) {fitted}" in text
    assert "- Start: the trained weights of `./first_run`\n" in text


def test_the_card_of_a_model_trained_by_default_gives_the_shortest_command(run, cifar_sample):
    change_config(run, training=asdict(TrainingSettings(ARCH)))
    text = write_card(run, cifar_sample).read_text()
    assert f"\nconvmixer train {ARCH} --data DIR --output RUN\n" in text


@pytest.mark.usefixtures("with_figures")
def test_a_grey_model_of_other_classes_without_a_history(tmp_path):
    coin = encode(Image.new("L", (40, 40), 99))
    write_tree(tmp_path / "coins", ("test/heads/1.png", coin), ("test/tails/1.png", coin))
    gray = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,), "license": None}
    model = timm.create_model(ARCH, in_chans=1, num_classes=2, pretrained_cfg_overlay=gray)
    save_model(model, tmp_path / "model", {"training": {"model": ARCH, "forgotten": 1}})
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "predictions.png").touch()
    other = tmp_path / "card" / "README.md"
    other.write_text("# Coins")
    with pytest.raises(DataError, match="README.md: was not written by this command; name another"):
        write_card(tmp_path / "model", tmp_path / "coins", tmp_path / "card")
    assert other.read_text() == "# Coins"
    other.unlink()
    figure = tmp_path / "card" / "curve.png"
    figure.touch()
    with pytest.raises(DataError, match="curve.png: is there without a card; remove it, or na"):
        write_card(tmp_path / "model", tmp_path / "coins", tmp_path / "card")
    figure.unlink()
    card = write_card(tmp_path / "model", tmp_path / "coins", tmp_path / "card")
    text = card.read_text()
    result, _ = ModelCard.load(card).data.eval_results
    assert (result.dataset_name, result.metric_value) == ("imagefolder", 50.0)
    assert "**Top-1: 50.00 %** (1 of the 2 test images" in text
    assert "cifar" not in text and "(predictions.png)" in text and "curve.png" not in text
    assert "| `forgotten` | 1 |" in text and "convmixer train convmixer" not in text
    with Image.open(tmp_path / "card" / "patch_embedding.png") as image:
        red, green, blue = (band.tobytes() for band in image.convert("RGB").split())
        assert red == green == blue


@pytest.mark.parametrize("content", ["", "epoch\n1\n", METRICS.replace("1.9", "?"), "\0\xff"])
def test_damaged_metrics_are_named(run, cifar_sample, content):
    (run / "metrics.csv").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"metrics.csv: not the metrics .*; copy it") as error:
        write_card(run, cifar_sample)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("with_figures")
def test_what_cannot_be_written_drawn_or_described_is_named(
    run, cifar_sample, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot be written .*; make room, or name another"):
        write_card(run, cifar_sample, tmp_path / "file")
    (run / "NOTES.md").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"NOTES.md: cannot be read as text .*UTF-8"):
        write_card(run, cifar_sample)
    (run / "NOTES.md").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(DataError, match="drawing needs matplotlib: pip install matplotlib"):
            write_card(run, cifar_sample)
    save_model(timm.create_model("test_resnet"), run, {})
    with pytest.raises(CheckpointError, match="a_run: holds a ResNet; name a ConvMixer"):
        write_card(run, cifar_sample)
    assert not (run / "README.md").exists()
