"""Settings of what a run reports to."""

from dataclasses import dataclass


@dataclass
class Wandb:
    """Weights & Biases; offline unless WANDB_API_KEY is set."""

    enabled: bool = True
    """Whether to log there."""
    project: str = "unsoftmax"
    """The project's name."""
