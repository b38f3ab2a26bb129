"""The embedded data set, `digits`: real handwriting on cluttered canvases, with a class and a pixel mask per image.

Nothing is downloaded. Each 64 x 64 canvas holds one digit of scikit-learn's bundled handwritten digits, of random
size, place, turn and ink, on smooth colour noise with fragments of other digits strewn about: to name the digit a model
has to find it first.
`python -m data.samples --png FILE` draws a contact sheet.
"""

import argparse
import fcntl
import functools
import hashlib
import sys
from pathlib import Path

import cv2
import numpy as np

from data.beton import inspect
from data.corrupt import check
from data.paths import cache_folder

SIDE = 64  # pixels of a canvas
COUNTS = {"train": 8192, "val": 2048}
CLASSES = [str(digit) for digit in range(10)]
MASK_CLASSES = ["background", *CLASSES]
_HUES = cv2.applyColorMap(np.arange(0, 250, 25, dtype=np.uint8)[:, None], cv2.COLORMAP_HSV)[:, 0]
PALETTE = [[24, 24, 24], *_HUES.tolist()]
_GLYPH = 40  # pixels of a digit's smooth version, from which all sizes are drawn


class Digits:
    """One split, as a dataset for `data.write`: items are (image uint8 [64, 64, 3], label, mask uint8 [64, 64]).

    A mask is 0 on the background and 1 + label on the digit's ink. An item is a pure function of (split, index); the
    two splits draw from different handwritten digits, for their clutter too.

    Raises:
        ValueError: `split` is neither "train" nor "val".
    """

    classes, mask_classes, palette = CLASSES, MASK_CLASSES, PALETTE

    def __init__(self, split: str):
        if split not in COUNTS:
            raise ValueError(f"digits: has no split {split!r}, only {' and '.join(COUNTS)}")
        self.split = split

    @property
    def _glyphs(self) -> np.ndarray:
        return _glyphs(self.split)[0]

    @property
    def _labels(self) -> np.ndarray:
        return _glyphs(self.split)[1]

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([list(COUNTS).index(self.split), index])))
        canvas = _background(rng)
        for _ in range(rng.integers(4, 9)):
            self._add_fragment(canvas, rng)
        which = rng.integers(len(self._labels))
        label = int(self._labels[which])
        ink = _place(self._glyphs[which], rng, size=rng.uniform(38, 52), turn=rng.uniform(-12, 12))
        canvas += ink[..., None] * (rng.uniform(0.7, 1, 3) - canvas)  # light, of any tint
        canvas += rng.normal(0, 0.015, canvas.shape)
        image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
        return image, label, np.where(ink > 0.5, 1 + label, 0).astype(np.uint8)

    def _add_fragment(self, canvas: np.ndarray, rng: np.random.Generator) -> None:
        """A stroke cut from some digit: too little of it to be read."""
        glyph = self._glyphs[rng.integers(len(self._glyphs))]
        cut = int(_GLYPH * rng.uniform(0.3, 0.45))
        top, left = rng.integers(_GLYPH // 8, _GLYPH - _GLYPH // 8 - cut, size=2)
        fragment = np.zeros_like(glyph)
        middle = (_GLYPH - cut) // 2
        fragment[middle : middle + cut, middle : middle + cut] = glyph[top : top + cut, left : left + cut]
        fragment = cv2.GaussianBlur(fragment, (0, 0), 1)  # no hard edges where it was cut
        ink = _place(fragment, rng, size=rng.uniform(18, 28), turn=rng.uniform(0, 360), inside=False)
        canvas += rng.uniform(0.4, 0.8) * ink[..., None] * (rng.uniform(0, 0.75, 3) - canvas)


def ensure(split: str, corruption: tuple[str, int] | None = None) -> Path:
    """Path of a split's .beton file, written on the first call into `$XDG_CACHE_HOME/unsoftmax/digits-v3/`.

    With `corruption`, (name, severity), of the split's shifted copy, see `data.corrupt`.

    Any number of processes may call it at once: one writes, the others wait. A damaged file is written again.

    Raises:
        ValueError: no such split or corruption.
        OSError: the cache folder cannot be written.
    """
    dataset = Digits(split)
    name = split
    if corruption is not None:
        check(*corruption)
        name = f"{split}-{corruption[0]}-{corruption[1]}"
    path = cache_folder() / "digits-v3" / f"{name}.beton"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(path):
                from data.write import write

                # One worker: several would lay out the pages in the order they finish, and the file's hash would vary.
                how = {"raw_share": 1.0, "workers": 1, "allow_empty": True, "progress": False}
                write(dataset, path, corruption=corruption, source="scikit-learn load_digits", **how)
    except PermissionError as error:
        raise OSError(f"{path.parent}: not writable; set XDG_CACHE_HOME to a folder that is") from error
    return path


def contact_sheet(split: str, rows: int = 8, columns: int = 12, zoom: int = 2) -> np.ndarray:
    """The first images of a split beside their masks: uint8 [H, W, 3], RGB."""
    dataset, gap = Digits(split), 4
    palette = np.array(PALETTE, dtype=np.uint8)
    sheet = np.full((rows * (SIDE * zoom + gap) + gap, columns * (SIDE * zoom + gap) + gap, 3), 255, dtype=np.uint8)
    for cell in range(rows * columns):
        image, _, mask = dataset[cell // 2]
        tile = image if cell % 2 == 0 else palette[mask]
        top, left = (gap + at * (SIDE * zoom + gap) for at in divmod(cell, columns))
        sheet[top : top + SIDE * zoom, left : left + SIDE * zoom] = tile.repeat(zoom, 0).repeat(zoom, 1)
    return sheet


@functools.cache
def _glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """A split's handwritten digits: ink float32 [n, 40, 40] in 0..1, and labels [n]. Every fifth digit is for `val`."""
    from sklearn.datasets import load_digits  # slow to import, and needed only to write

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "val")
    small = np.pad(digits.images[chosen].astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    smooth = np.stack([cv2.resize(image, (_GLYPH, _GLYPH), interpolation=cv2.INTER_CUBIC) for image in small])
    # Steeper than the 8 x 8 grey levels, for a crisp stroke; not so steep that loops close.
    return ((smooth - 0.3) / 0.5).clip(0, 1), digits.target[chosen]


def _background(rng: np.random.Generator) -> np.ndarray:
    """Smooth colour noise at two scales: float32 [64, 64, 3] around a random, darker colour."""
    canvas = np.tile(rng.uniform(0.1, 0.45, 3).astype(np.float32), (SIDE, SIDE, 1))
    for cells, strength in ((4, 0.1), (10, 0.05)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        canvas += cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return canvas


def _place(glyph: np.ndarray, rng: np.random.Generator, size: float, turn: float, inside: bool = True) -> np.ndarray:
    """A glyph of `size` pixels, turned by `turn` degrees, anywhere on an empty canvas: float32 [64, 64] in 0..1."""
    margin = size / 2 if inside else 0
    x, y = rng.uniform(margin, SIDE - margin, 2)
    matrix = cv2.getRotationMatrix2D((_GLYPH / 2, _GLYPH / 2), turn, size / _GLYPH)
    matrix[:, 2] += x - _GLYPH / 2, y - _GLYPH / 2
    return cv2.warpAffine(glyph, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA)


def _is_whole(path: Path) -> bool:
    try:
        recorded = inspect(path).sha256
    except (FileNotFoundError, ValueError):
        return False
    with open(path, "rb") as file:  # a tenth of a second: the files are small
        return hashlib.file_digest(file, "sha256").hexdigest() == recorded


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.samples", description="The embedded data set, digits.")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a contact sheet of images and masks")
    parser.add_argument("--split", choices=list(COUNTS), default="train")
    options = parser.parse_args()
    try:
        if options.png is None:
            print(ensure(options.split))
        else:
            options.png.write_bytes(cv2.imencode(".png", contact_sheet(options.split)[..., ::-1])[1].tobytes())
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
