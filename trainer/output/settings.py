"""Settings of what a run reports to."""

from dataclasses import dataclass
from typing import Literal

TRACKERS = {"wandb": "trainer.output.trackers:Wandb", "tensorboard": "trainer.output.trackers:TensorBoard"}
Tracking = list[Literal[tuple(TRACKERS)]]


@dataclass
class Wandb:
    """Weights & Biases, where `tracking` names it; offline unless WANDB_API_KEY is set."""

    project: str = "unsoftmax"
    """The project's name."""
