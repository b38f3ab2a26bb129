"""Stage 3, supervised fine-tuning for classification: head and backbone on labels, with timm's recipe."""

import torch
from timm.data import Mixup
from timm.layers import DropPath
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.stages.base import Batch, Pass, Stage


class Finetune(Stage):
    """Cross-entropy with label smoothing, mixup, cutmix and drop path."""

    name = "supervised fine-tuning"
    trainable = "all"

    def prepare(self) -> None:
        """A head of the right size, drop path, mixing, checkpointing and compilation."""
        options = self.settings.stage3
        if options.num_classes != self.student.num_classes or options.reset_head:
            self.student.reset_classifier(options.num_classes)
        set_drop_path(self.student, options.drop_path)
        self.save_memory_and_time(self.student)
        self.mix = None
        if options.mixup > 0 or options.cutmix > 0:
            self.mix = Mixup(
                mixup_alpha=options.mixup,
                cutmix_alpha=options.cutmix,
                label_smoothing=options.label_smoothing,
                num_classes=options.num_classes,
            )

    def losses(self, batch: Batch, see: Pass) -> dict[str, Tensor]:
        """{"loss": [B]}."""
        if not self.training:
            return {"loss": F.cross_entropy(see.student[1].float(), batch["label"], reduction="none")}
        target = batch["label"]
        if self.mix is not None:
            see.image, target = self.mix(see.image, target)  # target: probabilities, already smoothed
        smoothing = self.settings.stage3.label_smoothing if self.mix is None else 0.0
        logits = see.student[1].float()
        return {"loss": F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)}


def set_drop_path(vit: VisionTransformer, rate: float) -> None:
    """Stochastic depth, arXiv 1603.09382, rising linearly over depth to `rate`, as timm builds it."""
    for block, drop in zip(vit.blocks, torch.linspace(0, rate, len(vit.blocks)).tolist(), strict=True):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(drop) if drop > 0 else nn.Identity())
