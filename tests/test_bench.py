import re

import pytest
import timm
import torch

from convmixer_hub import TrainingError
from convmixer_hub.bench.inference import bench_inference, bench_load
from convmixer_hub.bench.training import _make_sequential, bench_train, make_timms
from convmixer_hub.model.cpu import speed_up_on_cpu

ARCH = "convmixer_96_8_ks5_p1"


def copy_by_order(source, target):
    """Give one model the weights of another with the same layers in the same order."""
    tensors = list(source.state_dict().values())
    target.load_state_dict(dict(zip(target.state_dict(), tensors, strict=True)))


@pytest.mark.parametrize("make", [make_timms, _make_sequential])
def test_all_variants_compute_the_same(make):
    ours = timm.create_model(ARCH)
    other = make(ours)
    copy_by_order(ours, other)
    speed_up_on_cpu(ours)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), other(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_variants_are_timed_in_turns():
    speeds = bench_train(ARCH, ["sequential", "ours"], batch_size=4, rounds=1, progress=False)
    assert [speed.variant for speed in speeds] == ["sequential", "ours"]
    assert all(speed.images_per_second > 0 and speed.peak_memory > 0 for speed in speeds)
    assert speeds[0].dtype == "fp32" and re.match("(fp32|bf16): a layer takes ", speeds[1].dtype)


def test_other_models_are_not_timed():
    for name in ("resnet18", "nonsense"):
        with pytest.raises(TrainingError, match=f"{name}: is no ConvMixer of this package; name"):
            bench_train(name)


@pytest.mark.slow
def test_a_variant_that_fails_is_named():
    message = r"^ours: cannot be timed \(\w+: .*\); leave it out, or give a smaller --batch-size$"
    with pytest.raises(TrainingError, match=message):
        bench_train(ARCH, ["ours"], batch_size=-1, progress=False)


def test_building_with_and_without_weights_is_timed():
    without, with_weights = bench_load("convmixer_cifar", rounds=2)
    assert without > 0 and with_weights > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, others are timed")
def test_answers_are_timed_in_turns_and_are_the_same():
    variants = ["timm", "timm-channels-last", "timm-openvino", "prepared", "exported"]
    speeds = bench_inference(ARCH, variants, batch_size=2, rounds=1, progress=False)
    assert [speed.variant for speed in speeds] == variants
    assert all(speed.images_per_second > 0 and speed.difference < 1e-5 for speed in speeds)
    with pytest.raises(TrainingError, match="resnet18: is no ConvMixer of this package; name one"):
        bench_inference("resnet18")


def test_a_variant_that_cannot_be_timed_is_refused(monkeypatch):
    with pytest.raises(TrainingError, match="^exported: is timed in float32 on a CPU alone; or le"):
        bench_inference(ARCH, ["timm", "exported"], bf16=True)
    monkeypatch.setattr("convmixer_hub.bench.inference.find_spec", lambda name: name == "onnx")
    with pytest.raises(TrainingError, match="^exported: needs onnxscript onnxruntime: pip install"):
        bench_inference(ARCH, ["exported"])


@pytest.mark.slow
def test_answers_in_bfloat16_are_nearly_the_same():
    speeds = bench_inference(ARCH, batch_size=2, rounds=1, bf16=True, progress=False)
    in_torch = ["timm", "timm-channels-last", "timm-compiled", "ours", "prepared"]
    assert [speed.variant for speed in speeds] == in_torch
    assert all(0 < speed.difference < 0.1 for speed in speeds)
