"""Damaged .beton files: whatever is hit, the batches are those of the whole file, or one line names the file.

FFCV maps the file and reads it in compiled code, where a bad pointer ends the process. So the copies are damaged and
read by a child, this file run as a program, and its death fails the test with what was damaged last.
"""

import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.reader import Reader
from ffcv.types import HeaderType
from ffcv.writer import DatasetWriter

from data import eval_loader, inspect
from data.beton import open_checked, side_file
from data.checksum import checksum
from data.decode import Samples
from data.jpeg import encode
from data.loader import Loader
from data.runs import encode_runs
from data.views import CentreView, StoredView
from data.write import write
from tests.support.damage import KINDS, damage

ROOT = Path(__file__).parents[2]
COUNT, EACH = 40, 10  # images; copies damaged in one way


class Pictures:
    """Noise, of which damage is never hidden, in one size; and a mask."""

    classes = tuple("abcde")

    def __init__(self, masked: bool):
        self.masked = masked

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple:
        if index >= COUNT:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        item = rng.integers(0, 256, (200, 210, 3), dtype=np.uint8), index % 5
        return (*item, rng.integers(0, 6, (200, 210), dtype=np.uint8)) if self.masked else item


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """checked.beton from `data.write`, and foreign.beton from FFCV's own writer; raw and JPEG images in both."""
    folder = tmp_path_factory.mktemp("damage")
    write(Pictures(masked=True), folder / "checked.beton", raw_share=0.5, workers=1, progress=False)
    fields = {"image": RGBImageField(write_mode="proportion", compress_probability=0.5), "label": IntField()}
    DatasetWriter(str(folder / "foreign.beton"), fields, num_workers=1).from_indexed_dataset(Pictures(masked=False))
    return folder


