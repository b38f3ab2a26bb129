"""Parts of JPEGs: the pixels of the whole, whatever the JPEG; and no byte outside of what was given is touched."""

import cv2
import numpy as np
import pytest
from ffcv.fields import rgb_image

from data.decode import _decode_part
from data.jpeg import cut, encode

RST, FACTOR = cv2.IMWRITE_JPEG_RST_INTERVAL, cv2.IMWRITE_JPEG_SAMPLING_FACTOR
SIZES = [(97, 131), (48, 64), (17, 33), (50, 36), (5, 3), (200, 18)]  # of units cut off at the right, below, or not


def photo(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    coarse = cv2.resize(rng.integers(0, 256, (6, 7, 3)).astype(np.float32), (width, height))
    return (coarse + rng.normal(0, 20, coarse.shape)).clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, *how: int) -> np.ndarray:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90, *how])[1].reshape(-1)


def crops(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """At all borders and corners, of a pixel, a row and a column, and anywhere: (top, left, height, width)."""
    rng, found = np.random.default_rng(0), []
    for h, w in ((1, 1), (height, 1), (1, width), (height, width), (height // 2, width // 2), (height - 1, width - 1)):
        h, w = max(h, 1), max(w, 1)
        found += [(top, left, h, w) for top in {0, height - h} for left in {0, width - w}]
    for _ in range(40):
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        found.append((int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w))
    return found


def cuts(stored: np.ndarray, height: int, width: int) -> int:
    """Compares all crops of a JPEG with those of the whole; how many needed only a part of it."""
    (whole, above, before, good), parts = _decode_part(stored, height, width, 0, 0, height, width), 0
    assert good and whole.shape == (height, width, 3) and above == before == 0
    for top, left, h, w in crops(height, width):
        part, above, before, good = _decode_part(stored, height, width, top, left, h, w)
        assert good and above <= top and before <= left
        found = part[top - above : top - above + h, left - before : left - before + w]
        assert np.array_equal(found, whole[top : top + h, left : left + w]), (top, left, h, w)
        parts += part.shape != whole.shape
    return parts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", ["411", "420", "422", "440", "444", "grey"])
def test_a_crop_has_the_pixels_of_the_whole(size, factor):
    image, how = photo(*size), ()
    if factor == "grey":
        image = image[..., 0]
    else:
        how = (FACTOR, getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{factor}"))
    across, down = {"411": (32, 8), "420": (16, 16), "422": (16, 8), "440": (8, 16)}.get(factor, (8, 8))
    rows, units = -(-size[0] // down), -(-size[1] // across)
    for interval in {1, units, *(n for n in (2, 3, 4) if units % n == 0)}:
        parts = cuts(jpeg(image, RST, interval, *how), *size)
        assert (parts > 0) == (rows > 1 or units > interval), interval


@pytest.mark.parametrize(
    "how", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, RST, 1), (RST, 4)]
)
def test_what_cannot_be_cut_is_decoded_whole(how):
    """Without markers, progressive, or with markers that do not end with the rows: 97 x 131 has 9 units in a row."""
    assert cuts(jpeg(photo(97, 131), *how), 97, 131) == 0


@pytest.mark.parametrize(("width", "markers"), [(131, 9 * 7), (120, 8 * 7 // 2)])  # units: odd and even in a row
def test_markers_change_no_pixel(width, markers):
    image = photo(97, width)
    plain, stored = rgb_image.encode_jpeg(image, 90), encode(image, 90)
    assert ((stored[:-1] == 0xFF) & (stored[1:] >> 3 == 0xD0 >> 3)).sum() == markers - 1
    assert 2 < (len(stored) - len(plain)) / markers < 4
    assert np.array_equal(cv2.imdecode(stored, 1), cv2.imdecode(plain, 1))
    assert cuts(stored, 97, width) > 30
    with pytest.raises((ValueError, cv2.error)):
        encode(np.zeros((1, 65_501, 3), np.uint8), 90)


def test_damage_leads_nowhere_else():
    """A file without checksums may hold anything. What comes back is a JPEG that lies in its place, or the whole."""
    rng, (height, width) = np.random.default_rng(0), (97, 131)
    whole = encode(photo(height, width), 90)
    header = int(np.flatnonzero((whole[:-1] == 0xFF) & (whole[1:] == 0xDA))[0]) + 14
    found = 0
    for number in range(4000):
        data = whole[: rng.integers(0, len(whole))].copy() if number % 4 == 0 else whole.copy()
        reach = min(len(data), header if number % 2 else len(data))
        for place in rng.integers(0, max(reach, 1), rng.integers(1, 4) if reach else 0):
            data[place] = rng.choice([0, 1, 255, 208, 192])
        room = np.full(len(data) + 64, 77, np.uint8)
        size, above, before, rows, columns = cut(data, height, width, 30, 40, 31, 41, room[: len(data)])
        assert (room[len(data) :] == 77).all() and 0 <= size <= len(data)
        assert 0 <= above < above + rows <= height and 0 <= before < before + columns <= width
        if size:
            found += 1
            assert room[size - 2 : size].tolist() == [0xFF, 0xD9]
        _decode_part(data, height, width, 30, 40, 31, 41)
    assert 500 < found < 3500
