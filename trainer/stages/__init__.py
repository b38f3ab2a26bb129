"""The stages, in one table."""

from trainer.stages.attention_alignment import AttentionAlignment
from trainer.stages.base import Stage
from trainer.stages.feature_alignment import FeatureAlignment
from trainer.stages.finetune import Finetune

STAGES: dict[str, type[Stage]] = {"1": AttentionAlignment, "2": FeatureAlignment, "3": Finetune}

__all__ = ["STAGES", "Stage"]