@pytest.mark.parametrize("name", ["checked", "foreign"])
def test_damaged_files_never_crash_and_never_pass_for_whole(folder, name):
    command = [sys.executable, "-X", "faulthandler", __file__, folder / f"{name}.beton"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"status {child.returncode} after: {lines[-1:]}\n{child.stderr[-3000:]}"
    outcomes = collections.Counter(json.loads(line)["outcome"] for line in lines if line.startswith("{"))
    assert outcomes.total() == EACH * len(KINDS)
    if name == "checked":
        assert outcomes["other"] == 0, [line for line in lines if '"other"' in line]
        assert outcomes["refused"] > outcomes["equal"] > 0  # what is hit between the tables and the images is equal
    else:  # what was written without checksums
        assert outcomes["refused"] > 30


def test_checksums_are_xxh64_of_what_is_stored(folder):
    """Against the values that xxHash's own program prints."""
    known = {b"": 0xEF46DB3751D8E999, b"a": 0xD24EC4F1A98C6E5B, b"abc": 0x44BC2CF5AD770999,
             bytes(range(100)): 0x6AC1E58032166597}  # fmt: skip
    for data, value in known.items():
        assert checksum(np.frombuffer(data, np.uint8)) == value
        assert checksum(np.frombuffer(b"." + data, np.uint8)[1:]) == value  # not aligned
    info, columns = open_checked(folder / "checked.beton")
    assert info.digest and columns.keys() == {*Samples._fields, "label"}
    for index in range(COUNT):
        assert columns["mask_checksum"][index] == checksum(encode_runs(Pictures(masked=True)[index][2]).reshape(-1))
    assert open_checked(folder / "foreign.beton")[1].keys() == {"image", "image_bytes", "raw", "size", "label"}


def test_damaged_side_files(folder, tmp_path):
    path, rng = tmp_path / "x.beton", np.random.default_rng(0)
    shutil.copy(folder / "checked.beton", path)
    text = side_file(folder / "checked.beton").read_bytes()
    side_file(path).write_bytes(text)
    whole, refused = inspect(path), 0
    for kind, _ in itertools.product(KINDS, range(8)):
        side_file(path).write_bytes(text)
        said = damage(side_file(path), kind, rng)
        try:
            assert inspect(path) == whole, said
        except ValueError as error:
            refused += 1
            assert "x.beton" in str(error) and "\n" not in str(error), said
    assert refused > 40
    for content in ("[" * 100_000, '{"sha256": 3}', '{"classes": "abc"}', "{}"):
        side_file(path).write_text(content)
        with pytest.raises(ValueError, match=r"x\.beton\.json: (not such a file|damaged, or of another file)"):
            inspect(path)


def test_files_of_the_same_size_do_not_share_a_side_file(tmp_path):
    for number, name in enumerate(("a", "b")):
        image = np.full((8, 8, 3), number, np.uint8)
        write([(image, 0)], tmp_path / f"{name}.beton", classes=[name], raw_share=1, progress=False)
    assert inspect(tmp_path / "a.beton").digest != inspect(tmp_path / "b.beton").digest
    shutil.copy(side_file(tmp_path / "a.beton"), side_file(tmp_path / "b.beton"))
    with pytest.raises(ValueError, match=r"b\.beton\.json: damaged, or of another file; delete it, or write it again"):
        inspect(tmp_path / "b.beton")
    side_file(tmp_path / "b.beton").unlink()
    assert inspect(tmp_path / "b.beton").classes is None


@pytest.mark.parametrize("raw_share", [0, 1])
def test_one_flipped_bit_of_an_image_is_noticed_and_named(tmp_path, raw_share):
    path = tmp_path / "x.beton"
    write([Pictures(False)[index][0] for index in range(4)], path, raw_share=raw_share, workers=1, progress=False)
    stored = Pictures(False)[2][0]
    content = bytearray(path.read_bytes())
    if raw_share == 0:  # inside the second half of the JPEG: it decodes without an error
        stored = encode(stored, 90)
    at = content.index(stored.tobytes()) + stored.size // 2
    content[at] ^= 4
    path.write_bytes(content)
    inspect(path)
    with pytest.raises(ValueError, match=r"x\.beton: image 2 is damaged; write it again"):
        list(eval_loader(path, image_size=32, batch_size=4, workers=1).epoch())


def test_lies_about_sizes_are_refused(folder, tmp_path):
    """A JPEG of few bytes that claims 4 gigapixels would be decoded into 13 GB."""
    path = tmp_path / "x.beton"
    shutil.copy(folder / "foreign.beton", path)
    info, reader = inspect(path), Reader(path)
    assert info.digest is None and info.max_size == (200, 210)
    metadata = reader.metadata.copy()
    first = int(np.argmin(metadata["f0"]["mode"]))  # a JPEG
    metadata["f0"]["height"][first] = metadata["f0"]["width"][first] = 65535
    with open(path, "r+b") as file:
        file.seek(HeaderType.itemsize + reader.field_descriptors.nbytes)
        file.write(metadata.tobytes())
    with pytest.raises(ValueError, match=r"x\.beton: not a \.beton file, or damaged in its tables; write it again"):
        inspect(path)


def main(path: Path) -> None:
    """Damages copies of a file and reads them: a line before each, a JSON line after."""
    view = StoredView() if path.name == "checked.beton" else CentreView(image_size=32)

    def read(path: Path) -> list[dict]:
        return list(Loader(path, view, 20, mean=(0, 0, 0), std=(1, 1, 1), workers=1).epoch())

    reference, rng = read(path), np.random.default_rng(0)
    copy = path.with_name(f"damaged-{path.name}")
    for number, kind in itertools.product(range(EACH), KINDS):
        shutil.copy(path, copy)
        side_file(copy).unlink(missing_ok=True)
        if number % 2 and side_file(path).exists():
            shutil.copy(side_file(path), side_file(copy))
        said = damage(copy, kind, rng)
        print(said, flush=True)
        try:
            batches = read(copy)
        except (ValueError, OSError) as error:
            line = str(error)
            outcome = "refused" if copy.name in line and "\n" not in line else "other"
        else:
            equal = len(batches) == len(reference) and all(
                a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
                for a, b in zip(batches, reference, strict=True)
            )
            outcome, line = "equal" if equal else "other", ""
        print(json.dumps({"damage": said, "outcome": outcome, "said": line}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
