import re

import pytest
import timm
import torch

from convmixer_hub import TrainingError, speed_up_on_cpu
from convmixer_hub.bench import inference
from convmixer_hub.bench.inference import VARIANTS, bench_inference
from convmixer_hub.bench.training import _make_sequential, bench_train, make_timms
from convmixer_hub.bench.turns import Timing

from .conftest import ARCH, print_table


@pytest.mark.parametrize("make", [make_timms, _make_sequential])
def test_all_variants_compute_the_same(make):
    ours = timm.create_model(ARCH)
    other = make(ours)
    # They have the same layers in the same order.
    other.load_state_dict(dict(zip(other.state_dict(), ours.state_dict().values(), strict=True)))
    speed_up_on_cpu(ours)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), other(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_variants_are_timed_in_turns():
    options = "--variant sequential --variant ours --batch-size 4 --rounds 1"
    title, header, sequential, ours, [remark] = print_table(f"bench train {ARCH} {options}")
    assert title[0].startswith(f"{ARCH}, batch 4, median of 1 steps each in turns, ")
    assert header == ["variant", "images/s", "× sequential", "type", "peak memory"]
    assert [sequential[0], *sequential[2:4], ours[0]] == ["sequential", "1.00", "fp32", "ours"]
    for _, speed, ratio, _, memory in (sequential, ours):
        assert float(speed) > 0 and float(memory.removesuffix(" MiB")) > 0
        assert float(ratio) == pytest.approx(float(speed) / float(sequential[1]), rel=0.05)
    assert re.match(f"ours computes in {ours[3]}: a layer takes ", remark)


@pytest.mark.parametrize("name", ["resnet18", "nonsense"])
@pytest.mark.parametrize("bench", [bench_train, bench_inference])
def test_other_models_are_not_timed(bench, name):
    message = f"{name}: is no ConvMixer of this package; known are: convm"
    with pytest.raises(TrainingError, match=message):
        bench(name)


@pytest.mark.slow
def test_a_variant_that_fails_is_named():
    message = r"^ours: cannot be timed \(\w+: .*\); leave it out, or give a smaller --batch-size$"
    with pytest.raises(TrainingError, match=message):
        bench_train(ARCH, ["ours"], batch_size=-1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, others are timed")
def test_answers_are_timed_in_turns_and_are_the_same():
    variants = ["timm", "timm-channels-last", "timm-openvino", "prepared", "exported"]
    options = " ".join(f"--variant {variant}" for variant in variants)
    title, _, *rows = print_table(f"bench inference {ARCH} {options} --batch-size 2 --rounds 1")
    assert title[0].startswith(f"{ARCH} in fp32, median of 1 turns, ")
    assert [row[1] for row in rows] == variants
    assert all(float(row[2]) > 0 and float(row[4]) < 1e-5 for row in rows)


def test_a_variant_that_cannot_be_timed_is_refused(monkeypatch):
    with pytest.raises(TrainingError, match="^exported: is timed only in float32 on a CPU; or le"):
        bench_inference(ARCH, ["timm", "exported"], bf16=True)
    monkeypatch.setattr("convmixer_hub.bench.inference.find_spec", lambda name: name == "onnx")
    with pytest.raises(TrainingError, match="^exported: needs onnxscript onnxruntime: pip install"):
        bench_inference(ARCH, ["exported"])


@pytest.mark.slow
def test_answers_in_bfloat16_are_nearly_the_same():
    options = "--variant timm --variant prepared --batch-size 2 --rounds 1 --bf16"
    title, _, *rows = print_table(f"bench inference {ARCH} {options}")
    assert title[0].startswith(f"{ARCH} in bf16, median of 1 turns, ")
    assert [row[1] for row in rows] == ["timm", "prepared"]
    assert all(0 < float(row[4]) < 0.1 for row in rows)


def test_what_is_not_timed_in_bfloat16_is_named(monkeypatch):
    def invent_timings(makers, *_, **__):
        return {name: Timing(i, 0.004, 0.0) for i, name in enumerate(makers, start=1)}

    monkeypatch.setattr(inference, "time_in_turns", invent_timings)
    in_torch = ["timm", "timm-channels-last", "timm-compiled", "ours", "prepared"]
    _, header, *rows = print_table(f"bench inference {ARCH} --batch-size 128 --batch-size 1 --bf16")
    assert header == ["batch", "variant", "images/s", "× timm", "difference"]
    timed = list(enumerate(in_torch, 1))
    left_out = [name for name in VARIANTS if name not in in_torch]
    assert rows == [
        *([size, name, f"{i}", f"{i}.00", "4e-03"] for size in ("128", "1") for i, name in timed),
        *([f"left out: {name}, which is timed only in float32 on a CPU"] for name in left_out),
    ]
