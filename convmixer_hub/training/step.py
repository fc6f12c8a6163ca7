"""One training step: forward and backward pass, and the update of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..machine import get_world_size, sum_over_processes
from .network import Network
from .settings import TrainingSettings
from .teacher import Teacher

# Steps before one is recorded: they compile what they need, and make the optimizer's buffers.
STEPS_BEFORE_RECORDING = 3
# Of Hinton et al. (arXiv:1503.02531), with the values of Tian et al. (arXiv:1910.10699).
TEACHER_TEMPERATURE = 4.0
TEACHER_SHARE = 0.9


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    numbers: Tensor


class TrainingStep:
    """A step of a run; calling it takes one.

    A step is a thousand small programs on a GPU, which take less time than starting them does. So
    the step is recorded there once for each size of images (a CUDA graph), and replayed.

    Args:
        network: What is trained.
        settings: Those of the run.
        dtype: The type that most of a step computes in.
        device: Where it computes.
        teacher: What is learned from beside the labels, if anything is.
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
        self.records = device.type == "cuda" and get_world_size() == 1
        # Tensors, which a recorded step reads anew each time.
        self._rates = [torch.zeros((), device=device) for _ in network.optimizer.param_groups]
        self._taken: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}

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
            device. If one is no finite number, so are the weights from now on.
        """
        for group, rate in zip(self.network.optimizer.param_groups, self._rates):
            value = self.settings.learning_rate * learning_rate_factor * group.get("lr_scale", 1.0)
            group["lr"] = rate.fill_(value) if self.records else value
        inputs = (images, labels, targets)
        if not self.records:
            return self._compute(*inputs)
        kind = tuple((x.shape, x.dtype) for x in inputs)
        if kind not in self._recorded:
            self._taken[kind] += 1
            if self._taken[kind] <= STEPS_BEFORE_RECORDING:
                return self._compute_aside(*inputs)
            self._recorded[kind] = self._record(inputs)
        recorded = self._recorded[kind]
        for buffer, x in zip(recorded.inputs, inputs):
            buffer.copy_(x)
        recorded.graph.replay()
        return recorded.numbers.clone()

    def _compute(self, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        network, settings = self.network, self.settings
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
            loss = loss.lerp(_compare(logits, theirs), TEACHER_SHARE)
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        network.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.model.parameters(), settings.clip_grad)
        network.optimizer.step()
        sums = torch.stack([loss.detach().double() * len(labels), correct.double()])
        return torch.cat([sum_over_processes(sums), norm.double().view(1)])

    def _compute_aside(self, *inputs: Tensor) -> Tensor:
        """Compute on a stream of its own, as torch wants it before recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            numbers = self._compute(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return numbers

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        buffers = tuple(x.clone() for x in inputs)
        self.network.optimizer.zero_grad()  # so that gradients get places of their own
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that brings images, may go on.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            numbers = self._compute(*buffers)
        return _Recorded(graph, buffers, numbers)


def _compare(logits: Tensor, teacher: Tensor) -> Tensor:
    """Give the divergence of softened probabilities from the teacher's, mean over the images."""
    mine = F.log_softmax(logits / TEACHER_TEMPERATURE, dim=1)
    theirs = F.log_softmax(teacher / TEACHER_TEMPERATURE, dim=1)
    divergence = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return divergence * TEACHER_TEMPERATURE**2
