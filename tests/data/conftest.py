"""Shared by the tests of data: a folder of images."""

from pathlib import Path

import pytest

from tests.support.pictures import picture


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of three images, and files that are no images."""
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "ant")):
        (root / name).mkdir(parents=True)
        for index in range(3):
            picture(10 * label + index).save(root / name / f"{index}.png")
    (root / "readme.txt").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("not an image")
    return root
