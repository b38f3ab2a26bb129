"""What a dataset had open before the writing processes start: they read right, or fail by name."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Subset

from data.write import write
from tests.support.pictures import content

COUNT, SIDE = 256, 24  # as many as four processes share


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


class Opened:
    """Reads its images with a seek and a read; opened before, in whatever way."""

    def __init__(self, read) -> None:
        self.read = read

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self.read(index), np.uint8).reshape(SIDE, SIDE, 3)


def plain(root: Path):
    size = SIDE * SIDE * 3
    (root / "all").write_bytes(b"".join(pixels(index).tobytes() for index in range(COUNT)))
    file = open(root / "all", "rb")  # noqa: SIM115
    return lambda index: (file.seek(index * size), file.read(size))[1]


def unbuffered_and_deleted(root: Path):
    plain(root)
    number, size = os.open(root / "all", os.O_RDWR), SIDE * SIDE * 3
    (root / "all").unlink()
    return lambda index: (os.lseek(number, index * size, os.SEEK_SET), os.read(number, size))[1]


def zipped(root: Path):
    with zipfile.ZipFile(root / "x.zip", "w") as file:
        for index in range(COUNT):
            file.writestr(str(index), pixels(index).tobytes())
    file = zipfile.ZipFile(root / "x.zip")
    return lambda index: file.read(str(index))


def tarred(root: Path):
    with tarfile.open(root / "x.tar", "w") as file:
        for index in range(COUNT):
            info, data = tarfile.TarInfo(str(index)), pixels(index).tobytes()
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    file = tarfile.open(root / "x.tar")  # noqa: SIM115
    return lambda index: file.extractfile(str(index)).read()


@pytest.mark.parametrize("kind", [plain, unbuffered_and_deleted, zipped, tarred])
def test_open_files_are_read_right(tmp_path, kind):
    dataset = Opened(kind(tmp_path))
    nested = ConcatDataset([Subset(dataset, range(100)), Subset(dataset, range(100, COUNT))])
    write(nested, tmp_path / "x.beton", raw_share=1, workers=4, progress=False)
    images, _ = content(tmp_path / "x.beton")
    assert np.array_equal(images, np.stack([pixels(index) for index in range(COUNT)]))
    assert np.array_equal(dataset[7], pixels(7))  # here it is still open


def test_pipes_are_refused(tmp_path):
    """Which of their bytes a process would get is chance."""
    reader, writer = os.pipe()
    os.write(writer, bytes(range(48)))
    dataset = Opened(lambda index: pixels(index) if index == 0 else os.read(reader, 1) * (SIDE * SIDE * 3))
    with pytest.raises(ValueError, match="255 of 256 images unreadable"):
        write(dataset, tmp_path / "x.beton", workers=2, progress=False)
    assert len(os.read(reader, 48)) == 48  # nothing was taken
