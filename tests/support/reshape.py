"""Saves a small engine's checkpoint, then loads and saves it again at other world sizes and ZeRO stages.

`python tests/support/reshape.py FOLDER` leaves one checkpoint folder a try in FOLDER/<number>, for test_checkpoint.py.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch
from torch import Tensor, nn

from tests.support.ranks import forked
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import build_engine
from trainer.engine.optim import AdamW
from trainer.engine.shards import Shards
from trainer.ranks.world import join, this_process

TRIES = [(2, 1), (1, 3), (4, 2), (2, 3), (4, 1), (1, 2)]  # (ranks, ZeRO stage)
BATCH = 8


class Net(nn.Module):
    """Odd sizes, so that partitions are padded and parameters cut; two parameter groups, something frozen, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.layers[1].weight.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layers(x).square().mean()


def run_rank(zero: int, source: Path | None, target: Path) -> None:
    """Train three steps, or load from `source`; save to `target`; then check that training can go on."""
    me = this_process()
    join(me)
    torch.manual_seed(0)
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in trained if p.ndim == 1]}]  # fmt: skip
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // me.size,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    engine = build_engine(net, AdamW(groups, 0.9, lr=1e-2), config)

    def step() -> None:
        engine.backward(engine(torch.randn(BATCH // me.size, 7).bfloat16()))
        engine.step()

    if source is None:
        for _ in range(3):
            step()
    else:
        checkpoints = Checkpoints(source, 1)
        checkpoints.restore(engine, checkpoints.newest())
    checkpoints = Checkpoints(target, 1)
    checkpoints.begin(engine, {"step": engine.global_steps, "samples": engine.global_steps * BATCH})
    checkpoints.publish()
    shards = Shards(engine)
    for name, parameter in shards.parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter.float(), shards.full(name).bfloat16().float()), name
    step()
    assert engine.was_step_applied()
    assert shards.optimizer_step() == 4


def main(folder: Path) -> int:
    """Each try in ranks of its own; returns the exit status."""
    source = None
    for number, (ranks, zero) in enumerate(TRIES):
        if not forked(ranks, partial(run_rank, zero, source, folder / str(number))):
            return 1
        source = folder / str(number)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
