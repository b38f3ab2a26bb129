"""Folders: what they are taken for, and what is passed over."""

import numpy as np
import pytest

from data import inspect
from data.sources import ImageFolder, in_words
from data.write import write
from tests.support.pictures import picture


def test_what_a_folder_is_taken_for(folder, tmp_path):
    assert ImageFolder(folder).classes == ["ant", "cat"]
    assert ImageFolder(folder, unlabelled=True).classes is None
    assert "a single subfolder" in ImageFolder(folder.parent).why or "deeper" in ImageFolder(folder.parent).why
    (folder / "cat" / "deep").mkdir()
    picture(0).save(folder / "cat" / "deep" / "x.jpg")
    assert "deeper" in ImageFolder(folder).why and ImageFolder(folder).classes is None
    picture(0).save(folder / "x.jpg")
    assert "directly in" in ImageFolder(folder).why
    assert len(ImageFolder(folder)) == 8
    write(ImageFolder(folder), tmp_path / "x.beton", progress=False)
    assert not inspect(tmp_path / "x.beton").has_labels


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(folder / "cat", target_is_directory=True)
    (tmp_path / "linked" / "b").mkdir()
    (tmp_path / "linked" / "b" / "x.png").symlink_to(folder / "ant" / "0.png")
    dataset = ImageFolder(tmp_path / "linked")
    assert dataset.classes == ["a", "b"] and len(dataset) == 4 and np.array_equal(dataset[3][0], picture(10))
    (folder / "cat" / "on").symlink_to(tmp_path / "linked" / "b")
    assert len(ImageFolder(tmp_path / "linked")) == 5
    for target in (tmp_path, tmp_path / "linked", folder / "cat"):  # upwards, and two that lead to each other
        (tmp_path / "linked" / "b" / "back").symlink_to(target)
        with pytest.raises(ValueError, match="leads back to a folder that it lies in; remove the link"):
            ImageFolder(tmp_path / "linked")
        (tmp_path / "linked" / "b" / "back").unlink()


def test_what_is_passed_over_is_told(folder):
    picture(1).save(folder / "cat" / "bare", "JPEG")
    picture(1).save(folder / "ant" / "odd.data", "PNG")
    (folder / "ant" / "notes.md").write_text("of ants")
    (folder / ".cache").mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (folder / "ant" / name).write_bytes(b"system")
    dataset = ImageFolder(folder)
    assert len(dataset) == 8 and dataset.classes == ["ant", "cat"]
    assert sorted(map(str, dataset.passed_over)) == [".cache", "ant/notes.md", "readme.txt"]
    assert in_words(dataset.passed_over).startswith("; 3 other files passed over (")


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (("train/a/1", "train/b/2", "val/a/3"), "train and val"),
        (("train/1", "validation/2"), "train and validation"),
        (("Training/1", "test/2"), "Training and test"),
        (("coco/train2017/1", "coco/val2017/2"), "train2017 and val2017"),
        (("train/a/1", "train/b/2"), "split train"),
    ],
)
def test_splits_are_not_one_set(tmp_path, names, given):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / f"{name}.png")
    with pytest.raises(
        ValueError, match=rf"{given}; write each as a file of its own: python -m data\.write {tmp_path}"
    ):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, unlabelled=True)) == len(names)


def test_names_of_classes(tmp_path):
    for name in ("e\u0301clair", "bus", "Bus"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "1.png")
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ["Bus", "bus", "\u00e9clair"] and "differ only by case: 'Bus' and 'bus'" in dataset.why
    assert [dataset[index][1] for index in range(3)] == [0, 1, 2]
    for other, said in (("\u00e9clair", "look the same"), (" bus", "look the same"), (" ", "is blank")):
        (tmp_path / other).mkdir()
        picture(0).save(tmp_path / other / "1.png")
        with pytest.raises(ValueError, match=said):
            ImageFolder(tmp_path)
        (tmp_path / other / "1.png").unlink()
        (tmp_path / other).rmdir()
