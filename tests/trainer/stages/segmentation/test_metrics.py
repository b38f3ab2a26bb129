"""Segmentation's scores against torchmetrics'."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from models import IGNORE
from trainer.stages.segmentation.metrics import class_iou, confusion, scores


def masks(kind: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prediction and truth [B, H, W], and how many classes."""
    rng = np.random.default_rng(0)
    if kind == "random":
        truth = rng.integers(0, 150, (3, 97, 61))
        prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 150, truth.shape))
        truth[rng.random(truth.shape) < 0.2] = IGNORE
        return torch.from_numpy(prediction), torch.from_numpy(truth).to(torch.uint8), 150
    from data.samples import Digits

    digits = Digits("val")
    truth = torch.from_numpy(np.stack([digits[i][2] for i in range(12)]))
    prediction = truth.roll((1, 2), (1, 2)).long()
    truth[:, :3] = IGNORE
    return prediction, truth, 11


@pytest.mark.parametrize("kind", ["random", "digits"])
def test_scores_equal_torchmetrics_to_the_last_digit(kind: str) -> None:
    prediction, truth, classes = masks(kind)
    options = {"num_classes": classes, "ignore_index": IGNORE}
    matrix = confusion(prediction, truth, classes)
    assert torch.equal(matrix.sum(0), multiclass_confusion_matrix(prediction, truth.long(), **options))
    # torchmetrics divides in fp32, and takes a class that is nowhere for one of IoU 0: it is left out here.
    theirs = multiclass_jaccard_index(prediction, truth.long(), average="none", **options)
    present = matrix.sum((0, 1)) + matrix.sum((0, 2)) > 0
    mine = class_iou(matrix.sum(0))
    assert torch.equal(mine.isnan(), ~present)
    assert torch.equal(mine[present].float(), theirs[present])
    found = scores(matrix.sum(0))
    assert found["miou"] == pytest.approx(100 * theirs[present].double().mean().item(), abs=1e-5)
    accuracy = multiclass_accuracy(prediction, truth.long(), average="micro", **options)
    assert np.float32(found["pixel_accuracy"] / 100) == accuracy.numpy()


def test_images_and_ranks_add_up_to_the_whole() -> None:
    prediction, truth, classes = masks("random")
    matrix = confusion(prediction, truth, classes)
    alone = torch.stack([confusion(p[None], t[None], classes)[0] for p, t in zip(prediction, truth, strict=True)])
    assert torch.equal(matrix, alone)


def test_classes_that_are_nowhere_do_not_count() -> None:
    truth = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    found = scores(confusion(torch.tensor([[[0, 1, 1, 1]]]), truth, 4)[0])
    assert found == pytest.approx({"miou": 100 * (1 / 2 + 2 / 3) / 2, "pixel_accuracy": 75, "class_accuracy": 75})
