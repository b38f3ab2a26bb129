"""The images of a stage: what the files hold, in which order they are read, and the loaders."""

from typing import Any

import torch

import data
from trainer.config import Settings
from trainer.engine.engine import accumulation
from trainer.ranks.world import World, dist
from trainer.setup.build import Job
from trainer.setup.resolution import PhasedLoader, Size


def reading_order(settings: Settings, job: Job, kept: dict[str, Any] | None) -> dict[str, Any]:
    """The order in which training reads its file, and the window: what `loaders` takes and a checkpoint keeps.

    All ranks call it and take rank 0's choice, since each machine may have another memory. A run that goes on takes
    what it began with (`kept`, of its checkpoint): another order would not show each image once per epoch.
    """
    if kept is None:
        order, window = data.choose_order(job.train.path, settings.data.order, settings.data.window)
        kept = {"order": order, "window": window}
    chosen = [kept]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def loaders(settings: Settings, job: Job, me: World, order: dict[str, Any]) -> tuple[data.Loader, data.Loader | None]:
    """Training and evaluation batches for this rank.

    Args:
        order: what `reading_order` gave.
    """
    accumulate = accumulation(settings, me.size)
    given = job.export["input"]
    common = {
        "mean": given["mean"], "std": given["std"], "rank": me.rank, "world_size": me.size, "device": me.device,
        "dtype": torch.bfloat16 if settings.train.bf16 else torch.float32, "workers": settings.data.workers,
    }  # fmt: skip

    def train_at(size: Size) -> data.Loader:
        return job.stage.train_loader(
            settings, job.train.path, image_size=size, batch_size=settings.train.batch_size, accumulate=accumulate,
            seed=settings.train.seed, **order, **common,
        )  # fmt: skip

    if len(job.sizes) == 1:
        train = train_at(job.sizes[0].size)
    else:
        train = PhasedLoader(job.sizes, train_at, job.steps_per_epoch, accumulate)
    if job.val is None:
        return train, None
    micro = settings.train.batch_size // me.size // accumulate
    return train, job.stage.eval_loader(
        settings, job.val.path, image_size=given["image_size"], batch_size=micro, **common
    )
