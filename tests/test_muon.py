import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, muon
from torch.nn import functional as F

from convmixer_hub.training.muon import fast_muon

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_timms_muon_is_changed_for_as_long_as_asked():
    before = dict(vars(muon))
    with pytest.raises(KeyboardInterrupt), fast_muon(torch.float32, GPU):
        result = muon.zeropower_via_newtonschulz(torch.eye(4), 1, [(1.0, 0.0, 0.0)])
        raise KeyboardInterrupt
    assert result.dtype == torch.float32
    assert dict(vars(muon)) == before


def test_few_kernels_compute_what_timm_does():
    """What is for GPUs, on the CPU."""
    model = timm.create_model("convmixer_cifar")
    results = []
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for device in (CPU, GPU):
        copied = copy.deepcopy(model)
        optimizer = create_optimizer_v2(
            copied, "muon", lr=0.02, weight_decay=0.05, fallback_lr_scale=0.5
        )
        with fast_muon(torch.float32, device):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(copied(images), labels).backward()
                optimizer.step()
        results.append((copied.state_dict(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
