"""The models by name: variants, their timm configurations, and how they are built.

timm finds `default_cfgs` by that name in the module of the `@register_model` functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)

from .checkpoints.adapt import adapt_checkpoint
from .checkpoints.files import check_safetensors
from .errors import ModelSizeError, UnknownModelError
from .hub.find import find_checkpoint
from .hub.records import CIFAR10, DATASETS, RECORDS, REPOSITORIES, WEIGHTS_FILE, CheckpointRecord
from .model.config import CLASSIFIER, FIRST_CONV, order_names
from .model.convmixer import ConvMixer

IMAGE_SIZE = 32  # pixels per side


@dataclass(frozen=True)
class Variant:
    """The sizes of an architecture.

    Attributes:
        d_model: Number of channels.
        n_layers: Number of layers.
        kernel_size: Side of the depthwise kernels, in patches.
        patch_size: Side of a patch, in pixels.
    """

    d_model: int
    n_layers: int
    kernel_size: int
    patch_size: int

    def count_parameters(self, num_classes: int) -> int:
        """Count the parameters of a model for images of 3 channels."""
        d, k, p = self.d_model, self.kernel_size, self.patch_size
        return d * (3 * p**2 + 3) + self.n_layers * d * (k**2 + d + 6) + (d + 1) * num_classes

    def count_macs(self, num_classes: int) -> int:
        """Count the multiply-accumulates for one image: of convolutions and head, as usual."""
        d, k, p = self.d_model, self.kernel_size, self.patch_size
        patches = (IMAGE_SIZE // p) ** 2
        return patches * d * (3 * p**2 + self.n_layers * (k**2 + d)) + d * num_classes


VARIANTS = {
    "convmixer_cifar": Variant(256, 8, kernel_size=7, patch_size=2),
    "convmixer_256_8_ks9_p1": Variant(256, 8, kernel_size=9, patch_size=1),
    "convmixer_96_8_ks5_p1": Variant(96, 8, kernel_size=5, patch_size=1),
}


def _make_cfg(arch: str, record: CheckpointRecord | None = None) -> dict[str, Any]:
    """Make the timm configuration of an architecture, with the trained weights of a record."""
    patches = IMAGE_SIZE // VARIANTS[arch].patch_size
    dataset = record.dataset if record else CIFAR10
    return {
        "hf_hub_id": record.repo_id if record else None,
        "num_classes": len(dataset.classes),
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "pool_size": (patches, patches),
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
    """Make the configurations of an architecture by `arch.tag`; timm's default is the first."""
    trained = {r.name: _make_cfg(arch, r) for r in RECORDS.values() if r.arch == arch}
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
    """ConvMixer-256/8 with kernel 9 on single pixels, as in the paper: 0.71 M parameters."""
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
    # 1. Where the weights come from, as timm resolves it, and of which classes they are.
    overlay = dict(pretrained_cfg_overlay or {})
    trained = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if overlay.get("url") and not trained.source:
        overlay.setdefault("hf_hub_id", None)  # timm would prefer the registered repository
        trained = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    known = _find_known(trained, overlay) if pretrained else None
    of_datasets = [list(dataset.classes) for dataset in DATASETS]
    if not trained.source and order_names(trained.label_names) in of_datasets:
        # The registry's own weights are of these classes; others may be of other ones.
        if known:
            overlay.setdefault("label_names", RECORDS[known].dataset.classes)
        elif pretrained or kwargs.get("num_classes"):
            overlay.setdefault("label_names", None)
        trained = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    # `model_args` in config.json, which timm passes on besides spreading them over the keywords.
    saved = kwargs.get("pretrained_model_args") or {}
    activation = saved.get("act_layer", "gelu") if trained.source else None
    cache_dir = kwargs.get("cache_dir")
    # 2. Check the weights; those on record are verified, and timm gets the verified file.
    if pretrained:
        if trained.source == "local-dir":
            check_safetensors(Path(str(trained.file)) / WEIGHTS_FILE)
        elif not (trained.has_weights or trained.state_dict):
            raise UnknownModelError(
                f"{variant} has no trained weights; use pretrained=False, "
                f"or one of: {', '.join(RECORDS)}"
            )
        elif known:
            file = find_checkpoint(known, cache_dir=cache_dir)
            # timm takes a file only where there is neither a source nor a state dict.
            overlay.update(file=str(file), source=None, state_dict=None)
            activation = "gelu"
    # 3. Names of classes, which set the size of the head.
    label_names = _choose_labels(_list_names(label_names), trained, saved, kwargs)
    if label_names:
        overlay.update(num_classes=len(label_names), label_names=tuple(label_names))
    return build_model_with_cfg(
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
        ),
        feature_cfg={"feature_cls": "getter", "out_indices": kwargs.pop("out_indices", 3)},
        **asdict(VARIANTS[variant]),
        **kwargs,
    )


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
    if label_names is None:
        return None
    names = order_names(label_names.tolist() if hasattr(label_names, "tolist") else label_names)
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(set(names)) < len(names):
        raise ModelSizeError(
            f"label_names is {label_names!r}: give a list of different names, or a dict of them by "
            "number from 0 on"
        )
    return cast("list[str]", names)


def _choose_labels(
    label_names: list[str] | None,
    trained: PretrainedCfg,
    saved: Mapping[str, Any],
    kwargs: dict[str, Any],
) -> list[str] | None:
    """Return the names if they are not those of the checkpoint; set `num_classes` to match.

    `saved` is the `model_args` of a checkpoint's config.json.
    """
    if not label_names or label_names == order_names(saved.get("label_names")):
        return None
    if kwargs.get("num_classes") not in (None, saved.get("num_classes"), len(label_names)):
        raise ModelSizeError(
            f"num_classes is {kwargs['num_classes']}, but label_names has {len(label_names)} "
            "names: give as many, or leave num_classes out"
        )
    kwargs["num_classes"] = len(label_names)
    return None if label_names == order_names(trained.label_names) else label_names
