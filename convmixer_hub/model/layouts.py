"""The layouts of a state dict: which implementation of ConvMixer gives which tensor what key.

All of them have the same tensors in the same shapes, so any layout can be turned into any other.
The activation is no tensor: no layout tells GELU from ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Layout:
    """How an implementation names the modules that hold tensors.

    Attributes:
        stem: Convolution and norm of the patch embedding.
        layers: What stands before the number of a layer.
        layer: Depthwise convolution, norm, 1x1 convolution and norm, within a layer.
        head: The linear map; `{}` is its place in an `nn.Sequential` of everything.
        first_layer: Number of the first layer.
    """

    stem: tuple[str, str]
    layers: str
    layer: tuple[str, str, str, str]
    head: str
    first_layer: int = 0

    def count_layers(self, modules: Collection[str]) -> int:
        """Count the layers, up to the last one that has a module among these."""
        names = "|".join(map(re.escape, self.layer))
        pattern = re.compile(rf"{re.escape(self.layers)}(\d{{1,4}})\.(?:{names})")
        matches = [pattern.fullmatch(module) for module in modules]
        return max([0, *(int(match[1]) - self.first_layer + 1 for match in matches if match)])

    def list_modules(self, n_layers: int) -> list[str]:
        """List the modules of a network, in the same order for every layout."""
        numbers = range(self.first_layer, self.first_layer + n_layers)
        layers = [f"{self.layers}{number}.{name}" for number in numbers for name in self.layer]
        # In an `nn.Sequential`, pooling and flattening stand before the linear map.
        return [*self.stem, *layers, self.head.format(self.first_layer + n_layers + 2)]


OURS = "ours"
LAYOUTS = {
    OURS: Layout(
        stem=("patch_emb.conv", "patch_emb.norm"),
        layers="conv_mixer_layers.",
        layer=("depth_wise_conv", "norm1", "point_wise_conv", "norm2"),
        head="classification.linear",
    ),
    "timm": Layout(
        stem=("stem.0", "stem.2"),
        layers="blocks.",
        layer=("0.fn.0", "0.fn.2", "1", "3"),
        head="head",
    ),
    # The authors' convmixer.py.
    "locuslab": Layout(
        stem=("0", "2"),
        layers="",
        layer=("0.fn.0", "0.fn.2", "1", "3"),
        head="{}",
        first_layer=3,
    ),
    # The short form in the authors' paper and README.
    "locuslab-short": Layout(
        stem=("0.0", "0.2"),
        layers="",
        layer=("0.0.0", "0.0.2", "1.0", "1.2"),
        head="{}",
        first_layer=1,
    ),
}

# DistributedDataParallel and AveragedModel; torch.compile; Lightning; moving averages by others.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema.", "ema_model.", "model_ema.")
_COUNTER = "n_averaged"  # AveragedModel's, beside the tensors of the model
# BatchNorm's counters, the only integers; torch loads without them, as from before 0.4.
_OPTIONAL = ".num_batches_tracked"


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers of a model put before all of its keys."""
    stripped = {key: tensor for key, tensor in state_dict.items() if key != _COUNTER}
    while stripped:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in stripped)), None)
        if prefix is None:
            break
        stripped = {key.removeprefix(prefix): tensor for key, tensor in stripped.items()}
    return stripped


def _get_module(key: str) -> str:
    return key.rpartition(".")[0]


def detect_layout(state_dict: Mapping[str, Tensor]) -> str | None:
    """Find the layout that most keys belong to; None if no key belongs to any."""
    modules = [_get_module(key) for key in strip_prefixes(state_dict)]

    def count_known(name: str) -> int:
        layout = LAYOUTS[name]
        known = set(layout.list_modules(layout.count_layers(modules)))
        return sum(module in known for module in modules)

    best = max(LAYOUTS, key=count_known)
    return best if count_known(best) else None


def find_networks(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Find the ConvMixers among other modules, as in a checkpoint of Lightning, by their prefix.

    A state dict that is one itself, or in which there is none, is given whole, without a prefix.
    """

    def is_convmixer(tensors: Mapping[str, Tensor]) -> bool:
        modules = {_get_module(key) for key in strip_prefixes(tensors)}
        return any(
            modules.issuperset(layout.stem) and layout.count_layers(modules)
            for layout in LAYOUTS.values()
        )

    parts: dict[str, dict[str, Tensor]] = {}
    if not is_convmixer(state_dict):
        for key, tensor in state_dict.items():
            prefix, _, rest = key.partition(".")
            parts.setdefault(prefix, {})[rest] = tensor
    networks = {prefix: tensors for prefix, tensors in parts.items() if is_convmixer(tensors)}
    return networks or {"": {**state_dict}}


def convert_layout(state_dict: Mapping[str, Tensor], target: str = OURS) -> dict[str, Tensor]:
    """Rename the keys of a state dict, whatever its layout, to those of another layout.

    Prefixes of wrappers go; keys that have no place in the layout stay as they are.

    Args:
        state_dict: Tensors by key.
        target: A key of `LAYOUTS`.

    Raises:
        CheckpointError: If two keys would become one, as in a mixture of layouts.
    """
    stripped = strip_prefixes(state_dict)
    detected = detect_layout(stripped)
    if detected in (None, target):
        return stripped
    source, wanted = LAYOUTS[detected], LAYOUTS[target]
    n_layers = source.count_layers(list(map(_get_module, stripped)))
    places = dict(zip(source.list_modules(n_layers), wanted.list_modules(n_layers)))
    converted: dict[str, Tensor] = {}
    for key, tensor in stripped.items():
        module, dot, name = key.rpartition(".")
        new_key = f"{places.get(module, module)}{dot}{name}"
        if new_key in converted:
            raise CheckpointError(
                f"the state dict has two tensors for {new_key!r}, as if layouts were mixed; "
                "give the state dict of one model"
            )
        converted[new_key] = tensor
    return converted


def check_fit(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Sequence[int]],
    source: str,
    given: Mapping[str, Tensor],
    ignored: Collection[str] = (),
) -> None:
    """Refuse a state dict in our layout unless every tensor is there, of its shape and kind.

    Args:
        state_dict: What is about to be loaded, from `convert_layout`.
        expected: The shape that each tensor must have, by key.
        source: Where the state dict comes from, for the message.
        given: What it was before that, for the message.
        ignored: Keys whose tensors are not going to be loaded.

    Raises:
        CheckpointError: Naming the first key that does not fit, and the layouts that were tried.
    """

    def refuse(problem: str) -> NoReturn:
        layout, names = detect_layout(given), ", ".join(LAYOUTS)
        tried = f"taken for layout {layout} of" if layout else "in none of the layouts"
        raise CheckpointError(
            f"{source}: {problem}; use the checkpoint of this architecture ({tried} {names})"
        )

    for key in [*expected, *(key for key in state_dict if key not in expected)]:
        if key in ignored or (key.endswith(_OPTIONAL) and key not in state_dict):
            continue
        if key not in state_dict:
            refuse(f"tensor {key!r} is missing")
        if key not in expected:
            refuse(f"the model has no tensor {key!r}")
        tensor = state_dict[key]
        found, wanted = tuple(tensor.shape), tuple(expected[key])
        if found != wanted:
            refuse(f"tensor {key!r} has shape {found}, the model's has {wanted}")
        if not tensor.is_floating_point() and not key.endswith(_OPTIONAL):
            raise CheckpointError(
                f"{source}: tensor {key!r} is {tensor.dtype}, not floating point; "
                "use the checkpoint that this one was quantized or converted from"
            )
