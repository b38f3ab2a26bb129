"""Settings of the evaluation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.fields import Count, Named, OptionalPath, Positive, non_empty

Measure = Literal["knn", "probe", "head", "zero_shot", "segmentation", "mask_probe", "agreement", "speed"]


@dataclass
class Evaluate:
    """A verdict on a model (--stage evaluate). Its probe, its batches and its features on disk: see probe."""

    measures: non_empty(Measure) | None = None
    """What is measured; by default all that models and images allow."""
    models: non_empty(Literal["teacher", "student"]) | None = None
    """Which models are judged; by default those that there are."""
    beside: Named = field(default_factory=list)
    """NAME=MODEL ...: further models, each an export or a name of timm's."""
    pooling: non_empty(Literal["pooled", "prefix", "mean", "both"]) = field(default_factory=lambda: ["pooled"])
    """Features for k-NN and probe: what the model's head reads, the class token, the mean token, or these two."""
    neighbours: Count = 20
    """Training images that vote in k-NN; images that count as near in the agreement."""
    class_embeddings: OptionalPath = None
    """Zero-shot: a file of text embeddings, one tensor [classes, width], or one [width] per class by its name."""
    sizes: list[Count] = field(default_factory=list)
    """Sides in pixels at which speed is measured; by default that of the images."""
    seconds: Positive = 1.0
    """Seconds that each speed is measured for, at least."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when two models have one name."""
        names = [pair.partition("=")[0] for pair in self.beside]
        for name in names:
            if name in ("teacher", "student") or names.count(name) > 1:
                raise ValueError(f"evaluate.beside {name}: the name is taken; choose another")


SETTINGS = {"evaluate": Evaluate}
