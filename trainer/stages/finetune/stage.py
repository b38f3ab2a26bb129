"""Stage 3, supervised fine-tuning for classification: head and backbone on labels, with timm's recipe."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

import data
import models
from models import ViT, backbone_of, linear_blocks
from trainer.config import Settings, UserError
from trainer.engine.profile import part
from trainer.stages.base import Batch, ForwardOutputs, Infos, Stage
from trainer.stages.blockwise import POINT, forced_taps, kept_on
from trainer.stages.classes import check_same_classes, num_classes
from trainer.stages.keyed import DropPath, Mixup, draw_paths


class Supervised(Stage):
    """What both tasks of stage 3 share: its parameter groups, its moving average, alignment that is kept on."""

    trainable = "all"
    previous = "2"
    other_classes = None  # the head is trained on these labels

    @classmethod
    def needs_teacher(cls, settings: Settings) -> bool:
        """With `stage3.attention_weight`."""
        return settings.stage3.attention_weight > 0

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """What `kept_on` reads in training."""
        wanted = self.training and self.settings.stage3.attention_weight > 0
        return forced_taps(linear_blocks(backbone_of(self.student)), POINT) if wanted else ()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """With `stage3.layer_decay` a factor on the learning rate per block, from the last one to the first."""
        decay = self.settings.stage3.layer_decay
        if decay is None:
            return super().parameter_groups()
        return self.by_part(param_groups_layer_decay(self.student, **self.decay_options(), layer_decay=decay))

    @property
    def ema_decay(self) -> float | None:
        """`stage3.ema`."""
        return self.settings.stage3.ema


class Finetune(Supervised):
    """Cross-entropy with label smoothing, mixup, cutmix and drop path, all keyed by sample.

    With `stage3.distill` also the logits of a model that was fine-tuned before, arXiv 1503.02531.
    """

    name = "supervised fine-tuning"
    scored = "top1"
    master: nn.Module | None

    @classmethod
    def check(cls, settings: Settings, infos: Infos, micro_batch_size: int) -> None:
        """Labels there must be, and an even micro-batch for mixing."""
        super().check(settings, infos, micro_batch_size)
        for split, info in infos.items():
            if not info.has_labels:
                raise UserError(f"data.{split} {info.path}: has no labels, which stage 3 learns from")
        if "val" in infos:
            check_same_classes(infos["train"], infos["val"], "data.val")
        if settings.stage3.mixup + settings.stage3.cutmix > 0 and micro_batch_size % 2:
            raise UserError(
                f"stage3.mixup, cutmix: mix pairs, but a micro-batch has {micro_batch_size} images; make it even"
            )

    @classmethod
    def head_classes(cls, settings: Settings, infos: Infos, student: nn.Module) -> int:
        """`stage3.num_classes`, else those of the training data; checks that all labels are among them."""
        train = infos["train"]
        head = settings.stage3.num_classes or num_classes(train)
        for split, info in infos.items():
            check_labels(split, info, head)
        return head

    def prepare(self) -> None:
        """A head of the right size, drop path, mixing, checkpointing and compilation; what is distilled.

        Raises:
            UserError, ValueError, OSError: `stage3.distill` cannot be loaded, or does not fit.
        """
        options = self.settings.stage3
        if self.num_classes != self.student.num_classes or options.reset_head:
            self.student.reset_classifier(self.num_classes)
        self.paths = set_drop_path(self.student, options.drop_path)
        self.save_memory_and_time(self.student)
        self.mix = Mixup(options.mixup, options.cutmix) if options.mixup > 0 or options.cutmix > 0 else None
        object.__setattr__(self, "master", None if options.distill is None else self.load_master(options.distill))

    def load_master(self, folder: str) -> nn.Module:
        """The model whose logits are learned, frozen. Raises UserError where its classes or images are others."""
        size, train = self.student.patch_embed.img_size, self.infos["train"]
        master, config = models.load(folder, size), models.read_config(folder)
        if getattr(master, "num_classes", None) != self.num_classes:
            what = f"has {getattr(master, 'num_classes', 'no')} classes, the student's head {self.num_classes}"
            raise UserError(f"stage3.distill {folder}: {what}; give an export of stage 3 on the same classes")
        if train.classes and config.get("classes", train.classes) != train.classes:
            raise UserError(f"stage3.distill {folder}: its classes are not those of data.train, or in another order")
        for key in ("mean", "std"):
            theirs, ours = config.get("input", {}).get(key), getattr(self.settings.data, key)
            ours = list(ours or self.student.pretrained_cfg[key])
            if theirs is not None and list(theirs) != ours:
                raise UserError(f"stage3.distill {folder}: its input.{key} is {theirs}, this run's is {ours}; "
                                "give an export that reads images as this run does")  # fmt: skip
        if self.settings.data.resolutions:
            models.take_any_size(master)
        return master.eval().requires_grad_(False)

    def beside(self) -> list[nn.Module]:
        """With what is distilled."""
        return [*super().beside(), *([] if self.master is None else [self.master])]

    def score(self, values: dict[str, float]) -> float:
        """Top-1."""
        return values["top1"]

    def export_config(self) -> dict[str, Any]:
        """The names of the classes, where they are known."""
        classes = self.infos["train"].classes
        return {"classes": classes} if classes and len(classes) == self.num_classes else {}

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """{"loss": [B]}."""
        label = batch["label"]
        if not self.training:
            return {"loss": F.cross_entropy(outputs.student[1].float(), label, reduction="none")}
        if self.mix is not None:
            outputs.image, share, partner = self.mix(outputs.image, batch["key"])
        draw_paths(self.paths, batch["key"])
        logits, smoothing = outputs.student[1].float(), self.settings.stage3.label_smoothing
        loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        if self.mix is not None:  # cross-entropy is linear in the target: this is that with the mixed one
            other = F.cross_entropy(logits, label[partner], reduction="none", label_smoothing=smoothing)
            loss = share * loss + (1 - share) * other
        values = {"loss": loss}
        if self.master is not None:
            with part("teacher"), torch.no_grad():
                target = self.master(outputs.image).float()
            weight, temperature = self.settings.stage3.distill_weight, self.settings.stage3.distill_temperature
            distillation = distilled(logits, target, temperature)
            values = {"loss": (1 - weight) * loss + weight * distillation}
            values |= {"cross_entropy": loss, "distillation": distillation}
        return kept_on(self, outputs, values, self.settings.stage3.attention_weight)


def distilled(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T), softmax(logits / T)): [B, C] twice -> [B]; arXiv 1503.02531, section 2."""
    pair = ((x / temperature).log_softmax(-1) for x in (logits, target))
    return temperature**2 * F.kl_div(*pair, reduction="none", log_target=True).sum(-1)


def set_drop_path(vit: ViT, rate: float) -> dict[int, DropPath]:
    """Drop path rising linearly over depth to `rate`, as timm builds it; the active ones, numbered two per block."""
    paths = {}
    for i, drop in enumerate(torch.linspace(0, rate, len(vit.blocks)).tolist()):
        for which, name in enumerate(("drop_path1", "drop_path2")):
            setattr(vit.blocks[i], name, DropPath(drop) if drop > 0 else nn.Identity())
            if drop > 0:
                paths[2 * i + which] = getattr(vit.blocks[i], name)
    return paths


def check_labels(split: str, info: data.Info, num_classes: int) -> None:
    """Raises UserError when a file has labels outside of the head's classes."""
    if info.has_labels and info.max_label >= num_classes:
        raise UserError(
            f"data.{split} {info.path}: has labels up to {info.max_label}, outside the head's {num_classes} classes"
        )
