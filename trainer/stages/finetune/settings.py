"""Settings of stage 3, for both of its tasks."""

from dataclasses import dataclass, fields
from typing import Any

from trainer.fields import BelowOne, Count, Fraction, NonNegative, PathName, Positive
from trainer.stages.alignment import check_kept_on


@dataclass
class Stage3:
    """Stage 3, supervised fine-tuning."""

    num_classes: Count | None = None
    """Classes of the head; by default those of the training data."""
    reset_head: bool = False
    """Start from a new head, even where the teacher's fits."""
    layer_decay: Fraction | None = None
    """Factor on the learning rate per block, from the last one to the first."""
    drop_path: BelowOne = 0.0
    """Stochastic depth: share of the paths that are dropped in the last block."""
    label_smoothing: BelowOne = 0.0
    """Share of the target that is spread over all classes."""
    mixup: NonNegative = 0.0
    """Mixup's alpha; 0 is off."""
    cutmix: NonNegative = 0.0
    """CutMix's alpha; 0 is off."""
    ema: BelowOne | None = None
    """Decay of the weights' moving average, which is then evaluated and exported."""
    distill: PathName | None = None
    """The export of a fine-tuned model, softmax mostly, whose logits are learned as well."""
    distill_weight: Fraction = 0.5
    """Share of that in the loss; the rest is of the labels."""
    distill_temperature: Positive = 1.0
    """Temperature of both logits in it."""
    attention_weight: NonNegative = 0.0
    """Weight of stage 1's loss, the alignment of each block's attention with the teacher's, kept on; 0 is off."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when the settings do not fit together."""
        check_kept_on(settings, "stage3", self.attention_weight)
        for f in fields(self):
            given = getattr(self, f.name)
            if f.name.startswith("distill_") and self.distill is None and given != f.default:
                raise ValueError(f"stage3.{f.name} {given}: changes nothing without stage3.distill; give that too")


SETTINGS = {"stage3": Stage3}
