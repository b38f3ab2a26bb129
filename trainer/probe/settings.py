"""Settings of the probes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trainer.fields import Count, CountOrZero, Factors, Named, OpenFraction, Positive, non_empty


@dataclass
class Probe:
    """Linear probes on every module of every block, teacher beside student."""

    free: ClassVar = frozenset({"keep_features", "test"})  # test sets are compared by what they hold

    models: non_empty(Literal["teacher", "student"]) = field(default_factory=lambda: ["teacher", "student"])
    """Which models are probed."""
    modules: non_empty(str) | None = None
    """Taps such as blocks.*.act or norm; by default patch_embed, all modules of each block, and norm."""
    pooling: non_empty(Literal["mean", "prefix", "both"]) | None = None
    """How tokens become one vector; by default every way that the model has."""
    solver: Literal["logistic", "ridge"] = "logistic"
    """Multinomial logistic regression, or least squares, which is quicker."""
    penalties: Factors = field(default_factory=lambda: [0.01, 0.1, 1.0])
    """scikit-learn's C; the validation images choose."""
    tolerance: Positive = 3e-5
    """Logistic solver: distance to the least objective, nats per image."""
    validation: OpenFraction = 0.1
    """Share of the training images that chooses penalty and module."""
    images: Count | None = None
    """Number of training images to fit on; by default as many as store_gib holds."""
    store_gib: Positive = 64.0
    """GiB on disk for the features. Where all images need more, a part is read, with equally many per class."""
    test: Named = field(default_factory=list)
    """NAME=FILE ...: further test sets beside data.val, such as shifted ones."""
    batch_size: Count = 64
    """Images per forward pass, on each rank."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the features on disk."""
    keep_features: bool = False
    """Keep the features in the run folder when all is done."""
    every: CountOrZero = 0
    """Stage 2: steps between two quick probes of the student beside the teacher; 0 makes none."""

    def resolve(self, settings: Any) -> None:
        """Lets evaluations happen where quick probes want them; raises ValueError when they cannot."""
        every = settings.train.eval_every = settings.train.eval_every or self.every
        if self.every and self.every % every:
            raise ValueError(
                f"probe.every {self.every}: must be a multiple of train.eval_every {every}: a quick probe is part of "
                "an evaluation"
            )


SETTINGS = {"probe": Probe}
