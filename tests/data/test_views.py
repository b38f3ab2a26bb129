"""Views: each description refuses what is out of its range."""

import pytest

from data.views import CentreView, MaskedView, RandomView


@pytest.mark.parametrize(
    ("view", "values", "said"),
    [
        (RandomView, {"image_size": (0, 4)}, r"image_size \(0, 4\): must be at least 1 pixel"),
        (RandomView, {"scale": (0.5, 1.5)}, r"scale \(0\.5, 1\.5\): must be 0 < least <= most <= 1"),
        (RandomView, {"ratio": (2, 1)}, r"ratio \(2, 1\): must be 0 < least <= most$"),
        (MaskedView, {"resize": (0, 1)}, "resize"),
        (MaskedView, {"hflip": -0.1}, "hflip -0.1: must be a probability"),
        (MaskedView, {"max_share": 0}, "max_share 0"),
        (CentreView, {"crop_pct": 1.1}, "crop_pct 1.1: must be above 0 and at most 1"),
    ],
)
def test_values_out_of_range(view, values, said):
    with pytest.raises(ValueError, match=said):
        view(**{"image_size": 8, **values})
