"""Trained ConvMixers by name. Importing this package registers the models with timm."""

# ruff: noqa: E402  (versions come first: older ones lack what is imported below)
from .version import __version__, check_versions

check_versions()

from .errors import (
    CheckpointError,
    ConvMixerHubError,
    DataError,
    ModelSizeError,
    PublishError,
    TrainingError,
    UnknownModelError,
)
from .hub.find import find_checkpoint
from .hub.records import CheckpointRecord, get_record
from .model.convmixer import ClassificationHead, ConvMixer, ConvMixerLayer, PatchEmbeddings
from .model.cpu import speed_up_on_cpu
from .model.inference import prepare_for_inference
from .zoo import convmixer_96_8_ks5_p1, convmixer_256_8_ks9_p1, convmixer_cifar

__all__ = [
    "CheckpointError",
    "CheckpointRecord",
    "ClassificationHead",
    "ConvMixer",
    "ConvMixerHubError",
    "ConvMixerLayer",
    "DataError",
    "ModelSizeError",
    "PatchEmbeddings",
    "PublishError",
    "TrainingError",
    "UnknownModelError",
    "__version__",
    "convmixer_96_8_ks5_p1",
    "convmixer_256_8_ks9_p1",
    "convmixer_cifar",
    "find_checkpoint",
    "get_record",
    "prepare_for_inference",
    "speed_up_on_cpu",
]
