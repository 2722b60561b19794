from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from dgnet.data import IGNORED
from dgnet.errors import UsageError
from dgnet.training import TrainConfig
from dgnet.training._losses import ClassificationLoss

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
SHARES = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), 1)


def losses(targets: torch.Tensor, **options: object) -> torch.Tensor:
    return ClassificationLoss(TrainConfig(**options))(LOGITS, targets)


def test_the_mean_over_images_is_that_of_timms_losses():
    pairs = [
        (losses(LABELS, label_smoothing=0.2), LabelSmoothingCrossEntropy(0.2)(LOGITS, LABELS)),
        (losses(SHARES), SoftTargetCrossEntropy()(LOGITS, SHARES)),
        (losses(LABELS, bce_loss=True, label_smoothing=0.1), BinaryCrossEntropy(0.1)(LOGITS, LABELS)),
        (losses(SHARES, bce_loss=True), BinaryCrossEntropy(0.0)(LOGITS, SHARES)),
        (
            losses(SHARES, bce_loss=True, bce_sum=True, bce_target_thresh=0.3),
            BinaryCrossEntropy(0.0, target_threshold=0.3, sum_classes=True)(LOGITS, SHARES),
        ),
    ]
    for own, theirs in pairs:
        assert own.shape == (6,)
        torch.testing.assert_close(own.mean(), theirs)


def test_binary_cross_entropy_is_the_mean_over_the_classes():
    own = losses(LABELS, bce_loss=True)
    for image, label in enumerate(LABELS.tolist()):
        terms = [
            -F.logsigmoid(LOGITS[image, k]).item() if k == label else -F.logsigmoid(-LOGITS[image, k]).item() for k in range(4)
        ]
        assert own[image].item() == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_an_image_without_a_label_does_not_stop_the_loss():
    labels = LABELS.clone()
    labels[2] = IGNORED
    assert losses(labels)[2] == 0
    assert losses(labels, bce_loss=True).isfinite().all()


def test_options_of_binary_cross_entropy_need_it():
    with pytest.raises(UsageError, match="--bce-sum needs --bce-loss true"):
        TrainConfig(bce_sum=True)
    with pytest.raises(UsageError, match="--bce-target-thresh needs --bce-loss true"):
        TrainConfig(bce_target_thresh=0.2)
