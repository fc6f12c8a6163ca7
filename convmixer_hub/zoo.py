"""The models by name: variants, their timm configurations, and how they are built.

timm finds `default_cfgs` by that name in the module of the `@register_model` functions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from .checkpoints.adapt import adapt_checkpoint
from .checkpoints.convert import build_like, read_checkpoint
from .checkpoints.files import check_safetensors
from .checkpoints.resolve import Source, resolve
from .errors import (
    CheckpointError,
    ConvMixerHubError,
    ModelSizeError,
    UnknownModelError,
    first_line,
)
from .files import hash_file
from .hub.find import find_checkpoint
from .hub.records import (
    CIFAR10,
    CONFIG_FILE,
    DEFAULT_TAG,
    RECORDS,
    REPOSITORIES,
    WEIGHTS_FILE,
    CheckpointRecord,
    suggest,
)
from .model.config import CLASSIFIER, FIRST_CONV, get_config
from .model.convmixer import ConvMixer
from .model.layouts import convert_layout

_logger = logging.getLogger(__package__)


@dataclass(frozen=True)
class Variant:
    """The sizes of an architecture.

    Attributes:
        d_model: Number of channels.
        n_layers: Number of layers.
        kernel_size: Side of the depthwise kernels, in patches.
        patch_size: Side of a patch, in pixels.
        image_size: Side of the images, in pixels.
    """

    d_model: int
    n_layers: int
    kernel_size: int
    patch_size: int
    image_size: int = 32


VARIANTS = {
    "convmixer_cifar": Variant(256, 8, kernel_size=7, patch_size=2),
    "convmixer_256_8_ks9_p1": Variant(256, 8, kernel_size=9, patch_size=1),
    "convmixer_96_8_ks5_p1": Variant(96, 8, kernel_size=5, patch_size=1),
}


def _make_cfg(arch: str, record: CheckpointRecord | None = None) -> dict[str, Any]:
    """Make the timm configuration of an architecture, with the trained weights of a record."""
    side, places = VARIANTS[arch].image_size, VARIANTS[arch].image_size // VARIANTS[arch].patch_size
    dataset = record.dataset if record else CIFAR10
    return {
        "hf_hub_id": record.repo_id if record else None,
        "num_classes": len(dataset.classes),
        "input_size": (3, side, side),
        "pool_size": (places, places),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER,
        "label_names": dataset.classes,
        "license": "mit",
        "paper_ids": "arXiv:2201.09792",
    }


def _make_cfgs(arch: str) -> dict[str, dict[str, Any]]:
    """Make the configurations of an architecture by `arch.tag`, the default tag first."""
    records = sorted(
        (record for record in RECORDS.values() if record.arch == arch),
        key=lambda record: record.tag != DEFAULT_TAG,
    )
    trained = {record.name: _make_cfg(arch, record) for record in records}
    return trained or {f"{arch}.untrained": _make_cfg(arch)}


default_cfgs = generate_default_cfgs(
    {name: cfg for arch in VARIANTS for name, cfg in _make_cfgs(arch).items()}
)


@register_model
def convmixer_cifar(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8 with kernel 7 and patch 2, for 32×32 images: 0.64 M parameters."""
    return _create_convmixer("convmixer_cifar", pretrained, **kwargs)


