"""Models by name, and folders that this package writes, in other libraries."""

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from convmixer_hub.data.images import open_image
from convmixer_hub.hub.records import CIFAR10
from convmixer_hub.load import load_trained
from convmixer_hub.model.config import get_label_names
from convmixer_hub.zoo import VARIANTS

from .conftest import CHECKOUT, IMAGES, NAME, write_tree

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


@pytest.fixture(scope="module")
def images(samples) -> torch.Tensor:
    """The same images, without labels."""
    return torch.stack([image for image, _ in samples])


@pytest.mark.parametrize("name", [NAME, f"local-dir:{FOLDER}"])
def test_lightning_fits_a_model_and_reloads_it(name, samples, images, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, pretrained: bool = True) -> None:
            super().__init__()
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=2)

        def training_step(self, batch, batch_number):
            x, labels = batch
            return F.cross_entropy(self.model(x), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    module = Classifier()
    trainer.fit(module, DataLoader(samples, batch_size=5))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    reloaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", pretrained=False)
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval().model(images), module.eval().model(images))


def test_transformers_trainer_trains_a_folder(samples, images, tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(
        FOLDER,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label_names=LABELS,
        ignore_mismatched_sizes=True,
    )
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"),
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    data = [{"pixel_values": image, "labels": label} for image, label in samples]
    before = model.timm_model.classification.linear.weight.detach().clone()
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=transformers.AutoImageProcessor.from_pretrained(FOLDER),
    )
    trainer.train()
    assert not torch.equal(model.timm_model.classification.linear.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    ours = load_trained(tmp_path / "saved").eval()
    assert get_label_names(ours) == LABELS
    with torch.no_grad():
        torch.testing.assert_close(ours(images), model.eval()(pixel_values=images).logits)


@pytest.mark.parametrize("arch", VARIANTS)
def test_fvcore_and_ptflops_count_as_many_multiply_accumulates(arch, images):
    fvcore = pytest.importorskip("fvcore.nn")
    ptflops = pytest.importorskip("ptflops")
    model, sizes = timm.create_model(arch).eval(), VARIANTS[arch]
    macs = sizes.count_macs(10)
    counts = fvcore.FlopCountAnalysis(model, images[:1]).by_operator()
    assert counts["conv"] + counts["linear"] == macs
    # ptflops adds the biases, one for every number that a convolution or the head gives.
    numbers = (2 * sizes.n_layers + 1) * sizes.d_model * (32 // sizes.patch_size) ** 2 + 10
    found, parameters = ptflops.get_model_complexity_info(
        model, (3, 32, 32), backend="aten", as_strings=False, print_per_layer_stat=False
    )
    assert (found, parameters) == (macs + numbers, sizes.count_parameters(10))


@pytest.mark.slow
@pytest.mark.parametrize("model", [NAME, f"local-dir:{FOLDER}"])
def test_fastai_fine_tunes_a_model(model, run_python, tmp_path):
    pytest.importorskip("fastai")
    for name in CIFAR10.classes:
        folder, image = LABELS[name in MACHINES], (IMAGES / f"{name}.png").read_bytes()
        write_tree(tmp_path / "data", *((f"{folder}/{name}{i}.png", image) for i in range(4)))
    # In a process of its own: fastai changes Pillow, pandas and torch when it is imported.
    losses = run_python(f"""
from fastai.vision.all import ImageDataLoaders, Resize, set_seed, vision_learner
import convmixer_hub

set_seed(0, reproducible=True)
loaders = ImageDataLoaders.from_folder(
    {str(tmp_path / "data")!r}, valid_pct=0.2, seed=0, item_tfms=Resize(32), bs=8, num_workers=0
)
learner = vision_learner(loaders, {model!r})
with learner.no_bar(), learner.no_logging():
    before = learner.validate()[0]
    learner.fine_tune(4)
    print(before, learner.validate()[0])
""")
    before, after = map(float, losses.splitlines()[-1].split())
    assert after < before
