"""The models by name: variants, their timm configurations, and how they are built.

timm finds `default_cfgs` by that name in the module of the `@register_model` functions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from .checkpoint import (
    CONFIG_FILE,
    RECORDS,
    WEIGHTS_FILE,
    CheckpointRecord,
    check_safetensors,
    check_state_dict,
    find_checkpoint,
    get_record,
    suggest,
)
from .errors import CheckpointError, UnknownModelError
from .model import ConvMixer

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CLASSIFIER = "classification.linear"
FIRST_CONV = "patch_emb.conv"


def _cfg(patch_size: int, name: str | None = None) -> dict[str, Any]:
    """Make the timm configuration of a CIFAR-10 model; one without weights has no name."""
    return {
        "hf_hub_id": RECORDS[name].repo_id if name else None,
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (32 // patch_size, 32 // patch_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER,
        "label_names": CIFAR10_CLASSES,
        "license": "mit",
        "paper_ids": "arXiv:2201.09792",
    }


default_cfgs = generate_default_cfgs(
    {
        "convmixer_cifar.cifar10": _cfg(patch_size=2, name="convmixer_cifar.cifar10"),
        "convmixer_256_8_ks9_p1.untrained": _cfg(patch_size=1),
        "convmixer_96_8_ks5_p1.untrained": _cfg(patch_size=1),
    }
)


@register_model
def convmixer_cifar(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8 with kernel 7 and patch 2, for 32×32 images: 0.64 M parameters."""
    sizes: dict[str, Any] = {"d_model": 256, "n_layers": 8, "kernel_size": 7, "patch_size": 2}
    return _create_convmixer("convmixer_cifar", pretrained, **sizes, **kwargs)


@register_model
def convmixer_256_8_ks9_p1(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8 with kernel 9 on single pixels, the paper's best for CIFAR-10: 0.71 M."""
    sizes: dict[str, Any] = {"d_model": 256, "n_layers": 8, "kernel_size": 9, "patch_size": 1}
    return _create_convmixer("convmixer_256_8_ks9_p1", pretrained, **sizes, **kwargs)


@register_model
def convmixer_96_8_ks5_p1(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-96/8 with kernel 5 on single pixels, for tests and small devices: 0.10 M."""
    sizes: dict[str, Any] = {"d_model": 96, "n_layers": 8, "kernel_size": 5, "patch_size": 1}
    return _create_convmixer("convmixer_96_8_ks5_p1", pretrained, **sizes, **kwargs)


def _create_convmixer(
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> ConvMixer:
    """Build a model as timm does; weights of the registry are verified before timm sees them."""
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        registered = default_cfgs[variant].cfgs.get(cfg.tag)
        chosen_by_caller = cfg.source or cfg.file or cfg.url or cfg.state_dict
        if cfg.source == "local-dir":
            check_safetensors(Path(str(cfg.file)) / WEIGHTS_FILE)
        elif registered and not chosen_by_caller and cfg.hf_hub_id == registered.hf_hub_id:
            if not registered.has_weights:
                raise UnknownModelError(
                    f"{variant} has no trained weights; use pretrained=False, "
                    f"or one of: {', '.join(RECORDS)}"
                )
            file = find_checkpoint(f"{variant}.{cfg.tag}", cache_dir=kwargs.get("cache_dir"))
            pretrained_cfg_overlay = {**(pretrained_cfg_overlay or {}), "file": str(file)}
    return build_model_with_cfg(
        ConvMixer,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=_check_fit,
        feature_cfg={"feature_cls": "getter", "out_indices": kwargs.pop("out_indices", 3)},
        **kwargs,
    )


def get_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model: input, labels, where its weights came from."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def get_label_names(model: nn.Module) -> list[str] | None:
    """Name the classes of a model by index; None if its configuration is not about its classes."""
    names = get_config(model).get("label_names")
    return list(names) if names and len(names) == model.num_classes else None


def _check_fit(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let nothing but the head and the stem differ, and these only where timm adapts them.

    timm loads leniently as soon as the number of classes differs, whatever the checkpoint holds.
    """
    cfg = get_config(model)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    stem = f"{FIRST_CONV}.weight"
    d_model, _, *patch = expected[stem]
    expected[stem] = (d_model, cfg["input_size"][0], *patch)
    head = {f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"}
    ignored = head if model.num_classes != cfg["num_classes"] else set()
    source = cfg.get("file") or cfg.get("hf_hub_id") or "the checkpoint"
    check_state_dict(state_dict, expected, ignored, source)
    return state_dict


def load_trained(name: str) -> nn.Module:
    """Build a trained model from its name, or from a folder with `config.json` and weights.

    A known name is never taken for a folder; write `./name` for a folder that is called like one.

    Args:
        name: `arch.tag`, an arch alone for its first tag, or the path of a folder, such as a run
            of `train`.

    Raises:
        UnknownModelError: If it is neither a trained model's name nor a folder.
        CheckpointError: If the weights cannot be had, are damaged or do not fit.
    """
    folder = Path(name)
    try:
        known = get_record(name)
    except UnknownModelError:
        if not folder.is_dir():
            raise
    else:
        return timm.create_model(known.name, pretrained=True)
    config_file = folder / CONFIG_FILE
    try:
        arch = json.loads(config_file.read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{config_file}: missing, or not a model's configuration; "
            "name a folder that `convmixer train` or timm wrote"
        ) from None
    if not timm.is_model(arch):
        raise CheckpointError(
            f"{config_file}: neither timm nor this package has the architecture {arch!r}; "
            f"{suggest(str(arch), default_cfgs)}"
        )
    check_safetensors(folder / WEIGHTS_FILE)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@dataclass(frozen=True)
class ModelInfo:
    """One line of the list of models; a model without trained weights has no record.

    Attributes:
        name: `arch.tag`, or the arch alone where there are no weights.
        parameters: Their number.
        input_size: Channels, height and width of an image.
        record: What is known of the weights.
    """

    name: str
    parameters: int
    input_size: tuple[int, int, int]
    record: CheckpointRecord | None


def list_models() -> list[ModelInfo]:
    """List every registered model of this package, trained ones first for each arch."""
    models = []
    for arch, default_cfg in default_cfgs.items():
        network = timm.create_model(arch, device="meta")
        parameters = sum(parameter.numel() for parameter in network.parameters())
        for tag, cfg in default_cfg.cfgs.items():
            record = RECORDS.get(f"{arch}.{tag}")
            name = record.name if record else arch
            models.append(ModelInfo(name, parameters, cfg.input_size, record))
    return models
