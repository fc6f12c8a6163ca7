import json
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.utils import random_seed
from torch.nn import functional as F

from convmixer_hub import TrainingError, UnknownModelError
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.training.network import build_network
from convmixer_hub.training.run import train
from convmixer_hub.training.settings import TrainingSettings
from convmixer_hub.training.step import TrainingStep
from convmixer_hub.training.teacher import Teacher

from .conftest import ARCH, CHECKOUT, on_gpu, uses_cpp

CLASSES = list(CIFAR10.classes)
CPU = torch.device("cpu")
OURS = timm.data.resolve_data_config({}, model=timm.create_model("convmixer_cifar"))
SETTINGS = TrainingSettings(
    ARCH, epochs=1, batch_size=10, precision="fp32", teacher="convmixer_cifar"
)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A model of timm's, for other images, in a folder."""
    random_seed(0)
    overlay = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay=overlay)
    folder = tmp_path_factory.mktemp("teachers") / "resnet"
    save_for_hf(model, folder, safe_serialization=True)
    return model.eval(), folder


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=on_gpu)])
def test_gives_the_mean_logits_of_models_for_other_images(resnet, batch, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, folder = resnet
    mean, std = (torch.tensor(OURS[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = batch * std + mean
    images = F.interpolate(pixels, (64, 64), mode="bilinear")
    own = timm.data.create_transform((3, 64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    ours = timm.create_model("convmixer_cifar", pretrained=True).eval()
    with torch.no_grad():
        expected = (model(own.transforms[-1](images)) + ours(batch)) / 2
        teacher = Teacher([str(folder), "convmixer_cifar"], CLASSES, OURS, device)
        logits = teacher(batch.to(device)).cpu()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if device.type == "cpu":
        assert uses_cpp(teacher.models[1].model)


@pytest.mark.parametrize(
    ("whole", "crop", "expected"),
    [((32, 32), (8, 8), (16, 16)), ((32, 64), (24, 48), (48, 48)), ((128, 64), (64, 64), (32, 64))],
)
def test_resizes_crops_as_much_as_whole_images(resnet, whole, crop, expected):
    teacher = Teacher([str(resnet[1])], CLASSES, OURS | {"input_size": (3, *whole)}, CPU)
    seen = []
    teacher.models[0].model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher(torch.zeros(2, 3, *crop))
    assert seen[0].shape == (2, 3, *expected)


def test_a_model_for_one_size_gets_that(tmp_path):
    values = {name: OURS[name] for name in ("mean", "std")}
    model = timm.create_model("test_vit", num_classes=10, pretrained_cfg_overlay=values).eval()
    save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    teacher = Teacher([str(tmp_path / "vit")], CLASSES, OURS, CPU)
    size = model.pretrained_cfg["input_size"][1:]
    for side in (24, 32):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            expected = model(F.interpolate(images, size, mode="bilinear"))
        torch.testing.assert_close(teacher(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("classes", "config", "message"),
    [
        (CLASSES[::-1], {}, "has the classes airplane, .*, the dataset truck, .*; name a model "),
        (CLASSES[:3], {}, "has the classes airplane, .*, the dataset airplane, automobile, bird; "),
        (CLASSES, {"input_size": (1, 32, 32)}, "takes images of 3 channels, the model 1; name a "),
    ],
)
def test_refuses_a_model_for_something_else(classes, config, message):
    with pytest.raises(TrainingError, match=f"^teacher convmixer_cifar: {message}"):
        Teacher(["convmixer_cifar"], classes, OURS | config, CPU)


def test_refuses_what_is_no_model(resnet):
    with pytest.raises(TrainingError, match="^teacher .*: has the classes 10 classes without na"):
        Teacher([str(resnet[1])], CLASSES[:3], OURS, CPU)
    with pytest.raises(UnknownModelError, match="^teacher convmixer: no file or folder, and no tr"):
        Teacher(["convmixer"], CLASSES, OURS, CPU)
    for names in (",", "a,", "a,,b", " "):
        with pytest.raises(TrainingError, match="^teacher is .*: must be names or folders of tr"):
            replace(SETTINGS, teacher=names)


def test_a_step_learns_labels_and_answers(batch):
    # Hinton et al. 2015, with a temperature of 4 and a share of 0.9.
    labels = torch.tensor([3, 8])
    network = build_network(SETTINGS, CLASSES, CPU)
    teacher = Teacher(["convmixer_cifar"], CLASSES, OURS, CPU)
    network.module.train()
    with torch.no_grad():
        logits, theirs = network.module(batch), teacher(batch)
    soft = (theirs / 4).softmax(1)
    divergence = (soft * (soft.log() - (logits / 4).log_softmax(1))).sum(1).mean() * 16
    expected = 0.1 * F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.9 * divergence
    take_step = TrainingStep(network, SETTINGS, torch.float32, CPU, teacher)
    loss, correct, norm = take_step(batch, labels, labels, 1.0).tolist()
    assert loss == pytest.approx(2 * expected.item(), rel=1e-4)
    assert correct == (logits.argmax(1) == labels).sum()
    assert norm > 0


def test_a_run_names_its_teachers_without_their_paths(cifar_sample, resnet, tmp_path, monkeypatch):
    monkeypatch.chdir(resnet[1])
    settings = replace(SETTINGS, teacher=f"{resnet[1]}, ., convmixer_cifar", mixup=0.5)
    folder = train(settings, open_dataset(cifar_sample), tmp_path / "run")
    training = json.loads((folder / "config.json").read_text())["training"]
    assert training["teacher"] == "./resnet,./resnet,convmixer_cifar"


@pytest.mark.slow
def test_the_script_of_the_docs_trains_a_teacher(cifar_sample, tmp_path):
    command = [sys.executable, str(CHECKOUT / "docs" / "train_teacher.py")]
    command += [str(cifar_sample), str(tmp_path / "teacher"), "--epochs", "1", "--held-out", "10"]
    command += ["--model", "test_resnet", "--batch-size", "10", "--image-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.startswith("epoch 1  train_loss ")
    logits = Teacher([str(tmp_path / "teacher")], CLASSES, OURS, CPU)(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 10)
