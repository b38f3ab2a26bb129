"""The loaders that `make bench-loader` compares give the same kind of batches from the same images."""

from pathlib import Path

import pytest
import torch

from benchmarks import loader
from data.sources import ImageFolder
from data.write import write


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "photos"
    loader.make_photos(folder, 10, 64, 48)
    write(ImageFolder(folder), folder.with_suffix(".beton"), progress=False)
    return folder


@pytest.mark.parametrize("kind", loader.KINDS)
def test_contenders_read_an_epoch(photos: Path, kind: str) -> None:
    epoch_of = getattr(loader, kind)(photos, photos.with_suffix(".beton"), size=32, batch=4, cores=1)
    batches = list(epoch_of(0))
    assert [batch.shape for batch in batches] == [(4, 3, 32, 32)] * 2
    images = torch.cat(batches)
    assert images.dtype == torch.float32 and abs(images.mean()) < 1 and 0.1 < images.std() < 2  # normalised
