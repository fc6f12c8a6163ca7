import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer_hub import CheckpointError, find_checkpoint
from convmixer_hub.checkpoints.info import describe
from convmixer_hub.data.images import eval_transform, open_image, to_rgb
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.load import load_trained
from convmixer_hub.predict import WORTH_PREPARING, predict

from .conftest import ARCH, CHECKOUT, IMAGES, PICTURES, as_ordinary_user


def test_probabilities_are_the_softmax_of_the_logits():
    model = load_trained("convmixer_cifar")
    image = open_image(IMAGES / "ship.png")
    [found] = predict(model, [image], top_k=99)
    transform = eval_transform(timm.data.resolve_input_data_config(model))
    with torch.no_grad():
        expected = model(transform(image)[None]).softmax(1)[0]
    found_values = [p.probability for p in found]
    assert found_values == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)
    assert found[0].label == CIFAR10.classes[expected.argmax()]
    assert {p.label for p in found} == set(CIFAR10.classes)


def test_eight_of_ten_unseen_images_are_right():
    images = [open_image(picture) for picture in PICTURES.values()]
    predictions = predict(load_trained("convmixer_cifar"), images, top_k=1)
    assert sum(p.label == name for [p], name in zip(predictions, CIFAR10.classes)) >= 8


@pytest.mark.parametrize("batch_size", [WORTH_PREPARING - 1, WORTH_PREPARING])
def test_the_size_of_a_batch_changes_no_answer(batch_size):
    model = load_trained("convmixer_cifar")
    images = [open_image(picture) for picture in PICTURES.values()]
    alone, together = (list(predict(model, images, 10, size)) for size in (1, batch_size))
    for found, expected in zip(together, alone, strict=True):
        assert {p.label: p.probability for p in found} == pytest.approx(
            {p.label: p.probability for p in expected}, abs=1e-4
        )


def test_the_example_of_the_readme_knows_a_cat(monkeypatch, capsys):
    readme = (CHECKOUT / "README.md").read_text()
    [example] = re.findall(r"```python\n([^`]*cat\.png.*?)```", readme, re.S)
    monkeypatch.chdir(CHECKOUT)
    exec(example, {})
    assert re.match(r"cat \d+\.\d%\n", capsys.readouterr().out)


def test_a_model_without_a_head_answers_nothing():
    model = timm.create_model(ARCH, num_classes=0)
    with pytest.raises(CheckpointError, match=r"the model has no head \(num_classes is 0\)"):
        next(predict(model, [Image.new("RGB", (32, 32))]))
    model = timm.create_model(ARCH, num_classes=1)
    with pytest.raises(CheckpointError, match="the model has one output, whose probability"):
        next(predict(model, [Image.new("RGB", (32, 32))]))


# Modes that keep all of an image, or all of its gray.
KEPT = {"L": "L", "LA": "L", "La": "L", "RGBA": "RGB", "CMYK": "RGB", "I": "L", "F": "L"}


@pytest.mark.parametrize("mode", [*KEPT, "1", "P", "YCbCr", "HSV"])
def test_images_of_every_mode_are_answered(mode):
    original = Image.open(IMAGES / "cat.png").convert("RGB")
    start = {"I": "L", "F": "L", "La": "LA"}.get(mode, "RGB")
    image = original.convert(start).convert(mode)
    if kept := KEPT.get(mode):
        np.testing.assert_array_equal(to_rgb(image), original.convert(kept).convert("RGB"))
    [[found]] = predict(load_trained("convmixer_cifar"), [image], top_k=1)
    assert found.label in CIFAR10.classes
    if mode in ("P", "RGBA", "YCbCr"):
        assert found.label == "cat"


def test_images_take_the_type_of_the_model():
    model = timm.create_model(ARCH, dtype=torch.bfloat16)
    [found] = predict(model, [Image.new("RGB", (32, 32))], top_k=10)
    assert sum(p.probability for p in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_classes", [3, 37])
def test_a_fresh_head_does_not_inherit_the_names_of_the_old_classes(num_classes):
    model = timm.create_model("convmixer_cifar", pretrained=True, num_classes=num_classes)
    [found] = predict(model, [Image.new("RGB", (32, 32))], top_k=num_classes)
    assert {p.label for p in found} == {str(i) for i in range(num_classes)}


def test_a_file_of_weights_alone_answers(tmp_path):
    image = open_image(IMAGES / "frog.png")
    shutil.copy(find_checkpoint("convmixer_cifar"), tmp_path / "copy.safetensors")
    expected = list(predict(load_trained("convmixer_cifar"), [image]))
    assert list(predict(load_trained(tmp_path / "copy.safetensors"), [image])) == expected

    (tmp_path / "copy.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="copy.safetensors: may not be read; change its perm"):
        as_ordinary_user(lambda: load_trained(tmp_path / "copy.safetensors"))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(CheckpointError, match="closed/model.safetensors: no such file; check the"):
        as_ordinary_user(lambda: describe(closed))
    closed.chmod(0o700)
    shutil.copy(find_checkpoint("convmixer_cifar"), tmp_path / "blob")
    with pytest.raises(CheckpointError, match=r"blob: cannot be read with weights_only=True \("):
        load_trained(tmp_path / "blob")

    # Not on record: its sizes tell the model, its metadata the activation, nothing the classes.
    options = {"num_classes": 4, "in_chans": 1, "global_pool": "catavgmax"}
    model = timm.create_model(ARCH, **options)
    file = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    with pytest.raises(CheckpointError, match="mine.safetensors: nothing in it tells the activat"):
        load_trained(file)
    safetensors.torch.save_file(model.state_dict(), file, {"activation": "gelu"})
    [found], [expected] = (predict(m, [image], top_k=4) for m in (load_trained(file), model))
    assert found == expected and {p.label for p in found} == {"0", "1", "2", "3"}
    other = TimmConvMixer(768, 1, kernel_size=7, patch_size=7)
    safetensors.torch.save_file(other.state_dict(), file, {"activation": "relu"})
    with pytest.raises(CheckpointError, match="mine.safetensors: no model of this package has its"):
        load_trained(file)
