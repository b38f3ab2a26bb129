"""Features of a .beton file as safetensors: `python -m trainer.evaluate.embed EXPORT FILE.beton OUT.safetensors`.

`models.embed` does the same for a folder of images. Here the names in the file are the images' numbers.
"""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from torch import Tensor, nn

import data
from models.embed import given_to, main


def of_beton(
    path: Path, net: nn.Module, batch_size: int, workers: int | None, unreadable: dict[str, str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of a .beton file, or of `digits`, in order; see `models.embed.Batches`. A damaged file is an error."""
    given = given_to(net)
    try:
        loader = data.eval_loader(
            data.resolve(str(path), "val"), image_size=given["input_size"][-2:], batch_size=batch_size,
            crop_pct=min(1.0, given["crop_pct"]), mean=given["mean"], std=given["std"], workers=workers,
        )  # fmt: skip
        with closing(loader):
            for batch in loader.epoch():
                valid = batch["valid"]
                yield [str(index) for index in batch["index"][valid].tolist()], batch["image"][valid]
    except data.DamagedError as error:
        raise ValueError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(batches_of=of_beton))
