"""Settings of stage 2."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.fields import Auto, CountOrZero, NonNegative, Positive
from trainer.stages.alignment import check_alignment, check_kept_on


@dataclass
class Stage2:
    """Stage 2, feature alignment."""

    loss: Literal["mse", "cosine_smooth_l1"] = "mse"
    """What pulls the student's final tokens to the teacher's."""
    prefix_weight: NonNegative = 1.0
    """Weight of a prefix token (class token, registers) in the loss, where a patch token has 1."""
    standardise: bool = False
    """Compare tokens in units of the teacher's standard deviation per channel, measured before the first step."""
    blocks: list[CountOrZero] | Auto = field(default_factory=list)
    """Blocks whose outputs are matched as well, such as [3, 7]; auto:3 takes up to three, at equal distances."""
    block_weight: Positive = 1.0
    """Weight of the mean loss of these blocks, where the final tokens have 1."""
    attention_weight: NonNegative = 0.0
    """Weight of stage 1's loss, the alignment of each block's attention, which is kept on; 0 is off."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when the settings do not fit together."""
        check_alignment(settings)
        settings.probe.resolve(settings)  # quick probes are part of its evaluations
        check_kept_on(settings, "stage2", self.attention_weight)


SETTINGS = {"stage2": Stage2}
