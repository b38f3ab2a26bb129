"""Settings of segmentation, the other task of stage 3."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trainer.fields import Count, Factors, Fraction, OptionalPath, Positive


@dataclass
class Segmentation:
    """Semantic segmentation (--task segmentation): its head, and how it is evaluated."""

    free: ClassVar = frozenset({"beside"})

    head: str = "linear"
    """The head: a name from models.HEADS."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The head's own architecture, such as {blocks: 4} or {channels: 512}."""
    head_lr: Positive = 1.0
    """Factor on the head's learning rate."""
    mode: Literal["slide", "whole"] = "slide"
    """Evaluate in windows of data.image_size, or the whole image at once."""
    stride: Fraction = 2 / 3
    """Step between two windows, as a share of their side."""
    short_side: Count | None = None
    """Pixels that an image's shorter side is resized to; by default data.image_size."""
    scales: Factors = field(default_factory=lambda: [1.0])
    """Factors on that size over which the prediction is averaged."""
    flip: bool = False
    """Average over the mirrored image too."""
    beside: OptionalPath = None
    """Another run's export, which pictures show beside this one."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when the settings do not fit together."""
        if given := settings.stage3.distill:
            raise ValueError(f"stage3.distill {given}: is for labels of whole images; leave it out in segmentation")
        for name in ("mixup", "cutmix", "label_smoothing"):
            if value := getattr(settings.stage3, name):
                raise ValueError(
                    f"stage3.{name} {value}: is for labels of whole images; segmentation learns from masks, set it to 0"
                )


SETTINGS = {"segmentation": Segmentation}
