"""A classifier's head carried over to other classes: rows follow codes, new rows look like trained ones."""

from __future__ import annotations

import pytest
import torch

from pillsnap.models.class_head import weights_for_classes
from pillsnap.models.classifier import build_classifier

OLD = [f"K-{number}" for number in range(40)]
NEW = ["K-7", "K-100", "K-3", *(f"K-{number}" for number in range(200, 240)), "K-39"]


@pytest.mark.parametrize(
    "model, heads", [("resnet10t", ["fc"]), ("vit_tiny_patch16_224", ["head"]),
                     ("deit_tiny_distilled_patch16_224", ["head", "head_dist"])],
)  # fmt: skip
def test_rows_follow_their_codes_and_the_body_is_unchanged(model: str, heads: list[str]) -> None:
    torch.manual_seed(0)
    trained = build_classifier(model, "random", num_classes=len(OLD), drop_rate=0.0).state_dict()
    classifier = build_classifier(model, "random", num_classes=len(NEW), drop_rate=0.0)
    for head in heads:
        trained[f"{head}.bias"] = torch.randn(len(OLD)) - 2
    weights = weights_for_classes(classifier, trained, OLD, NEW, seed=1)
    classifier.load_state_dict(weights)
    changed = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert [name for name in trained if name not in changed and not torch.equal(weights[name], trained[name])] == []
    for name in changed:
        for row, code in enumerate(NEW):
            if code in OLD:
                assert torch.equal(weights[name][row], trained[name][OLD.index(code)])
        fresh = torch.stack([weights[name][row] for row, code in enumerate(NEW) if code not in OLD])
        assert fresh.mean() == pytest.approx(float(trained[name].mean()), abs=0.35 * float(trained[name].std()))
        assert fresh.std() == pytest.approx(float(trained[name].std()), rel=0.25)
    again = weights_for_classes(classifier, trained, OLD, NEW, seed=1)
    other = weights_for_classes(classifier, trained, OLD, NEW, seed=2)
    name = f"{heads[0]}.weight"
    assert torch.equal(again[name], weights[name]) and not torch.equal(other[name][1], weights[name][1])


def test_one_trained_class_gives_new_classes_its_row() -> None:
    classifier = build_classifier("resnet10t", "random", num_classes=3, drop_rate=0.0)
    trained = build_classifier("resnet10t", "random", num_classes=1, drop_rate=0.0).state_dict()
    weights = weights_for_classes(classifier, trained, ["K-1"], ["K-2", "K-1", "K-3"], seed=0)
    assert torch.equal(weights["fc.weight"], trained["fc.weight"].expand(3, -1))
