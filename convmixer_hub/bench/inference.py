"""How fast a trained model answers, beside others of the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from torch import nn

from ..checkpoints.runtimes import (
    ONNX_LIBRARIES,
    Network,
    open_onnx,
    store_weights_in_int8,
    write_onnx,
)
from ..errors import TrainingError
from ..machine import find_device
from ..model.config import get_config
from ..model.convmixer import ConvMixer
from ..model.inference import load_cpp, prepare_for_inference
from .training import check_is_ours, make_timms
from .turns import Timing, time_in_turns

IMAGES_A_TURN = 64  # at least
COMPILER = "a C++ compiler"


def explain_absence(variant: str, bf16: bool) -> str:
    """Say why a variant cannot be timed here; empty if it can."""
    needed = VARIANTS[variant].needs
    if needed and (bf16 or find_device().type == "cuda"):
        return "is timed only in float32 on a CPU"
    if needed == (COMPILER,):
        return "" if load_cpp() else f"needs {COMPILER}"
    missing = [name for name in needed if not find_spec(name)]
    return f"needs {' '.join(missing)}: pip install {' '.join(missing)}" if missing else ""


def _compile(model: nn.Module) -> nn.Module:
    model = model.to(memory_format=torch.channels_last)
    model.compile()
    return model


def _write(model: nn.Module, ours: ConvMixer, folder: str) -> Path:
    file = Path(folder, "model.onnx")
    write_onnx(model, torch.zeros(2, *get_config(ours)["input_size"]), {}, file)
    return file


def _in_onnxruntime(model: nn.Module, ours: ConvMixer, int8: bool = False) -> Network:
    with TemporaryDirectory() as folder:
        file = _write(model, ours, folder)
        if int8:
            store_weights_in_int8(file)
        return open_onnx(file)


def _in_openvino(model: nn.Module, ours: ConvMixer) -> Network:
    import openvino

    with TemporaryDirectory() as folder:
        # Otherwise it computes in bfloat16 where the CPU has it.
        precision = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(_write(model, ours, folder), "CPU", precision)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


@dataclass(frozen=True)
class _Variant:
    """What is timed, made of our model and timm's with the same weights."""

    make: Callable[[ConvMixer, nn.Module], Network]
    needs: tuple[str, ...] = ()  # beside torch and timm; what needs something is for fp32 on a CPU
    channels_last: bool = False  # images


VARIANTS = {
    "timm": _Variant(lambda ours, timms: timms),
    "timm-channels-last": _Variant(
        lambda ours, timms: timms.to(memory_format=torch.channels_last), channels_last=True
    ),
    "timm-compiled": _Variant(lambda ours, timms: _compile(timms), channels_last=True),
    "timm-onnxruntime": _Variant(
        lambda ours, timms: _in_onnxruntime(timms, ours), needs=ONNX_LIBRARIES
    ),
    "timm-openvino": _Variant(
        lambda ours, timms: _in_openvino(timms, ours), needs=(*ONNX_LIBRARIES, "openvino")
    ),
    "ours": _Variant(lambda ours, timms: ours),
    "prepared": _Variant(lambda ours, timms: prepare_for_inference(ours)),
    "prepared-cpp": _Variant(
        lambda ours, timms: prepare_for_inference(ours, cpp=True), needs=(COMPILER,)
    ),
    "exported": _Variant(lambda ours, timms: _in_onnxruntime(ours, ours), needs=ONNX_LIBRARIES),
    "exported-int8": _Variant(
        lambda ours, timms: _in_onnxruntime(ours, ours, int8=True), needs=ONNX_LIBRARIES
    ),
}


def bench_inference(
    name: str,
    variants: Sequence[str] = (),
    batch_size: int = 64,
    rounds: int = 7,
    bf16: bool = False,
) -> dict[str, Timing]:
    """Time the answers of a model, and of timm's with the same weights, on the GPU if there is one.

    Args:
        name: A trained model's name, or an arch, whose weights are then random.
        variants: Keys of `VARIANTS`; by default those that can be timed here. `timm` is as a user
            gets it; `prepared` is what `prepare_for_inference` gives, `prepared-cpp` with
            `cpp=True`, `exported` what `export` writes, in onnxruntime.
        batch_size: Images per call.
        rounds: Turns of each variant that count, after two that do not.
        bf16: Compute in bfloat16, by autocast, instead of float32 (on a GPU, in what torch uses
            for that, which for convolutions is TF32 by default).

    Returns:
        What each took. The remark is the largest difference of its logits from those of timm's
        model in float32, as a share of the largest one.

    Raises:
        TrainingError: If it is no ConvMixer of this package, or a variant cannot be timed here.
    """
    check_is_ours(name)
    for variant in variants:
        if absence := explain_absence(variant, bf16):
            raise TrainingError(f"{variant}: {absence}; or leave it out")
    makers = {
        variant: partial(_make_turn, name, variant, batch_size, bf16)
        for variant in variants or [v for v in VARIANTS if not explain_absence(v, bf16)]
    }
    return time_in_turns(makers, rounds)


def _load(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained="." in name).eval()


def _make_turn(
    name: str, variant: str, batch_size: int, bf16: bool
) -> tuple[Callable[[], float], float]:
    device = find_device()
    ours = _load(name).to(device)
    assert isinstance(ours, ConvMixer)
    timms = make_timms(ours).eval().to(device)
    # The same tensors in the same order.
    timms.load_state_dict(dict(zip(timms.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(batch_size, *get_config(ours)["input_size"], device=device)
    with torch.inference_mode():
        expected = timms(images)
    network = VARIANTS[variant].make(ours, timms)
    if VARIANTS[variant].channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with torch.inference_mode(), autocast:
        difference = (network(images) - expected).abs().max() / expected.abs().max()

    @torch.inference_mode()
    def turn() -> float:
        calls = max(IMAGES_A_TURN, batch_size) // batch_size
        start = time.perf_counter()
        with autocast:
            for _ in range(calls):
                network(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (calls * batch_size)

    return turn, difference.item()
