"""The embedded data set: the same everywhere, labelled and masked rightly, and written once however many ask for it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import inspect, original_loader, resolve
from data.beton import side_file
from data.samples import CLASSES, MASK_CLASSES, PALETTE, SIDE, Digits, _glyphs, _is_whole, contact_sheet

ROOT = Path(__file__).parents[2]


def test_items():
    dataset = Digits("val")
    labels = set()
    for index in range(200):
        image, label, mask = dataset[index]
        assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
        assert mask.shape == (SIDE, SIDE) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1 + label}
        rows, columns = np.nonzero(mask)
        assert 20 <= rows.max() - rows.min() <= 52 and columns.max() - columns.min() <= 52
        inside, outside = image[mask > 0].mean(axis=0), image[mask == 0].mean(axis=0)
        assert np.abs(inside - outside).max() > 10  # the digit can be seen
        labels.add(label)
    assert labels == set(range(10)) and len(CLASSES) == 10


def test_items_are_pure_functions_of_split_and_index():
    first, again, other = Digits("train"), Digits("train"), Digits("val")
    again[3]
    for index in (0, 5, len(first) - 1):
        assert all(np.array_equal(a, b) for a, b in zip(first[index], again[index], strict=True))
    assert not np.array_equal(first[0][0], other[0][0])
    with pytest.raises(IndexError):
        first[len(first)]
    with pytest.raises(ValueError, match="has no split 'test', only train and val"):
        Digits("test")


def test_splits_share_no_handwriting():
    train, val = (_glyphs(split)[0] for split in ("train", "val"))
    assert len(train) == 1437 and len(val) == 360
    assert not {glyph.tobytes() for glyph in train} & {glyph.tobytes() for glyph in val}


def test_contact_sheet():
    sheet = contact_sheet("train", rows=2, columns=2, zoom=1)
    assert np.array_equal(sheet[4 : 4 + SIDE, 4 : 4 + SIDE], Digits("train")[0][0])


def test_written_once_and_shared(tmp_path, monkeypatch):
    """Processes that ask at the same time all get the one whole file."""
    command = [sys.executable, "-m", "data.samples", "--split", "val"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    asking = [subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    path = tmp_path / "unsoftmax" / "digits-v3" / "val.beton"
    for process in asking:
        assert process.communicate(timeout=120)[0].strip() == str(path) and process.returncode == 0
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "val.beton", "val.beton.json"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = path.stat().st_mtime_ns
    assert resolve("digits", "val") == path and path.stat().st_mtime_ns == written
    info = inspect(path)
    assert info.has_masks and info.classes == CLASSES and info.max_label == 9
    assert info.mask_classes == MASK_CLASSES and info.palette == PALETTE and len({*map(tuple, PALETTE)}) == 11
    dataset = Digits("val")
    assert info.num_samples == len(dataset)
    loader = original_loader(path, batch_size=4, mean=(0, 0, 0), std=(1, 1, 1))
    batch = next(loader.epoch(start=5))
    loader.close()
    assert batch["index"].tolist() == [20, 21, 22, 23]
    for place, index in enumerate(batch["index"].tolist()):
        image, label, mask = dataset[index]
        assert batch["label"][place] == label
        assert np.abs(batch["image"][place].permute(1, 2, 0).numpy() * 255 - image).max() < 1e-3
        assert np.array_equal(batch["mask"][place], mask)

    content = path.read_bytes()
    assert _is_whole(path)
    side = side_file(path).read_text()
    for text in (side.replace(CLASSES[3], "8", 1), "{"):
        side_file(path).write_text(text)
        assert not _is_whole(path)
    side_file(path).write_text(side)
    assert _is_whole(path)
    with open(path, "r+b") as file:  # a damaged file is written again, to the same bytes
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 1]))
    assert resolve("digits", "val").read_bytes() == content