@register_model
def convmixer_256_8_ks9_p1(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8 with kernel 9 on single pixels, the paper's best for CIFAR-10: 0.71 M."""
    return _create_convmixer("convmixer_256_8_ks9_p1", pretrained, **kwargs)


@register_model
def convmixer_96_8_ks5_p1(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-96/8 with kernel 5 on single pixels, for small devices: 0.10 M parameters."""
    return _create_convmixer("convmixer_96_8_ks5_p1", pretrained, **kwargs)


def _create_convmixer(
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    label_names: Any = None,
    **kwargs: Any,
) -> ConvMixer:
    """Build a model as timm does; weights on record are verified before timm sees them.

    With `label_names`, the model is for these classes, and its head keeps the rows of those that
    the checkpoint knows by the same name; see `_list_names` for how they may be given.
    """
    sizes = VARIANTS[variant]
    overlay = dict(pretrained_cfg_overlay or {})
    trained = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if overlay.get("url") and not trained.source:
        overlay.setdefault("hf_hub_id", None)  # timm would prefer the registered repository
        trained = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    # What the model of a folder was made with; timm repeats it among the keyword arguments.
    saved = kwargs.get("pretrained_model_args") or {}
    activation = saved.get("act_layer", "gelu") if trained.source else None
    cache_dir = kwargs.get("cache_dir")
    if pretrained:
        if trained.source == "local-dir":
            check_safetensors(Path(str(trained.file)) / WEIGHTS_FILE)
        elif not (trained.has_weights or trained.state_dict):
            raise UnknownModelError(
                f"{variant} has no trained weights; use pretrained=False, "
                f"or one of: {', '.join(RECORDS)}"
            )
        elif known := _find_known(trained, overlay):
            file = find_checkpoint(known, cache_dir=cache_dir)
            # timm takes a file only where there is neither a source nor a state dict.
            overlay.update(file=str(file), source=None, state_dict=None)
            activation = "gelu"
    label_names = _choose_labels(_list_names(label_names), trained, kwargs)
    if label_names:
        overlay.update(num_classes=len(label_names), label_names=tuple(label_names))
    changes: list[str] = []
    model = build_model_with_cfg(
        ConvMixer,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=partial(
            adapt_checkpoint,
            trained=trained,
            activation=activation,
            label_names=label_names,
            features_only=bool(kwargs.get("features_only")),
            cache_dir=cache_dir,
            changes=changes,
        ),
        feature_cfg={"feature_cls": "getter", "out_indices": kwargs.pop("out_indices", 3)},
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        kernel_size=sizes.kernel_size,
        patch_size=sizes.patch_size,
        **kwargs,
    )
    if changes:
        _logger.info("%s: %s", variant, "; ".join(changes))
    return model


def _find_known(trained: PretrainedCfg, overlay: dict[str, Any]) -> str | None:
    """Name the trained model that timm would fetch; None if the caller chose another file."""
    if trained.source == "hf-hub":  # whatever else the repository's own configuration says
        other = overlay.get("hf_hub_filename")
    else:
        other = trained.state_dict or trained.file or trained.hf_hub_filename
    return None if other else REPOSITORIES.get(trained.hf_hub_id or "")


def _list_names(label_names: Any) -> list[str] | None:
    """List the names of classes in the order of their numbers.

    Args:
        label_names: A list or tuple; an array, or an Index or Series of pandas; or a dict of names
            by number, such as transformers' `id2label`, in any order. None for none.

    Raises:
        ModelSizeError: If it is something else, such as a set, which has no order, or a name stands
            twice.
    """
    names = label_names
    if hasattr(names, "tolist"):  # numpy, pandas
        names = names.tolist()
    elif isinstance(names, Mapping):
        numbers = {str(number): name for number, name in names.items()}
        names = [numbers.get(str(i)) for i in range(len(numbers))]
    if names is None:
        return None
    if (
        not isinstance(names, (list, tuple))
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) < len(names)
    ):
        raise ModelSizeError(
            f"label_names is {label_names!r}: give a list of different names, or a dict of them by "
            "number from 0 on"
        )
    return list(names)


def _choose_labels(
    label_names: Sequence[str] | None, trained: PretrainedCfg, kwargs: dict[str, Any]
) -> Sequence[str] | None:
    """Set the number of classes by their names; None if these are those of the checkpoint."""
    saved = kwargs.get("pretrained_model_args") or {}
    if not label_names or list(label_names) == saved.get("label_names"):
        return None
    if kwargs.get("num_classes") not in (None, saved.get("num_classes"), len(label_names)):
        raise ModelSizeError(
            f"num_classes is {kwargs['num_classes']}, but label_names has {len(label_names)} "
            "names: give as many, or leave num_classes out"
        )
    kwargs["num_classes"] = len(label_names)
    return None if list(label_names) == list(trained.label_names or ()) else label_names


def load_trained(name: str | Path | Source, label_names: Sequence[str] | None = None) -> nn.Module:
    """Build a trained model from what names it.

    Args:
        name: As in `checkpoints.resolve.resolve`, or what that gave: a trained model's name, a
            folder such as a run of `train`, a repository of the Hub, or a file of weights, whose
            classes have no names unless it is on record. A `Path` is always a path.
        label_names: Classes that the model is to tell apart instead of those it was trained on, if
            it is one of this package.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If the weights cannot be found or downloaded, are damaged or do not fit.
        ModelSizeError: If a name stands twice in `label_names`.
    """
    source = name if isinstance(name, Source) else resolve(name)
    options: dict[str, Any] = {"label_names": label_names} if label_names else {}
    if source.record:  # verified by `resolve`, so timm gets the file
        overlay = {"file": str(source.file)}
        return timm.create_model(
            source.record.name, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    if not source.name and not label_names:
        return _load_file(source)
    source.check_is_whole()
    config_file = source.folder / CONFIG_FILE
    arch = source.config.get("architecture")
    if "architecture" not in source.config:
        raise CheckpointError(
            f"{config_file}: missing, or not a model's configuration; "
            "name a folder that `convmixer train` or timm wrote"
        )
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise CheckpointError(
            f"{config_file}: neither timm nor this package has the architecture {arch!r}; "
            f"{suggest(str(arch), default_cfgs)}"
        )
    if label_names and arch not in default_cfgs:
        raise CheckpointError(
            f"{source.folder}: holds timm's {arch}, which takes no label_names; "
            "name one of this package"
        )
    check_safetensors(source.file)
    try:
        return timm.create_model(source.name, pretrained=True, **options)
    except ConvMixerHubError:
        raise
    except Exception as error:  # of timm or torch, which have none of their own
        raise CheckpointError(
            f"{source.folder}: cannot be loaded as {arch} ({first_line(error)}); "
            f"fix its {CONFIG_FILE}, or name a folder that `convmixer train` or timm wrote"
        ) from None


def _load_file(source: Source) -> nn.Module:
    """Build the model of a file of weights alone, with the arch's own preprocessing."""
    if source.config:
        return load_trained(source.folder)
    digest = hash_file(source.file) if source.file.is_file() else ""
    if known := [record for record in RECORDS.values() if record.sha256 == digest]:
        return load_trained(replace(source, record=known[0]))
    checkpoint = read_checkpoint(str(source.file.absolute()))
    tensors = convert_layout(checkpoint.tensors)
    like = build_like(tensors, str(source.file))
    sizes = Variant(
        like.num_features, len(like.conv_mixer_layers), like.kernel_size, like.patch_emb.patch_size
    )
    found = [arch for arch, v in VARIANTS.items() if replace(v, image_size=32) == sizes]
    if not found:
        raise CheckpointError(
            f"{source.file}: no model of this package has its sizes; build a ConvMixer of these, "
            "which `convmixer info` tells, and load it with load_state_dict"
        )
    if checkpoint.activation is None:
        raise CheckpointError(
            f"{source.file}: nothing in it tells the activation; write a copy that does: convmixer "
            f"convert {source.file} OUT.safetensors --layout ours --activation gelu (or relu)"
        )
    model = timm.create_model(
        found[0],
        num_classes=like.num_classes,
        in_chans=like.in_chans,
        global_pool=like.global_pool,
        act_layer=checkpoint.activation,
    )
    model.load_state_dict(tensors)
    get_config(model)["label_names"] = None
    return model


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
        for tag, cfg in default_cfg.cfgs.items():
            network = timm.create_model(f"{arch}.{tag}", device="meta")
            parameters = sum(parameter.numel() for parameter in network.parameters())
            record = RECORDS.get(f"{arch}.{tag}")
            name = record.name if record else arch
            models.append(ModelInfo(name, parameters, cfg.input_size, record))
    return models
