"""Segmentation's scores, all from one confusion matrix of whole numbers, which ranks and images add up in any order."""

import torch
from torch import Tensor

from models import IGNORE


def confusion(prediction_BHW: Tensor, truth_BHW: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), an image: int64 [B, C, C].

    Args:
        prediction_BHW: classes, integers in 0..C-1.
        truth_BHW: the same, or IGNORE: those pixels count nowhere.
    """
    images, cells = len(truth_BHW), num_classes * num_classes
    image = torch.arange(images, device=truth_BHW.device).view(-1, 1, 1)
    cell = (image * num_classes + truth_BHW.long()) * num_classes + prediction_BHW.long()
    counts = torch.bincount(cell[truth_BHW != IGNORE], minlength=images * cells)
    return counts.view(images, num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: [..., C, C] -> [..., C], float64; NaN where neither truth nor prediction
    has the class.
    """
    hits = matrix.diagonal(dim1=-2, dim2=-1)
    return hits.double() / (matrix.sum(-1) + matrix.sum(-2) - hits)


def scores(matrix: Tensor) -> dict[str, float]:
    """Percent: `miou`, the mean of `class_iou` over the classes that truth or prediction has; `pixel_accuracy`; and
    `class_accuracy`, the mean over the classes that truth has of the share of their pixels that is found.
    """
    hits, truth = matrix.diagonal().double(), matrix.sum(1)
    values = {
        "miou": class_iou(matrix).nanmean(),
        "pixel_accuracy": hits.sum() / matrix.sum(),
        "class_accuracy": (hits / truth).nanmean(),
    }
    return {name: 100 * value.item() for name, value in values.items()}
