"""The stages, in one table; of stage 3 there is one for each task."""

from trainer.config import Settings
from trainer.stages.attention_alignment import AttentionAlignment
from trainer.stages.base import Stage
from trainer.stages.feature_alignment import FeatureAlignment
from trainer.stages.finetune import Finetune
from trainer.stages.segmentation.stage import Segmentation

STAGES: dict[str, type[Stage] | dict[str, type[Stage]]] = {
    "1": AttentionAlignment,
    "2": FeatureAlignment,
    "3": {"classification": Finetune, "segmentation": Segmentation},
}


def stage_of(settings: Settings) -> type[Stage]:
    """The stage that the settings ask for."""
    found = STAGES[settings.stage]
    return found[settings.task] if isinstance(found, dict) else found


__all__ = ["STAGES", "Stage", "stage_of"]
