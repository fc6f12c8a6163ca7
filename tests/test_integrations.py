"""Models by name, and folders that this package writes, in other libraries."""

import shutil

import lightning
import numpy as np
import pytest
import timm
import torch
from fastai.vision.all import ImageDataLoaders, Resize, accuracy, vision_learner
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

import convmixer_hub  # noqa: F401  (registers the models)
from convmixer_hub.data.images import open_image
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.load import load_trained

from .conftest import CHECKOUT, IMAGES

NAME = "convmixer_cifar.cifar10"
FOLDER = CHECKOUT / "weights" / NAME
LABELS = ["animal", "machine"]
MACHINES = ("airplane", "automobile", "ship", "truck")


@pytest.fixture(scope="module")
def samples() -> list[tuple[torch.Tensor, int]]:
    """Ten images as the model wants them, each an animal or a machine."""
    config = timm.data.resolve_model_data_config(timm.create_model(NAME))
    transform = timm.data.create_transform(**config)
    return [
        (transform(open_image(IMAGES / f"{name}.png")), int(name in MACHINES))
        for name in CIFAR10.classes
    ]


class Classifier(lightning.LightningModule):
    """What the Lightning docs write, around a model by name."""

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=2)

    def training_step(self, batch, batch_number):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_lightning_fits_a_model_and_reloads_it(samples, tmp_path):
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    module = Classifier(NAME)
    trainer.fit(module, DataLoader(samples, batch_size=5))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    reloaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", pretrained=False)
    images = torch.stack([image for image, _ in samples])
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval().model(images), module.eval().model(images))


def test_transformers_trainer_trains_a_folder(samples, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(
        FOLDER, id2label=dict(enumerate(LABELS)), ignore_mismatched_sizes=True
    )
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    data = [{"pixel_values": image, "labels": label} for image, label in samples]
    before = model.timm_model.classification.linear.weight.detach().clone()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=AutoImageProcessor.from_pretrained(FOLDER),
    )
    trainer.train()
    assert not torch.equal(model.timm_model.classification.linear.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    ours = load_trained(tmp_path / "saved").eval()
    images = torch.stack([image for image, _ in samples])
    with torch.no_grad():
        torch.testing.assert_close(ours(images), model.eval()(pixel_values=images).logits)


@pytest.mark.slow
def test_fastai_fine_tunes_a_name(tmp_path):
    for name in CIFAR10.classes:
        label = LABELS[name in MACHINES]
        (tmp_path / label).mkdir(exist_ok=True)
        for copy in range(4):
            shutil.copy(IMAGES / f"{name}.png", tmp_path / label / f"{name}{copy}.png")
    loaders = ImageDataLoaders.from_folder(
        tmp_path, valid_pct=0.2, seed=0, item_tfms=Resize(32), bs=8, num_workers=0
    )
    learner = vision_learner(loaders, NAME, metrics=accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(2, freeze_epochs=2)
    assert learner.validate()[1] > 0.7


def test_torch_export_gives_the_logits(samples, tmp_path):
    model = timm.create_model(NAME, pretrained=True).eval()
    images = torch.stack([image for image, _ in samples])
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_aot_inductor_gives_the_logits(samples, tmp_path):
    model = timm.create_model(NAME, pretrained=True).eval()
    images = torch.stack([image for image, _ in samples])
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        logits = torch._inductor.aoti_load_package(file)(images)
        np.testing.assert_allclose(logits, model(images), atol=1e-4)
