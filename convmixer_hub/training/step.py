"""One training step: forward and backward pass, and the update of the weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .network import Network
from .settings import TrainingSettings
from .teacher import Teacher

# Steps before one is captured: they compile what they need, and make the optimizer's buffers.
WARM_UP_STEPS = 3
# Distillation (Hinton et al., arXiv:1503.02531), with the values of Tian et al. (arXiv:1910.10699).
TEACHER_TEMPERATURE = 4.0
TEACHER_SHARE = 0.9


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    numbers: Tensor


class TrainingStep:
    """Takes the training steps of a run; each call is one step.

    On a GPU, a step is a thousand kernels, and launching them takes longer than running them. So
    the step is captured there as a CUDA graph when the size of the images changes, and replayed.

    Args:
        network: What is trained.
        settings: Those of the run.
        dtype: The type that most of a step computes in.
        device: Where it computes.
        teacher: Whose soft targets are learned beside the labels, if there is one.
    """

    def __init__(
        self,
        network: Network,
        settings: TrainingSettings,
        dtype: torch.dtype,
        device: torch.device,
        teacher: Teacher | None = None,
    ) -> None:
        self.network = network
        self.settings = settings
        self.dtype = dtype
        self.device = device
        self.teacher = teacher
        self.captures = network.optimizer.param_groups[0]["capturable"]
        # Tensors, which a captured step reads anew each time.
        self._rates = [torch.zeros((), device=device) for _ in network.optimizer.param_groups]
        self._stream = torch.cuda.Stream() if self.captures else None
        self._kind: Hashable = None
        self._warmed_up = 0
        self._captured: _Captured | None = None

    def __call__(
        self, images: Tensor, labels: Tensor, targets: Tensor, learning_rate_factor: float
    ) -> Tensor:
        """Take a step.

        Args:
            images: `[batch, channels, height, width]`, on the device, as are the others.
            labels: `[batch]`.
            targets: The labels again, or `[batch, classes]` where images are mixed.
            learning_rate_factor: Share of the peak of the learning rate.

        Returns:
            Sum of the losses, number of correct images, and norm of the gradient: `[3]`, on the
            device. If one is not finite, neither are the weights from now on.
        """
        for group, rate in zip(self.network.optimizer.param_groups, self._rates):
            value = self.settings.learning_rate * learning_rate_factor * group.get("lr_scale", 1.0)
            group["lr"] = rate.fill_(value) if self.captures else value
        inputs = (images, labels, targets)
        if not self.captures:
            return self._compute(*inputs)
        kind = tuple((x.shape, x.dtype) for x in inputs)
        if kind != self._kind:
            torch.cuda.synchronize()  # the last graph may still be in use
            self._kind, self._warmed_up, self._captured = kind, 0, None
        if self._warmed_up < WARM_UP_STEPS:
            self._warmed_up += 1
            return self._warm_up(*inputs)
        if self._captured is None:
            self._captured = self._capture(inputs)
        for buffer, x in zip(self._captured.inputs, inputs):
            buffer.copy_(x)
        self._captured.graph.replay()
        return self._captured.numbers.clone()

    def _compute(self, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        network, settings = self.network, self.settings

        # Forward: cross-entropy, and the teacher's soft targets.
        in_bf16 = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_bf16):
            logits = network.module(images).float()
        smoothing = 0.0 if targets.is_floating_point() else settings.label_smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is not None:
            # On a CPU it is fastest in fp32, see `prepare_for_inference`.
            in_bf16 = in_bf16 and self.device.type == "cuda"
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_bf16):
                theirs = self.teacher(images).float()
            loss = loss.lerp(_distillation_loss(logits, theirs), TEACHER_SHARE)

        # Backward, and update.
        network.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.model.parameters(), settings.clip_grad)
        network.optimizer.step()

        correct = (logits.detach().argmax(dim=1) == labels).sum()
        numbers = (loss.detach().double() * len(labels), correct.double(), norm.double())
        return torch.stack(numbers)

    def _warm_up(self, *inputs: Tensor) -> Tensor:
        """Compute on a side stream, as torch wants it before a capture."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            numbers = self._compute(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return numbers

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured:
        buffers = tuple(x.clone() for x in inputs)
        # Gradients are made anew in the graph, none of them may be left from a step before.
        self.network.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that brings images, may go on.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            numbers = self._compute(*buffers)
        return _Captured(graph, buffers, numbers)


def _distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of softened probabilities, times T², as a mean over the batch."""
    mine = F.log_softmax(logits / TEACHER_TEMPERATURE, dim=1)
    theirs = F.log_softmax(teacher / TEACHER_TEMPERATURE, dim=1)
    divergence = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return divergence * TEACHER_TEMPERATURE**2
