"""How fast a model trains, beside others of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.models.convmixer import Residual
from torch import nn
from torch.nn import functional as F

from ..errors import TrainingError
from ..hub.records import RECORDS, suggest
from ..machine import find_device
from ..model.config import get_config
from ..model.convmixer import ConvMixer
from ..model.cpu import choose_precision, keep_freed_memory, speed_up_on_cpu
from ..model.gpu import FastOnGPU
from ..training.network import Network
from ..training.settings import TrainingSettings
from ..training.step import WARM_UP_STEPS, TrainingStep
from ..zoo import default_cfgs
from .turns import Timing, time_in_turns


def _make_ours(model: ConvMixer) -> nn.Module:
    """Prepare our model as `train` does."""
    if torch.cuda.is_available():
        return FastOnGPU(model)
    keep_freed_memory()
    speed_up_on_cpu(model)
    return model


def make_timms(model: ConvMixer) -> nn.Module:
    """Make timm's ConvMixer of the same size."""
    return TimmConvMixer(
        dim=model.num_features,
        depth=len(model.conv_mixer_layers),
        kernel_size=model.kernel_size,
        patch_size=model.patch_emb.patch_size,
        num_classes=model.num_classes,
    )


def _make_sequential(model: ConvMixer) -> nn.Module:
    """Make the `nn.Sequential` of the paper's appendix, of the same size."""
    dim, kernel_size, patch_size = (
        model.num_features,
        model.kernel_size,
        model.patch_emb.patch_size,
    )

    def then_norm(conv: nn.Module) -> nn.Sequential:
        return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(dim))

    layers = [
        nn.Sequential(
            Residual(then_norm(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"))),
            then_norm(nn.Conv2d(dim, dim, kernel_size=1)),
        )
        for _ in model.conv_mixer_layers
    ]
    return nn.Sequential(
        then_norm(nn.Conv2d(3, dim, patch_size, stride=patch_size)),
        *layers,
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, model.num_classes),
    )


@dataclass(frozen=True)
class _Variant:
    make: Callable[[ConvMixer], nn.Module]
    channels_last: bool = False
    bf16: bool | None = False  # None: where it is faster
    compiled: bool = False


VARIANTS: dict[str, _Variant] = {
    "timm": _Variant(make_timms),
    "timm-compiled": _Variant(make_timms, channels_last=True, compiled=True),
    "timm-bf16": _Variant(make_timms, channels_last=True, bf16=True),
    "timm-bf16-compiled": _Variant(make_timms, channels_last=True, bf16=True, compiled=True),
    "sequential": _Variant(_make_sequential),
    "ours": _Variant(_make_ours, bf16=None),
}


def check_is_ours(name: str) -> None:
    """Refuse what is no model of this package.

    Raises:
        TrainingError: Naming it.
    """
    if name not in {*default_cfgs, *RECORDS}:
        raise TrainingError(
            f"{name}: is no ConvMixer of this package; {suggest(name, [*default_cfgs, *RECORDS])}"
        )


def bench_train(
    arch: str,
    variants: Sequence[str] = (),
    batch_size: int = 128,
    rounds: int = 5,
) -> dict[str, Timing]:
    """Time training steps (forward, backward, AdamW) of several implementations of one ConvMixer.

    Args:
        arch: One of this package's, or a trained model's name, whose weights are not loaded.
        variants: Keys of `VARIANTS`; all if there are none. `timm` and `sequential` (the authors'
            code) are as a user gets them, in fp32, NCHW and eager; `compiled` and `bf16` go with
            channels_last memory. `ours` is prepared as in `train`, in bf16 where that is faster.
        batch_size: Images per step.
        rounds: Steps of each variant that count, in turns, after two that do not, four on a
            GPU.

    Returns:
        What each took, in the order of the variants. The remark is what most of it computed in,
        `fp32` or `bf16`; for ours, and why.

    Raises:
        TrainingError: If it is no model of this package, or a variant fails.
    """
    check_is_ours(arch)
    makers = {
        name: partial(_make_step, arch, VARIANTS[name], batch_size) for name in variants or VARIANTS
    }
    # On a GPU, ours captures a step after these.
    warm_up = WARM_UP_STEPS + 1 if torch.cuda.is_available() else 2
    return time_in_turns(makers, rounds, warm_up)


def _make_step(arch: str, variant: _Variant, batch_size: int) -> tuple[Callable[[], float], str]:
    torch.manual_seed(0)
    device = find_device()
    base = timm.create_model(arch)
    assert isinstance(base, ConvMixer)
    size = get_config(base)["input_size"][-1]
    model = variant.make(base).to(device).train()
    ours_on_gpu = isinstance(model, FastOnGPU)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True, capturable=ours_on_gpu)
    images = torch.randn(batch_size, 3, size, size, device=device)
    if variant.compiled:
        model.compile()
    if variant.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(base.num_classes, (batch_size,), device=device)
    if variant.bf16 is None:
        precision, reason = choose_precision(base, device, size)
        bf16, remark = precision == "bf16", f"{precision}: {reason}"
    else:
        bf16, remark = variant.bf16, "bf16" if variant.bf16 else "fp32"

    if ours_on_gpu:
        network = Network(base, model, None, optimizer)
        dtype = torch.bfloat16 if bf16 else torch.float32
        take_step = TrainingStep(network, TrainingSettings(arch), dtype, device)

    def step() -> float:
        start = time.perf_counter()
        if ours_on_gpu:
            take_step(images, labels, labels, 1.0).tolist()
            return (time.perf_counter() - start) / batch_size
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / batch_size

    return step, remark
