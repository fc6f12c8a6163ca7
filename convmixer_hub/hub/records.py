"""What is known of each trained model: where its file is, what it must be, how good it is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UnknownModelError
from .repository import Repository

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GOLDEN_FILE = "golden.json"
CARD_FILE = "README.md"

# Stands in a card for the repository that it is going to be in.
EXAMPLE_REPO_ID = "OWNER/REPO"

# The files of a model's folder that are published; the state of a training run and pictures of the
# user's own images, such as mistakes.png, are not.
MODEL_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    GOLDEN_FILE,
    CARD_FILE,
    "NOTES.md",
    "RECIPE.md",
    "metrics.csv",
    "confusion.png",
    "curve.png",
    "kernels.png",
    "patch_embedding.png",
    "predictions.png",
    "reliability.png",
    "validation_confusion.png",
)

OWN_COPY_ADVICE = "reinstall the package and unset CONVMIXER_HUB_SOURCE to use its own copy"


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset that models here are trained on.

    Attributes:
        name: As people call it.
        hub_id: Its repository on the Hugging Face Hub.
        classes: Names of its classes, by label.
        test_images: Number of its test images.
    """

    name: str
    hub_id: str
    classes: tuple[str, ...]
    test_images: int


CIFAR10 = DatasetRecord(
    "CIFAR-10",
    "uoft-cs/cifar10",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    test_images=10_000,
)
CIFAR100 = DatasetRecord(
    "CIFAR-100",
    "uoft-cs/cifar100",
    tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
        bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
        cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox
        girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
        maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
        road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
        streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
        trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split()
    ),
    test_images=10_000,
)
DATASETS = (CIFAR10, CIFAR100)


@dataclass(frozen=True)
class CheckpointRecord:
    """What is known of one trained model: where its file is, what it must be, how good it is.

    Attributes:
        name: `arch.tag`.
        sha256: Digest of the safetensors file, in hexadecimal.
        size: Length of the file, in bytes.
        dataset: What the model was trained and measured on.
        top1: Top-1 accuracy on the test images, in percent.
        ece: Expected calibration error of its probabilities on them, in percent.
        revision: Tag or commit of the Hub repository.
    """

    name: str
    sha256: str
    size: int
    dataset: DatasetRecord
    top1: float
    ece: float
    revision: str = "v1"

    @property
    def arch(self) -> str:
        """The architecture, by its name in timm's registry."""
        return self.name.partition(".")[0]

    @property
    def repo_id(self) -> str:
        """The Hub repository; `CONVMIXER_HUB_NAMESPACE` moves it to another owner."""
        return f"{os.environ.get('CONVMIXER_HUB_NAMESPACE') or 'convmixer-hub'}/{self.name}"

    @property
    def repository(self) -> Repository:
        """The same, for asking the Hub."""
        return Repository(
            self.repo_id,
            self.revision,
            name_advice="check CONVMIXER_HUB_NAMESPACE and HF_ENDPOINT",
            fallback_advice=f", or {OWN_COPY_ADVICE}",
            offline_advice=", or copy the Hub's cache folder from a machine where "
            f"`convmixer pull {self.name}` was run",
        )


# The first one of an arch is its default.
RECORDS: dict[str, CheckpointRecord] = {
    record.name: record
    for record in [
        CheckpointRecord(
            name="convmixer_cifar.cifar10",
            sha256="f8409bcbf20889d4fe02511511ab5b4030613defd5addd0c6ee03d6cf1ea10c6",
            size=2620544,
            dataset=CIFAR10,
            top1=95.78,
            ece=1.2,
            revision="v4",
        ),
        CheckpointRecord(
            name="convmixer_cifar.cifar100",
            sha256="fde57f4d59d7b9603a25a43a226cd91a3f33cfac4d07f07be3565ee8b2bbb522",
            size=2713088,
            dataset=CIFAR100,
            top1=77.16,
            ece=2.22,
        ),
        CheckpointRecord(
            name="convmixer_256_8_ks9_p1.cifar10",
            sha256="6f3b439447e0d275fee3715d407e5a4705f377046e8b90376e36f2c076a1a76f",
            size=2873480,
            dataset=CIFAR10,
            top1=95.55,
            ece=0.41,
        ),
        CheckpointRecord(
            name="convmixer_256_8_ks9_p1.cifar100",
            sha256="1480d9c97a7e3234f8d802c098c122f84dd687587b8149f372f728ff87b77c93",
            size=2966016,
            dataset=CIFAR100,
            top1=76.95,
            ece=2.44,
        ),
        CheckpointRecord(
            name="convmixer_96_8_ks5_p1.cifar10",
            sha256="e698bfd511f23b64c9e8efb5480eda36d795f9dd5ba282c6588cfe527cb848ad",
            size=421488,
            dataset=CIFAR10,
            top1=93.28,
            ece=1.28,
            revision="v2",
        ),
        CheckpointRecord(
            name="convmixer_96_8_ks5_p1.cifar100",
            sha256="1508b31ba6a21a8777895463e520290bccc06f7e0b556eec5c395f407c61c550",
            size=456432,
            dataset=CIFAR100,
            top1=70.52,
            ece=2.29,
        ),
    ]
}

# The trained model in each Hub repository, as timm may name it.
REPOSITORIES = {
    repository: record.name
    for record in RECORDS.values()
    for repository in (record.repo_id, f"{record.repo_id}@{record.revision}")
}


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known names are nearest to this one, or else name them all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"


def get_record(name: str) -> CheckpointRecord:
    """Look up the record of a trained model; a bare arch means the first of its tags.

    Raises:
        UnknownModelError: If no trained model has this name.
    """
    record = next((r for r in RECORDS.values() if name in (r.name, r.arch)), None)
    if record is None:
        raise UnknownModelError(f"no trained weights are named '{name}'; {suggest(name, RECORDS)}")
    return record
