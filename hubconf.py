"""Entry points of torch.hub: `torch.hub.load("OWNER/REPO", "convmixer_cifar", pretrained=True)`.

Keyword arguments go on to `timm.create_model`: `num_classes`, `in_chans`, `label_names`, ….
"""

import warnings
from pathlib import Path as _Path

import timm

import convmixer_hub  # registers the models

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

_used = _Path(convmixer_hub.__file__).resolve().parent.parent
if _used != _Path(__file__).resolve().parent:
    warnings.warn(
        f"convmixer_hub was imported from {_used} before, and is used instead of the copy in "
        f"{_Path(__file__).resolve().parent}; restart Python to use that",
        stacklevel=2,
    )


def convmixer_cifar(pretrained=False, **kwargs):
    """ConvMixer-256/8, kernel 7, patch 2, for 32×32 images; trained on CIFAR-10.

    `pretrained_cfg="cifar100"` gives the weights that were trained on CIFAR-100.
    """
    return timm.create_model("convmixer_cifar", pretrained=pretrained, **kwargs)


def convmixer_256_8_ks9_p1(pretrained=False, **kwargs):
    """ConvMixer-256/8, kernel 9, patch 1, for 32×32 images; trained on CIFAR-10.

    `pretrained_cfg="cifar100"` gives the weights that were trained on CIFAR-100.
    """
    return timm.create_model("convmixer_256_8_ks9_p1", pretrained=pretrained, **kwargs)


def convmixer_96_8_ks5_p1(pretrained=False, **kwargs):
    """ConvMixer-96/8, kernel 5, patch 1, for 32×32 images; trained on CIFAR-10.

    `pretrained_cfg="cifar100"` gives the weights that were trained on CIFAR-100.
    """
    return timm.create_model("convmixer_96_8_ks5_p1", pretrained=pretrained, **kwargs)


def convmixer_1536_20(pretrained=False, **kwargs):
    """ConvMixer-1536/20, kernel 9, patch 7, for ImageNet: timm's model and weights."""
    return timm.create_model("convmixer_1536_20", pretrained=pretrained, **kwargs)


def convmixer_768_32(pretrained=False, **kwargs):
    """ConvMixer-768/32 (ReLU), kernel 7, patch 7, for ImageNet: timm's model and weights."""
    return timm.create_model("convmixer_768_32", pretrained=pretrained, **kwargs)


def convmixer_1024_20_ks9_p14(pretrained=False, **kwargs):
    """ConvMixer-1024/20, kernel 9, patch 14, for ImageNet: timm's model and weights."""
    return timm.create_model("convmixer_1024_20_ks9_p14", pretrained=pretrained, **kwargs)
