"""Settings of stage 2."""

from dataclasses import dataclass
from typing import Any, Literal

from trainer.stages.alignment import check_alignment


@dataclass
class Stage2:
    """Stage 2, feature alignment."""

    loss: Literal["mse", "cosine_smooth_l1"] = "mse"
    """What pulls the student's final tokens to the teacher's."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when the settings do not fit together."""
        check_alignment(settings)
        settings.probe.resolve(settings)  # quick probes are part of its evaluations


SETTINGS = {"stage2": Stage2}
