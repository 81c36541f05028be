"""Batch normalisation folded into convolutions."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pillsnap.models.fusion import fused


def trained_like(model: nn.Module) -> nn.Module:
    """`model` with random running statistics and weights, in eval mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["tf_efficientnetv2_b0", "resnet10t", "mobilenetv3_small_100"])
def test_output_is_the_same_without_normalisation_layers(name: str) -> None:
    model = trained_like(timm.create_model(name, num_classes=7))
    images = torch.randn(2, 3, 64, 64)
    quick = fused(model, images[:1])
    assert norms(model) > 10 and norms(quick) == 0
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(quick(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert model.training is quick.training is False


def test_convolution_with_a_second_consumer_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen = self.convolution(images)
            return self.norm(seen) + seen

    model = trained_like(Shared())
    assert fused(model, torch.randn(1, 3, 8, 8)) is model


def test_model_without_batch_normalisation_is_unchanged() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(fused(model, images)(images), model(images))
