"""ConvMixer, from "Patches Are All You Need?" (Trockman & Kolter, 2022, arXiv:2201.09792).

An image is cut into patches, and every patch becomes a vector of `d_model` numbers. Then come
layers that mix, in turn, *positions* (a depthwise convolution, with a residual connection around
it) and *channels* (a 1x1 convolution, without one). The mean over all positions goes to a linear
head.

The names of the modules, and so the keys of the state dict, are those of labml_nn's ConvMixer.
Methods and attributes that timm expects of its models stand at the end of `ConvMixer`.
"""

# No `from __future__ import annotations` here: torch.fx would then tell TorchScript that the type
# of an image is the string "Tensor".

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath, SelectAdaptivePool2d, get_device_dtype
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import ModelSizeError
from .layouts import check_fit, convert_layout

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def _get_activation(act_layer: type[nn.Module] | str) -> type[nn.Module]:
    if not isinstance(act_layer, str):
        return act_layer
    if act_layer not in ACTIVATIONS:
        raise ModelSizeError(
            f"act_layer is {act_layer!r}: give {' or '.join(ACTIVATIONS)}, or a class of modules"
        )
    return ACTIVATIONS[act_layer]


class ConvMixerLayer(nn.Module):
    """One layer: spatial mixing with a residual, then channel mixing (paper, section 2).

    Args:
        d_model: Number of channels.
        kernel_size: Side of the depthwise kernel, in patches; odd.
        act_layer: Class of the activation; the paper uses exact (erf) GELU.
        drop_path_rate: Probability that, in training, an image skips spatial mixing.

    Raises:
        ModelSizeError: If the kernel size is even.
    """

    def __init__(
        self,
        d_model: int,
        kernel_size: int,
        act_layer: type[nn.Module] = nn.GELU,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ModelSizeError(
                f"kernel_size is {kernel_size}: an even kernel has no center, give an odd one, "
                f"such as {kernel_size + 1}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depth_wise_conv = nn.Conv2d(
            d_model,
            d_model,
            kernel_size,
            padding=kernel_size // 2,  # "same"; quantization and TorchScript need the number
            groups=d_model,
            **factory,
        )
        self.act1 = act_layer()
        self.norm1 = nn.BatchNorm2d(d_model, **factory)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.point_wise_conv = nn.Conv2d(d_model, d_model, kernel_size=1, **factory)
        self.act2 = act_layer()
        self.norm2 = nn.BatchNorm2d(d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, d_model, height, width]` to the same shape."""
        x = x + self.drop_path(self.norm1(self.act1(self.depth_wise_conv(x))))
        return self.norm2(self.act2(self.point_wise_conv(x)))


class PatchEmbeddings(nn.Module):
    """Cut an image into patches and embed each one: a convolution whose stride is its size.

    Args:
        d_model: Number of channels of an embedding.
        patch_size: Side of a square patch, in pixels.
        in_channels: Number of channels of the image.
        act_layer: Class of the activation.
    """

    def __init__(
        self,
        d_model: int,
        patch_size: int,
        in_channels: int = 3,
        act_layer: type[nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_channels, d_model, patch_size, stride=patch_size, **factory)
        self.act = act_layer()
        self.norm = nn.BatchNorm2d(d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_channels, height, width]` to `[batch, d_model, rows, columns]`."""
        return self.norm(self.act(self.conv(x)))


class ClassificationHead(nn.Module):
    """Pool over all positions, then one linear map to the classes.

    Args:
        d_model: Number of channels.
        n_classes: Number of classes; 0 leaves the linear map out.
        global_pool: timm's name of a pooling (`avg`, `max`, `avgmax`, …), or `''` for none.
        drop_rate: Probability that dropout zeroes a pooled feature, in training.
    """

    def __init__(
        self,
        d_model: int,
        n_classes: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.drop = nn.Dropout(drop_rate)
        self.reset(n_classes, global_pool, device=device, dtype=dtype)

    def reset(
        self,
        n_classes: int,
        global_pool: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Start over with a fresh linear map for `n_classes` classes and this pooling."""
        if n_classes < 0:
            raise ModelSizeError(f"n_classes is {n_classes}: give 0 (no head) or more")
        self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.num_features = self.d_model * self.pool.feat_mult()
        self.linear = (
            nn.Linear(self.num_features, n_classes, device=device, dtype=dtype)
            if n_classes > 0
            else nn.Identity()
        )
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map `[batch, d_model, rows, columns]` to logits `[batch, n_classes]`.

        With `pre_logits`, stop before the linear map: `[batch, num_features]`.
        """
        x = self.drop(self.pool(x))  # [batch, num_features]
        return x if pre_logits else self.linear(x)


class ConvMixer(nn.Module):
    """The whole network: patches, `n_layers` ConvMixer layers, head.

    Args:
        d_model: Number of channels of every layer (the paper's h).
        n_layers: Number of layers (the paper's d).
        kernel_size: Side of the depthwise kernels, in patches; odd (the paper's k).
        patch_size: Side of a patch, in pixels (the paper's p).
        num_classes: Number of classes; 0 for a network without a head.
        in_chans: Number of channels of the images.
        global_pool: timm's name of a pooling, or `''` for none.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth: that of the last layer; it rises evenly from 0.
        act_layer: Class of the activation, or its name in `ACTIVATIONS`.
        device: Where the parameters are made; torch's default if not given.
        dtype: Type of the parameters; torch's default if not given.

    Raises:
        ModelSizeError: If the kernel size is even, `num_classes` is negative, or no activation has
            this name.
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: type[nn.Module] | str = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        act_layer = _get_activation(act_layer)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel_size = kernel_size
        self.patch_emb = PatchEmbeddings(d_model, patch_size, in_chans, act_layer, **factory)
        rates = [drop_path_rate * i / max(n_layers - 1, 1) for i in range(n_layers)]
        self.conv_mixer_layers = nn.Sequential(
            *[ConvMixerLayer(d_model, kernel_size, act_layer, rate, **factory) for rate in rates]
        )
        self.classification = ClassificationHead(
            d_model, num_classes, global_pool, drop_rate, **factory
        )

        # What timm asks of a model.
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = d_model
        self.global_pool = global_pool
        self.head_hidden_size = self.classification.num_features
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": d_model, "reduction": patch_size, "module": f"conv_mixer_layers.{i}"}
            for i in range(n_layers)
        ]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict as torch does, in any layout of `layouts.LAYOUTS`.

        Args:
            state_dict: Tensors by key; prefixes of DDP, torch.compile and averages may stand
                before the keys. It does not tell the activation: that stays the model's.
            strict: Whether every key has to be there; shapes have to fit in any case.
            assign: Keep the given tensors instead of copying from them.

        Raises:
            CheckpointError: If strict, naming the first key that does not fit; for a mixture of
                layouts in any case.
            RuntimeError: torch's own, if what is not floating point, such as a counter, does not
                fit.
        """
        own = self.state_dict()
        given = state_dict.values() if isinstance(state_dict, Mapping) else [state_dict]
        if not all(isinstance(value, Tensor) for value in [*own.values(), *given]):
            # A quantized model, or what torch refuses.
            return super().load_state_dict(state_dict, strict, assign)
        converted = convert_layout(state_dict)
        if strict:
            shapes = {key: tensor.shape for key, tensor in own.items()}
            # What is not floating point, such as a counter, torch checks itself.
            others = {key for key, tensor in own.items() if not tensor.is_floating_point()}
            check_fit(converted, shapes, "the state dict", state_dict, others)
        return super().load_state_dict(converted, strict, assign)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to `[batch, d_model, rows, columns]`."""
        x = self.patch_emb(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.conv_mixer_layers, x)
        return self.conv_mixer_layers(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits `[batch, num_classes]`, or to what stands before them."""
        return self.classification(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, in_chans, height, width]` to logits `[batch, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    # timm's interface, as every model of timm's has it.

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the features and collect the outputs of chosen layers (timm convention).

        Args:
            x: Images `[batch, in_chans, height, width]`.
            indices: The last n layers if a number, these layers if a list, all if None.
            norm: Accepted for timm's sake; there is no final norm to apply.
            stop_early: Do not run the layers behind the last one asked for.
            output_fmt: Only `NCHW`.
            intermediates_only: Return the collected outputs alone.
        """
        if output_fmt != "NCHW":
            raise ModelSizeError(f"output_fmt is '{output_fmt}': ConvMixers give 'NCHW' only")
        take, last = feature_take_indices(len(self.conv_mixer_layers), indices)
        layers = self.conv_mixer_layers
        if stop_early and not torch.jit.is_scripting():  # TorchScript does not slice modules
            layers = layers[: last + 1]
        intermediates = []
        x = self.patch_emb(x)
        for i, layer in enumerate(layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x)
            else:
                x = layer(x)
            if i in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the layers behind the last one in `indices`, and the head if `prune_head`."""
        take, last = feature_take_indices(len(self.conv_mixer_layers), indices)
        self.conv_mixer_layers = self.conv_mixer_layers[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear map to the classes."""
        return self.classification.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one, of classes without names; the pooling may stay."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.classification.reset(num_classes, self.global_pool, **get_device_dtype(self))
        self.num_classes = num_classes
        config: dict = getattr(self, "pretrained_cfg", {})  # timm's, once the model is built
        for named in ("label_names", "label_descriptions"):
            config.pop(named, None)
        self.head_hidden_size = self.classification.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Group parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^patch_emb", "blocks": r"^conv_mixer_layers\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: compute the layers once more in the backward pass."""
        self.grad_checkpointing = enable
