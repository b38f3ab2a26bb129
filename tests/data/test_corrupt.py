"""Corruptions against their definitions: formulas to the pixel, moments of noise, kernels by length and energy."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data import inspect, resolve
from data.corrupt import CORRUPTIONS, _streak, _zoom, corrupt
from data.samples import Digits
from data.write import write

SIDES = (32, 64, 224)


def grey(side: int, value: int = 128) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def photo(side: int, index: int = 0) -> np.ndarray:
    """A smooth picture with contrast."""
    noise = np.random.default_rng(index).uniform(20, 235, (5, 5, 3))
    return ndimage.zoom(noise, (side / 5, side / 5, 1), order=1).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (224, 224), (40, 90), (300, 130)])
def test_any_size_deterministic_and_worse_with_severity(name, shape):
    image = photo(max(shape))[: shape[0], : shape[1]]
    before, distances = image.copy(), []
    for severity in range(1, 6):
        made = corrupt(image, name, severity, 7, seed=3)
        assert made.shape == image.shape and made.dtype == np.uint8 and np.array_equal(image, before)
        assert np.array_equal(made, corrupt(image, name, severity, 7, seed=3))
        distances.append(np.abs(made.astype(float) - image).mean())
    assert distances[4] > distances[0] > 0
    if name not in ("contrast", "brightness", "pixelate", "jpeg_compression", "gaussian_blur"):  # those are not random
        assert not np.array_equal(made, corrupt(image, name, 5, 8, seed=3))
        assert not np.array_equal(made, corrupt(image, name, 5, 7, seed=4))


def constants(name: str, side: int) -> tuple:
    return CORRUPTIONS[name][1 + SIDES.index(side)]


@pytest.mark.parametrize("side", SIDES)
def test_contrast_is_its_formula(side):
    x = photo(side) / 255.0
    for severity, c in enumerate(constants("contrast", side), 1):
        wanted = (x - x.mean((0, 1))) * c + x.mean((0, 1))
        assert np.array_equal(corrupt(photo(side), "contrast", severity, 0), (wanted * 255 + 1e-6).astype(np.uint8))
    assert constants("contrast", side)[2] == {32: 0.4, 64: 0.2, 224: 0.2}[side]


@pytest.mark.parametrize("side", SIDES)
def test_noise_has_the_moments_of_its_definition(side):
    count = max(2, 60 * 32**2 // side**2)
    for severity in (1, 3):
        values = np.stack([corrupt(grey(side), "gaussian_noise", severity, i) / 255.0 for i in range(count)])
        sigma = constants("gaussian_noise", side)[severity - 1]
        assert abs(values.std() / sigma - 1) < 0.02 and abs(values.mean() - 127.5 / 255) < 0.003
        assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.1
        for level in (60, 140):  # in proportion to the pixel
            values = np.stack([corrupt(grey(side, level), "speckle_noise", severity, i) for i in range(count)])
            sigma = constants("speckle_noise", side)[severity - 1]
            assert abs(values.std() / (sigma * level) - 1) < (0.05 if sigma * level < 60 else 0.1)
        photons = constants("shot_noise", side)[severity - 1]
        values = np.stack([corrupt(grey(side, 90), "shot_noise", severity, i) / 255.0 for i in range(count)])
        assert abs(values.var() / (90 / 255 / photons) - 1) < 0.1  # Poisson: the variance is the mean over photons
        amount = constants("impulse_noise", side)[severity - 1]
        values = np.stack([corrupt(grey(side), "impulse_noise", severity, i) for i in range(count)])
        assert abs((values == 0).mean() / amount - 0.5) < 0.05 and abs((values == 255).mean() / amount - 0.5) < 0.05
        assert set(np.unique(values)) == {0, 128, 255}


def test_streaks_have_the_length_and_weights_of_a_half_gaussian():
    point = np.zeros((61, 61))
    point[30, 30] = 1
    weights = np.exp(-(np.arange(21) ** 2) / (2 * 4.0**2))
    row = _streak(point, 10, 4.0, 0.0)[30]
    assert (
        np.abs(row[10:31][::-1] - weights / weights.sum()).max() <= 0.5 / 255 and row[:10].sum() == row[31:].sum() == 0
    )
    assert np.abs(_streak(point, 10, 4.0, -90.0)[30:51, 30] - row[10:31][::-1]).max() == 0
    for angle in (-120, -45, -10, 30, 80):
        rows, columns = np.nonzero(_streak(point, 10, 12.0, angle))
        far = np.hypot(rows - 30, columns - 30).max()
        assert 18 <= far <= 21  # 2 radius, to a pixel
        along = np.rad2deg(np.arctan2((30 - rows).sum(), (30 - columns).sum()))
        assert abs(along - angle) < 3
    flat = np.full((30, 40), 0.4)
    assert np.abs(_streak(flat, 10, 5.0, 25.0) - 0.4).max() < 1e-9  # all light is kept, at the edges too


def test_blur_against_scipy_and_pillow():
    image = photo(224)
    wanted = ndimage.gaussian_filter(image / 255.0, (3, 3, 0), mode="nearest") * 255
    assert np.abs(corrupt(image, "gaussian_blur", 3, 0) - wanted).max() <= 1
    small = Image.fromarray(image).resize((89, 89), Image.Resampling.BOX)  # 224 x 0.4
    assert np.array_equal(corrupt(image, "pixelate", 3, 0), small.resize((224, 224), Image.Resampling.BOX))
    turned = corrupt(image, "motion_blur", 5, 1).astype(float)
    assert abs(turned.mean() - image.mean()) < 6 and turned.std() < image.std()


def test_brightness_adds_to_the_value_alone():
    image = photo(64)
    made = corrupt(image, "brightness", 2, 0)
    hsv, before = (np.asarray(Image.fromarray(pixels).convert("HSV")).astype(int) for pixels in (made, image))
    assert np.abs(hsv[..., 2] - (before[..., 2] + 51).clip(0, 255)).max() <= 1
    assert np.abs(hsv[..., 1] - before[..., 1]).max() <= 3
    assert (corrupt(grey(64, 0), "brightness", 2, 0) == 51).all()


@pytest.mark.parametrize("side", SIDES)
def test_snow_whitens_and_falls(side):
    """Without flakes it is the formula of the whitening; flakes only add light, and more at a higher severity."""
    x = photo(side) / 255.0
    light = []
    for severity, c in enumerate(constants("snow", side), 1):
        gray = x @ [0.299, 0.587, 0.114]
        whitened = c[6] * x + (1 - c[6]) * np.maximum(x, gray[..., None] * 1.5 + 0.5)
        made = np.stack([corrupt(photo(side), "snow", severity, i) for i in range(8)]) / 255.0
        assert (made >= whitened.clip(0, 1) - 1.01 / 255).all()
        light.append((made - whitened.clip(0, 1)).mean())
    assert max(light) > 0.02
    flakes = np.random.default_rng(0).normal(size=(side, side + 10))
    assert _zoom(flakes, 1).shape == _zoom(flakes, 2.25).shape == flakes.shape
    assert np.array_equal(_zoom(flakes, 1), flakes)


def test_mistakes():
    with pytest.raises(ValueError, match="corrupt 'rain': there is no such corruption, only gaussian_noise, "):
        corrupt(grey(32), "rain", 1, 0)
    for severity in (0, 6, "3"):
        with pytest.raises(ValueError, match=r"severity .*: must be in 1\.\.5"):
            corrupt(grey(32), "snow", severity, 0)


def test_written_copies_do_not_depend_on_the_number_of_processes(tmp_path):
    items = [(photo(64, i), i) for i in range(150)]
    how = {"corruption": ("speckle_noise", 3), "seed": 5, "raw_share": 1, "progress": False}
    side = write(items, tmp_path / "a.beton", workers=2, **how)
    assert side["settings"]["corruption"] == {"name": "speckle_noise", "severity": 3, "seed": 5}
    content = (tmp_path / "a.beton").read_bytes()
    for index in (0, 70, 149):
        assert corrupt(photo(64, index), "speckle_noise", 3, index, 5).tobytes() in content
    with pytest.raises(ValueError, match="no such corruption"):
        write(items, tmp_path / "b.beton", corruption=("rain", 3), progress=False)
    # After max_side, with the constants of that size.
    write([photo(224)], tmp_path / "c.beton", corruption=("contrast", 1), max_side=32, raw_share=1, progress=False)
    small = ndimage.uniform_filter(photo(224).astype(float), (7, 7, 1))[3::7, 3::7].std()
    pixels = np.frombuffer((tmp_path / "c.beton").read_bytes(), np.uint8)
    pixels = pixels[np.flatnonzero(pixels[8192:])[0] + 8192 :][: 32 * 32 * 3]
    assert abs(pixels.std() / (small * 0.75) - 1) < 0.1


def test_the_embedded_data_set_has_shifted_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("data.samples.COUNTS", {"train": 0, "val": 30})  # the first of them
    path = resolve("digits:contrast-3", "val")
    assert path == tmp_path / "unsoftmax" / "digits-v3" / "val-contrast-3.beton"
    assert path == resolve("digits:contrast-3", "val") and inspect(path).num_samples == 30
    image = Digits("val")[4][0]
    assert corrupt(image, "contrast", 3, 4).tobytes() in path.read_bytes() and image.tobytes() not in path.read_bytes()
    for spec in ("digits:contrast", "digits:contrast-6", "digits:-3"):
        with pytest.raises(ValueError, match=f"{spec}: a shifted copy is named as digits:contrast-3"):
            resolve(spec, "val")
    with pytest.raises(ValueError, match="corrupt 'rain'"):
        resolve("digits:rain-3", "val")
