"""Writing dataset objects: every setting, and whole files or none."""

import os
import signal

import numpy as np
import pytest
import torch

from data import inspect
from data.sources import ImageFolder
from data.write import write
from tests.support.pictures import content, picture


def test_all_unreadable(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_text("no image")
    with pytest.raises(ValueError, match="none of the 2 images is readable"):
        write(ImageFolder(tmp_path), tmp_path / "x.beton", skip_unreadable=True, progress=False)


def test_dataset_objects(tmp_path):
    """Tuples as torchvision's, dicts as Hugging Face's, with masks, at the settings asked for."""

    class Pictures:
        classes = ("even", "odd")

        def __len__(self):
            return 30

        def __getitem__(self, index):
            return picture(index, (40, 30)), index % 2

    side = write(Pictures(), tmp_path / "x.beton", max_side=20, raw_share=0, quality=95, progress=False)
    assert side["classes"] == ["even", "odd"] and inspect(tmp_path / "x.beton").max_size == (15, 20)
    images, labels = content(tmp_path / "x.beton")
    assert labels == [index % 2 for index in range(30)]
    assert np.abs(images[3].astype(int) - np.asarray(picture(3, (20, 15)))).mean() < 6  # JPEG, and another resize

    items = [{"img": picture(i), "y": i, "mask": np.full((16, 20), i), "id": "x"} for i in range(5)]
    write(items, tmp_path / "y.beton", image_key="img", label_key="y", progress=False)
    info = inspect(tmp_path / "y.beton")
    assert info.has_masks and info.max_label == 4 and info.classes is None

    with pytest.raises(ValueError, match=r"1 of 2 images unreadable, the first is item 1 \(ValueError: label -1"):
        write([(picture(0), 0), (picture(0), -1)], tmp_path / "z.beton", progress=False)
    with pytest.raises(ValueError, match="an image must be a PIL image or a uint8 array, not Tensor"):
        write([torch.zeros(3, 4, 4)], tmp_path / "z.beton", progress=False)


def test_torchvision(folder, tmp_path):
    from torchvision.datasets import ImageFolder as TorchvisionFolder

    (folder / "cat" / ".hidden.png").unlink()
    side = write(TorchvisionFolder(folder), tmp_path / "x.beton", raw_share=1, progress=False)
    assert side["classes"] == ["ant", "cat"] and side["source"] == "torchvision.datasets.folder.ImageFolder"
    write(ImageFolder(folder), tmp_path / "y.beton", raw_share=1, progress=False)
    assert np.array_equal(content(tmp_path / "x.beton")[0], content(tmp_path / "y.beton")[0])


def test_smart_and_shares(tmp_path):
    items = [np.zeros((side, side, 3), np.uint8) for side in [10, 200] * 40]
    sizes = {}
    for raw_share in ("smart", 0, 0.5, 1):
        side = write(items, tmp_path / "x.beton", raw_share=raw_share, workers=1, progress=False)
        content_bytes = (tmp_path / "x.beton").read_bytes()
        sizes[raw_share] = content_bytes.count(b"\xff\xd8\xff")
        assert side["settings"]["raw_share"] == raw_share
    assert sizes["smart"] == 40 and sizes[0] == 80 and sizes[1] == 0 and 20 < sizes[0.5] < 60


def test_an_image_larger_than_a_page(tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3)).astype(np.uint8)  # 8.7 MB, pages have 8.4
    write([np.zeros((9, 9, 3), np.uint8), large], tmp_path / "x.beton", raw_share=1, progress=False)
    images, _ = content(tmp_path / "x.beton")
    assert np.array_equal(images[1], large)


class Deadly:
    """A dataset that ends the process that reads its item 70."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        if index == 70:
            os.kill(os.getpid(), signal.SIGKILL)
        return picture(index)


def test_a_killed_process_is_an_error_not_a_hang(tmp_path):
    (tmp_path / "x.beton").write_bytes(b"older")
    with pytest.raises(RuntimeError, match="a writing process was killed"):
        write(Deadly(), tmp_path / "x.beton", progress=False)
    assert os.listdir(tmp_path) == ["x.beton"] and (tmp_path / "x.beton").read_bytes() == b"older"
