"""Trained ConvMixers by name. Importing this package registers the models with timm."""

from .checkpoint import find_checkpoint
from .errors import (
    CheckpointError,
    ConvMixerHubError,
    DataError,
    ModelSizeError,
    PublishError,
    TrainingError,
    UnknownModelError,
)
from .model import ClassificationHead, ConvMixer, ConvMixerLayer, PatchEmbeddings
from .records import CheckpointRecord, get_record
from .zoo import convmixer_96_8_ks5_p1, convmixer_256_8_ks9_p1, convmixer_cifar

__version__ = "0.1.0"

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
    "convmixer_96_8_ks5_p1",
    "convmixer_256_8_ks9_p1",
    "convmixer_cifar",
    "find_checkpoint",
    "get_record",
]
