"""The classifier: timm's own forward and loss, weights in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from pillsnap.config import ClassificationSettings, load_settings, preset_names
from pillsnap.data.loader import DeviceBatch
from pillsnap.errors import UserError
from pillsnap.models.classifier import (
    build_classifier,
    classification_loss,
    export_for_timm,
    input_statistics,
    logits_and_features,
    mixed,
    normalise,
    progressive_size,
    resized,
)
from pillsnap.tasks.classification import ClassificationTask


def test_loss_equals_torch_on_the_valid_rows() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels, valid = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([True, True, False, True, False])
    expected = torch.nn.functional.cross_entropy(logits[valid], labels[valid], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(classification_loss(logits, labels, valid, 0.1), expected)


def test_normalise_equals_torchvision() -> None:
    from torchvision.transforms import functional

    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = functional.normalize(images.permute(0, 3, 1, 2).float() / 255, mean, std)
    torch.testing.assert_close(normalise(images, mean, std), expected)


def test_exported_file_loads_into_plain_timm(tmp_path: Path) -> None:
    model = build_classifier("resnet10t", "random", num_classes=3, drop_rate=0.0).eval()
    path = tmp_path / "best.pt"
    export_for_timm(model, path, model="resnet10t", codes=["K-1", "K-2", "K-3"], image_size_px=64, crop_margin=0.1)
    contents = torch.load(path, weights_only=True)
    plain = timm.create_model(contents["model"], num_classes=contents["num_classes"]).eval()
    plain.load_state_dict(contents["state_dict"])
    assert contents["codes"] == ["K-1", "K-2", "K-3"]
    assert tuple(contents["mean"]) == input_statistics(model)[0]
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(plain(images), model(images))


def test_pretrained_weights_come_from_a_local_file(tmp_path: Path) -> None:
    trained = timm.create_model("resnet10t", num_classes=1000)
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    model = build_classifier("resnet10t", str(path), num_classes=5, drop_rate=0.0)
    assert model.num_classes == 5
    assert torch.equal(model.conv1[0].weight, trained.conv1[0].weight)


def test_errors_name_the_setting() -> None:
    with pytest.raises(UserError, match="resnet10q"):
        build_classifier("resnet10q", "random", num_classes=2, drop_rate=0.0)
    with pytest.raises(UserError, match=r"classification\.weights"):
        build_classifier("resnet10t", "/nowhere/weights.pt", num_classes=2, drop_rate=0.0)


def test_crops_grow_over_two_thirds_of_the_epochs() -> None:
    sizes = [progressive_size(epoch, 18, 128, 224) for epoch in range(18)]
    assert sizes == [128] * 4 + [160] * 4 + [192] * 4 + [224] * 6
    for epochs in range(5, 40):  # each size is compiled once
        assert {progressive_size(epoch, epochs, 100, 300) for epoch in range(epochs)} == {96, 160, 224, 300}
    assert {progressive_size(epoch, 18, None, 224) for epoch in range(18)} == {224}
    images = torch.rand(2, 3, 64, 64)
    assert resized(images, 48).shape == (2, 3, 48, 48)
    assert resized(images, 64) is images


def test_mixup_mixes_valid_rows_and_their_losses() -> None:
    torch.manual_seed(3)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    valid = torch.tensor([True, True, True, False])  # the first row's counterpart is not valid
    result, own = mixed(images, valid, 0.4)
    share = float(own[1])
    assert own.tolist() == pytest.approx([1.0, share, share, share]) and 0 < share < 1
    assert result[:, 0, 0, 0].tolist() == pytest.approx([0, share * 1 + (1 - share) * 2, share * 2 + (1 - share) * 1,
                                                         share * 3])  # fmt: skip
    torch.manual_seed(3)
    assert torch.equal(mixed(images, valid, 0.4)[0], result)


def test_the_loss_with_mixup_is_that_of_the_mixed_targets() -> None:
    settings = ClassificationSettings(
        model="resnet10t", weights="random", image_size_px=32, mixup=0.4, label_smoothing=0.1, drop_rate=0.0
    )
    task = ClassificationTask(settings, ("A", "B", "C"))
    torch.manual_seed(0)
    model = task.build().train()
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    labels, valid = torch.tensor([0, 1, 2, 1]), torch.ones(4, dtype=torch.bool)
    batch = DeviceBatch(0, True, 0, images, {"label": labels, "valid": valid}, np.arange(4), 4)
    torch.manual_seed(1)
    loss = task.losses(model, batch)["cross_entropy"]
    torch.manual_seed(1)
    inputs, own = mixed(normalise(images, *input_statistics(model)), valid, 0.4)
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    targets = own[:, None] * one_hot + (1 - own[:, None]) * one_hot.flip(0)
    expected = torch.nn.functional.cross_entropy(model(inputs), targets, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnetv2_b0", "vit_tiny_patch16_224"])
def test_logits_of_a_bfloat16_body_are_float32_without_ties(name: str) -> None:
    torch.manual_seed(0)
    model = build_classifier(name, "random", num_classes=300, drop_rate=0.0).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, 3, 224, 224))
    assert logits.dtype == torch.float32
    assert [len(row.unique()) for row in logits] == [300, 300]


MODELS = {load_settings(name).classification.model for name in preset_names()}


@pytest.mark.parametrize("name", sorted(MODELS | {"vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"}))
@pytest.mark.parametrize("bfloat16", [False, True])
def test_features_are_those_of_which_the_head_computes_the_logits(name: str, bfloat16: bool) -> None:
    torch.manual_seed(0)
    model = build_classifier(name, "random", num_classes=7, drop_rate=0.2).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits, features = logits_and_features(model, images)
        assert torch.equal(logits, model(images))
        assert features.shape == (2, model.head_hidden_size) and features.dtype == torch.float32
        head = model.get_classifier()
        if isinstance(head, torch.nn.Linear):
            assert torch.equal(head(features), logits)
