import math

import pytest
import torch

from convmixer_hub.model.convmixer import ConvMixer
from convmixer_hub.model.init import init_depthwise_kernels, make_covariance


@pytest.mark.parametrize("variance", [0.16, 0.68, 1.92])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_covariance_is_one_and_falls_with_distance(kernel_size, variance):
    covariance = make_covariance(kernel_size, variance)
    torch.testing.assert_close(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-12
    variances = covariance.diagonal().view(kernel_size, kernel_size)
    middle = kernel_size // 2
    assert variances[middle, middle] == 1
    with_middle = covariance[len(covariance) // 2].view(kernel_size, kernel_size)
    for distance in range(middle + 1):
        fall = math.exp(-(distance**2) / (2 * variance))
        for row in (middle - distance, middle + distance):
            assert math.isclose(variances[row, middle], fall)
            assert math.isclose(with_middle[row, middle], fall * math.sqrt(fall))


def test_kernels_get_the_covariance_and_keep_their_mean_square():
    model = ConvMixer(d_model=1024, n_layers=3, kernel_size=5, num_classes=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    init_depthwise_kernels(model)
    for i, variance in enumerate([0.16, 0.16 + 0.16 + 0.36, 0.16 + 0.32 + 1.44]):
        key = f"conv_mixer_layers.{i}.depth_wise_conv.weight"
        old, new = before.pop(key), model.state_dict()[key]
        torch.testing.assert_close(new.square().mean(), old.square().mean())
        drawn = new.flatten(1).double().T.cov(correction=0)
        covariance = make_covariance(5, variance)
        scale = drawn.trace() / covariance.trace()
        torch.testing.assert_close(drawn / scale, covariance, atol=0.12, rtol=0)
    for key, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[key]), key
