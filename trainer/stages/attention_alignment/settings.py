"""Settings of stage 1."""

from dataclasses import dataclass
from typing import Any, Literal

from trainer.stages.alignment import check_alignment


@dataclass
class Stage1:
    """Stage 1, attention alignment."""

    match: Literal["output", "heads"] = "output"
    """Where the two attentions are compared: after the output projection, or before it."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when the settings do not fit together."""
        check_alignment(settings)
        if self.match == "heads" and settings.train.compile:
            raise ValueError("stage1.match heads: lies inside what train.compile compiles; use one of the two")


SETTINGS = {"stage1": Stage1}
