"""timm's Muon, as fast as the device allows: another dtype, and few kernels on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor
from torch.optim.adamw import adamw


@contextmanager
def fast_muon(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let timm's Muon, which has no options for this, compute as is fastest.

    Args:
        dtype: What its products compute in; where bfloat16, timm's choice, is slow, they would take
            longer than the rest of the step.
        device: On a GPU, timm's thousand small kernels take longer to launch than to run. There,
            matrices of one shape are updated at once, and so are all other parameters. The results
            differ by rounding.
    """
    newton_schulz = partial(muon.zeropower_via_newtonschulz, dtype=dtype)
    changes: dict[str, Any] = {"zeropower_via_newtonschulz": newton_schulz}
    if device.type == "cuda":
        changes |= {"muon": update_matrices, "adamw": update_others}
    before = {name: getattr(muon, name) for name in changes}
    vars(muon).update(changes)
    try:
        yield
    finally:
        vars(muon).update(before)


def update_matrices(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_bufs: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    ns_steps: int,
    ns_coefficients: Any,
    adjust_lr_fn: str | None,
    eps: float,
    safety_factor: float,
    **defaults: Any,
) -> None:
    """Do what `timm.optim.muon.muon` does by default, for all matrices of one shape at once."""
    coefficients = muon.resolve_ns_coefficients(ns_coefficients, muon._COEFFICIENTS)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(momentum_bufs, grads, 1 - momentum)
    updates = [buffer.flatten(1) for buffer in momentum_bufs]
    members: dict[torch.Size, list[int]] = {}
    for i, update in enumerate(updates):
        members.setdefault(update.shape, []).append(i)
    for shape, indices in members.items():
        orthogonal = muon.zeropower_via_newtonschulz(
            torch.stack([updates[i] for i in indices]),
            ns_steps,
            coefficients,
            eps=eps,
            safety_factor=safety_factor,
        )
        scale = muon.get_lr_scale(shape, adjust_lr_fn) if adjust_lr_fn else 1.0
        for i, step in zip(indices, orthogonal.float() * (-lr * scale)):
            params[i].add_(step.view_as(params[i]))


def update_others(*tensors: Any, caution: bool, max_lr: float | None, **options: Any) -> None:
    """Do what `timm.optim.adamw.adamw` does by default, in few kernels."""
    adamw(*tensors, **options | {"fused": True})
