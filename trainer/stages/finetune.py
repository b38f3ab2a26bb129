"""Stage 3, supervised fine-tuning for classification: head and backbone on labels, with timm's recipe."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import ViT
from trainer.stages.base import Batch, Pass, Stage
from trainer.stages.keyed import DropPath, Mixup, draw_paths


class Finetune(Stage):
    """Cross-entropy with label smoothing, mixup, cutmix and drop path, all keyed by sample."""

    name = "supervised fine-tuning"
    trainable = "all"

    def prepare(self) -> None:
        """A head of the right size, drop path, mixing, checkpointing and compilation."""
        options = self.settings.stage3
        if options.num_classes != self.student.num_classes or options.reset_head:
            self.student.reset_classifier(options.num_classes)
        self.paths = set_drop_path(self.student, options.drop_path)
        self.save_memory_and_time(self.student)
        self.mix = Mixup(options.mixup, options.cutmix) if options.mixup > 0 or options.cutmix > 0 else None

    def score(self, values: dict[str, float]) -> float:
        """Top-1."""
        return values["top1"]

    def losses(self, batch: Batch, see: Pass) -> dict[str, Tensor]:
        """{"loss": [B]}."""
        label = batch["label"]
        if not self.training:
            return {"loss": F.cross_entropy(see.student[1].float(), label, reduction="none")}
        if self.mix is not None:
            see.image, share, partner = self.mix(see.image, batch["key"])
        draw_paths(self.paths, batch["key"])
        logits, smoothing = see.student[1].float(), self.settings.stage3.label_smoothing
        loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        if self.mix is not None:  # cross-entropy is linear in the target: this is that with the mixed one
            other = F.cross_entropy(logits, label[partner], reduction="none", label_smoothing=smoothing)
            loss = share * loss + (1 - share) * other
        return {"loss": loss}


def set_drop_path(vit: ViT, rate: float) -> dict[int, DropPath]:
    """Drop path rising linearly over depth to `rate`, as timm builds it; the active ones, numbered two a block."""
    paths = {}
    for i, drop in enumerate(torch.linspace(0, rate, len(vit.blocks)).tolist()):
        for which, name in enumerate(("drop_path1", "drop_path2")):
            setattr(vit.blocks[i], name, DropPath(drop) if drop > 0 else nn.Identity())
            if drop > 0:
                paths[2 * i + which] = getattr(vit.blocks[i], name)
    return paths
