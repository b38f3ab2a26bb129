"""Sliding windows, whole images, scales and mirrored views, against naive ones."""

import pytest
import torch
from torch.nn import functional as F

from trainer.stages.segmentation.views import Views


def views(**given) -> Views:
    default = {"window": (16, 16), "short_side": 16, "slide": True, "stride": 2 / 3, "scales": (1.0,), "flip": False}
    return Views(**(default | {"batch": 3} | given))


class Model:
    """Logits that know the colour and the place in what the model is given; counts its calls."""

    def __init__(self) -> None:
        self.calls, self.sizes = 0, set()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.add(tuple(image.shape))
        place = torch.linspace(-1, 1, image.shape[-1]).expand(len(image), 1, *image.shape[-2:])
        return torch.cat([3 * image, place], 1)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (23, 16), (50, 33)])
def test_windows_cover_every_pixel_and_stay_inside(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    for rows, columns in views().boxes(size):
        assert (rows.stop - rows.start, columns.stop - columns.start) == (16, 16)
        seen[rows, columns] += 1
    assert seen.min() >= 1
    assert views(slide=False).boxes(size) == [(slice(0, size[0]), slice(0, size[1]))]


def test_logits_are_averaged_over_the_windows_of_a_pixel() -> None:
    torch.manual_seed(0)
    image, given = torch.randn(2, 3, 16, 40), views()
    chance = given.probabilities(Model(), image)
    total, count = torch.zeros(2, 4, 16, 40), torch.zeros(16, 40)
    for start in (0, 10, 20, 24):  # two thirds of 16 is 10; the last is moved inside
        total[..., start : start + 16] += Model()(image[..., start : start + 16])
        count[:, start : start + 16] += 1
    torch.testing.assert_close(chance, (total / count).softmax(1))


def test_scales_and_mirrored_views_are_averaged() -> None:
    torch.manual_seed(0)
    image, given = torch.randn(1, 3, 20, 24), views(slide=False, short_side=20, scales=(1.0, 1.5), flip=True)
    chances = []
    for size in ((20, 24), (30, 36)):
        view = F.interpolate(image, size, mode="bilinear", antialias=True)
        for logits in (Model()(view), Model()(view.flip(-1)).flip(-1)):
            chances.append(F.interpolate(logits, (20, 24), mode="bilinear").softmax(1))
    model = Model()
    torch.testing.assert_close(given.probabilities(model, image), torch.stack(chances).mean(0))
    assert model.sizes == {(1, 3, 20, 24), (1, 3, 30, 36)}


def test_the_number_of_calls_is_known_before() -> None:
    for given in (views(), views(slide=False), views(flip=True, scales=(0.5, 1.0, 1.75)), views(batch=1)):
        for images, size in ((1, (16, 16)), (5, (31, 44)), (2, (9, 70))):
            model = Model()
            chance = given.probabilities(model, torch.randn(images, 3, *size))
            assert chance.shape == (images, 4, *size)
            torch.testing.assert_close(chance.sum(1), torch.ones(images, *size))
            assert model.calls == given.calls(images, size)
            assert max(shape[0] for shape in model.sizes) <= given.batch
