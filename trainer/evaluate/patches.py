"""Semantic segmentation by a linear probe of the patch features: what a backbone without a head is worth on masks.

Each patch of the training images has the class of most of its pixels. Ridge regression fits the probe, with the probe
stage's code; its scores are resized to an image's own size, as DINOv2 evaluates linear segmentation, arXiv 2304.07193.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import data
from models import IGNORE
from trainer.evaluate.masks import Predict
from trainer.evaluate.subjects import Subject
from trainer.probe.quick import SHRINKAGE
from trainer.probe.solve import Probes, Statistics, ridge, statistics

IMAGES = 2048  # that are fitted, drawn by lot
Probe = tuple[Statistics, Probes]


def drawn(info: data.Info, seed: int) -> np.ndarray:
    """The images that are fitted, int64, ascending."""
    return np.sort(np.argsort(data.lots(info.num_samples, seed), kind="stable")[:IMAGES])


@torch.no_grad()
def grid(subject: Subject, image: Tensor) -> Tensor:
    """Patch features [h, w, D] fp32 of an image [3, H, W], which is resized to what the model is built for."""
    net = subject.net
    size, patch = net.patch_embed.img_size, net.patch_embed.patch_size
    image = F.interpolate(image[None], tuple(size), mode="bilinear", antialias=True)
    tokens = net.forward_features(subject.seen(image))[0, net.num_prefix_tokens :].float()
    return tokens.unflatten(0, (size[0] // patch[0], size[1] // patch[1]))


def labels(mask: Tensor, rows: int, columns: int, classes: int) -> Tensor:
    """The class of most labelled pixels of each patch, int64 [rows, columns]; IGNORE where most are not labelled."""
    hot = F.one_hot(torch.where(mask == IGNORE, classes, mask.long()), classes + 1).permute(2, 0, 1)[None].float()
    most = F.adaptive_avg_pool2d(hot, (rows, columns))[0].argmax(0)
    return torch.where(most == classes, IGNORE, most)


def fitted(subject: Subject, loader: data.Loader, classes: int) -> Probe:
    """The probe of a model's patches, of all images of a loader; on the CPU, for other ranks to have."""

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader.epoch():
            for image, mask in zip(batch["image"], batch["mask"], strict=True):
                x = grid(subject, image)
                y = labels(mask, *x.shape[:2], classes).flatten()
                if (known := y != IGNORE).any():
                    yield x.flatten(0, 1)[known][None], y[known]

    stats = statistics(blocks, classes)
    return moved(stats, "cpu"), moved(ridge(stats, [1 / (SHRINKAGE * stats.count)]), "cpu")


def moved(of: Any, device: str | torch.device) -> Any:
    """A dataclass of tensors, on a device."""
    tensors = {f.name: value for f in fields(of) if isinstance(value := getattr(of, f.name), Tensor)}
    return replace(of, **{name: value.to(device) for name, value in tensors.items()})


def predictions(subjects: dict[str, Subject], probes: dict[str, Probe]) -> dict[str, Predict]:
    """What the probe of each model says of an image."""

    def of(subject: Subject, stats: Statistics, probe: Probes) -> Predict:
        def say(image: Tensor, mask: Tensor) -> Tensor:
            x = grid(subject, image)
            z = stats.standardise(x.flatten(0, 1)[None])[0]
            scores = z @ probe.weight_MPKD[0, 0].to(z).mT + probe.bias_MPK[0, 0].to(z)
            scores = scores.mT.unflatten(1, x.shape[:2])[None]
            return F.interpolate(scores, mask.shape, mode="bilinear").argmax(1)

        return say

    return {
        name: of(subject, *(moved(part, subject.device) for part in probes[name])) for name, subject in subjects.items()
    }
