"""Batches that lie in memory, for benchmarks that are not about data: nothing is read, decoded or copied."""

from collections.abc import Iterator

import torch
from torch import Tensor


class MemoryLoader:
    """What the training loop asks of a `data.Loader`: random images on the device, a few batches again and again.

    Attributes:
        steps_per_epoch, accumulate, micro_batch_size, num_samples, has_labels, classes, device: as a loader's.
    """

    has_labels, classes = True, None

    def __init__(
        self,
        image_size: int | tuple[int, int],
        micro_batch_size: int,
        *,
        accumulate: int = 1,
        steps_per_epoch: int = 1000,
        num_classes: int = 1000,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        masks: bool = False,
        evaluates: bool = False,
        kept: int = 2,
        seed: int = 0,
    ) -> None:
        """Makes `kept` batches.

        Args:
            image_size: side, or (height, width), pixels.
            num_classes: of labels, and of the masks that `masks` asks for.
            evaluates: batches have `valid`, as an evaluation's; else `key`, as in training.
        """
        self.steps_per_epoch, self.accumulate, self.micro_batch_size = steps_per_epoch, accumulate, micro_batch_size
        self.num_samples, self.device = steps_per_epoch * accumulate * micro_batch_size, torch.device(device)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        random, B = torch.Generator().manual_seed(seed), micro_batch_size
        self.batches: list[dict[str, Tensor]] = []
        for i in range(kept):
            batch = {
                "image": torch.randn(B, 3, height, width, generator=random).to(dtype),
                "index": torch.arange(i * B, (i + 1) * B),
                "label": torch.randint(num_classes, (B,), generator=random),
            }
            if masks:
                batch["mask"] = torch.randint(num_classes, (B, height, width), generator=random, dtype=torch.uint8)
            if evaluates:
                batch["valid"] = torch.ones(B, dtype=torch.bool)
            else:
                batch["key"] = torch.randint(1 << 62, (B,), generator=random)
            self.batches.append({name: value.to(self.device) for name, value in batch.items()})

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch * self.accumulate

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from global batch `start` on; every epoch is alike. They are not to be changed."""
        for i in range(start * self.accumulate, len(self)):
            yield dict(self.batches[i % len(self.batches)])

    def close(self) -> None:
        """There is nothing to end."""
