"""Mean intersection over union of models that segment, at the images' own size, with its interval."""

from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

import data
from trainer.config import Settings
from trainer.evaluate.subjects import Subject
from trainer.stages.segmentation.metrics import confusion
from trainer.stages.segmentation.views import Views

WINDOWS = 8  # per call of the model
RESAMPLES = 1000


Predict = Callable[[Tensor, Tensor], Tensor]  # image [3, H, W], its mask [H, W] -> classes [1, H, W]


def predictions(subjects: dict[str, Subject], settings: Settings) -> dict[str, Predict]:
    """What each model that segments says of an image, over the settings' views."""

    def of(subject: Subject) -> Predict:
        views = Views.of(settings, subject.net.patch_embed.img_size, WINDOWS)
        logits = lambda x: subject.model(x).float()  # noqa: E731
        return lambda image, mask: views.probabilities(logits, subject.seen(image[None])).argmax(1)

    return {name: of(subject) for name, subject in subjects.items()}


@torch.no_grad()
def counts(
    predict: dict[str, Predict], loader: data.Loader, classes: int, found: dict[int, np.ndarray]
) -> Generator[None]:
    """Fill `found`: index of an image -> pixels [models, 3, classes]: found rightly, of the truth, given to the class.

    One batch per iteration, of this rank's share.
    """
    for batch in loader.epoch():
        for image, mask, index, valid in zip(*(batch[k] for k in ("image", "mask", "index", "valid")), strict=True):
            if not valid:
                continue
            matrices = [confusion(say(image, mask), mask[None], classes)[0] for say in predict.values()]
            rows = [torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]) for matrix in matrices]
            found[int(index)] = torch.stack(rows).cpu().numpy()
        yield


def miou(counts_N3C: np.ndarray) -> float:
    """Percent, over the classes that truth or prediction has; as `segmentation.metrics.scores`."""
    return float(_percent(counts_N3C.sum(0, keepdims=True))[0])


def resampled(counts_N3C: np.ndarray, seed: int) -> np.ndarray:
    """`miou` of `RESAMPLES` draws of as many images with replacement: the bootstrap (Efron 1979). Percent.

    The draws are a function of the seed and the number of images, so those of two models are paired.
    """
    images = len(counts_N3C)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    return _percent(np.tensordot(draws.astype(np.float64), counts_N3C.astype(np.float64), 1))


def _percent(sums_R3C: np.ndarray) -> np.ndarray:
    hits, truth, given = np.moveaxis(sums_R3C.astype(np.float64), 1, 0)
    union = truth + given - hits
    iou = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
    return 100 * np.nanmean(iou, axis=-1)
