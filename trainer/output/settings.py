"""Settings of what a run reports to."""

from dataclasses import dataclass
from typing import Literal

Tracking = list[Literal["wandb", "tensorboard"]]


@dataclass
class Wandb:
    """Weights & Biases, where `tracking` names it; offline unless WANDB_API_KEY is set."""

    project: str = "unsoftmax"
    """The project's name."""
