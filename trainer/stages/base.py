"""What the stages share: a student beside a frozen teacher, how it is evaluated, what it exports."""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import data
from models import LinearAttention, ViT, backbone_of, taps
from trainer.config import Settings, UserError
from trainer.engine.engine import DeepSpeedEngine, set_working_copy
from trainer.engine.optim import scaled
from trainer.engine.profile import part
from trainer.engine.shards import WEIGHT, Shards
from trainer.output.paths import stage_path, write_aside
from trainer.ranks.world import dist
from trainer.stages.classes import num_classes

BY_CLASS = ("images", "top1", "teacher_top1")  # what an evaluation sums up class by class
Batch = dict[str, Tensor]
Infos = Mapping[str, data.Info]  # what data.train and data.val hold, by "train" and "val"


class ForwardOutputs:
    """One batch of images through student and teacher; each runs at most once, and only when asked for."""

    def __init__(self, stage: "Stage", image: Tensor) -> None:
        self.stage, self.image = stage, image
        self.of_student: dict[str, Tensor] = {}

    @functools.cached_property
    def student(self) -> tuple[Tensor, Tensor]:
        """Tokens after the last norm [B, N, D], and the head's output [B, C]; `of_student` has the `student_taps`."""
        with taps(self.stage.student, self.stage.student_taps) as self.of_student:
            return self.stage.student(self.image)

    @functools.cached_property
    def teacher(self) -> dict[str, Tensor]:
        """What the stage reads of the teacher: `norm`, the tokens [B, N, D]; `logits` [B, C]; its `teacher_taps`."""
        with part("teacher"), torch.no_grad(), taps(self.stage.teacher, ["norm", *self.stage.teacher_taps]) as read:
            read["logits"] = self.stage.teacher(self.image)
        return read


class Stage(nn.Module):
    """A student in training. `forward(batch)` gives mean losses in training, values per sample in evaluation.

    A subclass gives `losses`. What else is its own it overrides: the class attributes, its checks, `prepare` (before
    the optimizer exists), its parameter groups, its average, its metrics, its pictures, its part of the export.
    """

    name: str
    trainable: str  # the default of student.trainable
    previous: str | None = None  # the stage whose export it starts from
    compares = True  # the student with the teacher, where there is a pretrained one
    quick_probes = False  # whether `probe.every` applies
    scored = "loss"  # what `score` looks at
    teacher_taps: tuple[str, ...] = ()
    student_taps: tuple[str, ...] = ()
    teacher: ViT | None

    def __init__(self, settings: Settings, student: ViT, teacher: ViT | None, num_classes: int, infos: Infos) -> None:
        """Selects what is trained.

        Args:
            teacher: None where there is none to compare with.
            num_classes: of the head that the stage ends with.
        """
        super().__init__()
        self.settings, self.num_classes, self.infos = settings, num_classes, infos
        self.student = self.wrap(student)
        # Beside the module tree: no gradient, no checkpoint, no ZeRO partition, no train().
        object.__setattr__(self, "teacher", teacher)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.prepare()
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        for parameter in self.selected(settings.student.trainable or self.trainable):
            parameter.requires_grad_(True)
        self.frozen: dict[str, Tensor] = {}

    def keep_frozen(self) -> None:
        """Before the engine, which rounds frozen weights to its working precision: the export holds what they are now.

        For the rank that writes the export alone: in host memory they are as large as the model.
        """
        self.frozen = {
            name: value.detach().clone()
            for name, value in self.student.state_dict(keep_vars=True).items()
            if not value.requires_grad
        }

    def beside(self) -> list[nn.Module]:
        """The frozen models that stand beside the student, on its device and in its precision."""
        return [] if self.teacher is None else [self.teacher]

    # --- Before training: checks, and how images are read --------------------------------------------------------

    @classmethod
    def check(cls, settings: Settings, infos: Infos, micro_batch_size: int) -> None:
        """Raises UserError, in one line, when data and settings do not fit the stage."""
        size, found = settings.train.batch_size, infos["train"]
        if found.num_samples < size:
            raise UserError(f"train.batch_size {size}: {found.path} has only {found.num_samples} images")

    @classmethod
    def needs_teacher(cls, settings: Settings) -> bool:
        """Whether there must be a pretrained teacher, to align with."""
        return True

    @classmethod
    def head_classes(cls, settings: Settings, infos: Infos, student: nn.Module) -> int:
        """Classes of the head that the stage ends with; here the student's own."""
        return student.num_classes

    @classmethod
    def train_loader(cls, settings: Settings, path: Path, **how: Any) -> data.Loader:
        """Batches to train on; `how` are the keywords that do not depend on the stage."""
        given = settings.data
        return data.train_loader(path, scale=tuple(given.scale), ratio=tuple(given.ratio), hflip=given.hflip, **how)

    @classmethod
    def eval_loader(cls, settings: Settings, path: Path, **how: Any) -> data.Loader:
        """Batches to evaluate on."""
        return data.eval_loader(path, crop_pct=settings.data.crop_pct, **how)

    def notes(self) -> list[str]:
        """What the user should know before the run, a line each."""
        train, said = self.settings.train, [self.other_classes] if self.other_classes else []
        for name, parameters in self.parts().items():
            factor = getattr(train, name)
            if factor != 1 and not any(p.requires_grad for p in parameters):
                said.append(f"train.{name} {factor:g}: changes nothing, no such parameter trains")
        return said

    @functools.cached_property
    def other_classes(self) -> str | None:
        """Why the labels of the validation images say nothing about the student's head, or None where they do."""
        info, head = self.infos.get("val"), self.num_classes
        if info is None or not info.has_labels or head <= 1:
            return None
        classes = num_classes(info)
        if classes == head or (classes < head and not info.classes):  # without names some may just not occur
            return None
        return f"data.val {info.path} has {classes} classes, the teacher's head {head}: top1 and top5 are left out"

    # --- The student ---------------------------------------------------------------------------------------------

    def wrap(self, student: ViT) -> nn.Module:
        """The module that is trained: the student itself, which gives `ForwardOutputs.student`, or one around it."""
        # ZeRO 3 gathers the model's own parameters (position embedding, prefix tokens) when the model is called as a
        # module, and again for backward through what the call returns: so the call itself must return the tokens.
        student.forward = functools.partial(tokens_and_logits, student)
        return student

    def selected(self, which: str) -> list[nn.Parameter]:
        """The parameters that `student.trainable` names."""
        return trainable_parameters(self.student, which)

    def prepare(self) -> None:
        """Change the student before its parameters are selected."""

    def save_memory_and_time(self, *vits: ViT) -> None:
        """Gradient checkpointing in the student, compilation of the blocks of `vits`: where the settings ask for it."""
        self.student.set_grad_checkpointing(self.settings.train.grad_checkpointing)
        if self.settings.train.compile:
            for block in (block for vit in vits for block in vit.blocks):
                block.compile()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Of what is trained: no weight decay on biases, norms and embeddings, as timm groups them.

        A group's `lr_scale` is a factor on the learning rate.
        """
        return self.by_part(param_groups_weight_decay(self.student, **self.decay_options()))

    def by_part(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups, at the learning rates that `train.lr_new` and `train.lr_attention` ask for."""
        for name, parameters in self.parts().items():
            factor = getattr(self.settings.train, name)
            groups = groups if factor == 1 else scaled(groups, parameters, factor)
        return groups

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that a factor of `train` on the learning rate is for, by its name."""
        attentions = [block.attn for block in backbone_of(self.student).blocks]
        new = [p for attn in attentions if isinstance(attn, LinearAttention) for p in attn.new_parameters()]
        ids = {id(p) for p in new}
        old = [p for attn in attentions for p in attn.parameters() if id(p) not in ids]
        return {"lr_new": new, "lr_attention": old}

    def decay_options(self) -> dict[str, Any]:
        """The keywords that timm's functions for parameter groups share."""
        return {
            "weight_decay": self.settings.train.weight_decay,
            "no_weight_decay_list": self.student.no_weight_decay(),
        }

    @property
    def ema_decay(self) -> float | None:
        """Decay of the weights' moving average, which is then evaluated and exported; None: there is none."""
        return None

    def begin(self, engine: DeepSpeedEngine, loader: data.Loader, folder: Path, step: int) -> None:
        """What needs images before the first step; `folder` keeps it for when the run goes on at `step`; a collective.

        Raises:
            UserError: the folder cannot be read or written.
        """

    # --- Training and evaluation ---------------------------------------------------------------------------------

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """The loss and its parts, a value per sample: {"loss": [B], ...}."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Training: {"loss": scalar, **parts}. Evaluation: the same per sample [B], and `metrics`."""
        outputs = ForwardOutputs(self, batch["image"])
        losses = self.losses(batch, outputs)
        if self.training:
            return {key: value.mean() for key, value in losses.items()}
        return losses | self.metrics(batch, outputs)

    def metrics(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """`top1`, `top5`, `teacher_top1` (percent) and `feature_cosine`, a value per sample [B], where they apply."""
        values = {}
        tokens, logits = outputs.student
        if self.teacher is not None:
            target = outputs.teacher["norm"].float()
            values["feature_cosine"] = F.cosine_similarity(tokens.float(), target, dim=-1).mean(-1)
        if "label" in batch and self.student.num_classes > 1 and self.other_classes is None:
            hits = logits.topk(min(5, logits.shape[-1])).indices == batch["label"][:, None]
            values["top1"], values["top5"] = hits[:, 0] * 100.0, hits.any(-1) * 100.0
            if self.teacher is not None and self.teacher.num_classes == self.student.num_classes:
                values["teacher_top1"] = (outputs.teacher["logits"].argmax(-1) == batch["label"]) * 100.0
        return values

    def evaluate(self, engine: DeepSpeedEngine, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over all images of an epoch of an evaluation loader, each counted once over all ranks; and `images`.

        Where there is a `top1`, `classes.json` in the stage's folder has that of each class. What `batches` raises, on
        all ranks together, leaves the engine ready to go on.
        """
        sums: dict[str, Tensor] = {}
        by_class = torch.zeros(len(BY_CLASS), self.num_classes, dtype=torch.float64, device=engine.device)
        with self.evaluation_mode(engine):
            for batch in batches:
                out = engine(batch) | {"images": torch.ones_like(batch["valid"], dtype=torch.float64)}
                for key, value in out.items():
                    sums[key] = sums.get(key, 0) + (value.double() * batch["valid"]).sum()
                if "top1" in out:
                    rows = torch.stack([out.get(key, out["images"] * 0).double() for key in BY_CLASS]) * batch["valid"]
                    by_class.index_add_(1, batch["label"], rows)
        total = torch.cat([torch.stack(list(sums.values())), by_class.flatten()])
        dist.all_reduce(total)
        values = dict(zip(sums, total.tolist(), strict=False))
        if "top1" in values and dist.get_rank() == 0:
            self.record_classes(engine, total[len(sums) :].view_as(by_class), [k for k in BY_CLASS if k in values])
        images = values.pop("images")
        return {key: value / images for key, value in values.items()} | {"images": round(images)}

    def record_classes(self, engine: DeepSpeedEngine, by_class: Tensor, keys: list[str]) -> None:
        """`classes.json`: of each class that occurs, those of `BY_CLASS` that `keys` names; accuracies in percent."""
        names, classes = self.infos["val"].classes, {}
        for i, column in enumerate(by_class.mT.tolist()):
            values = dict(zip(BY_CLASS, column, strict=True))
            if images := values["images"]:
                name = names[i] if names and i < len(names) else str(i)
                classes[name] = {k: round(images) if k == "images" else values[k] / images for k in keys}
        text = json.dumps({"step": engine.global_steps, "classes": classes}, indent=1) + "\n"
        write_aside(stage_path(self.settings.run, self.settings.stage) / "classes.json", text)

    def score(self, values: dict[str, float]) -> float:
        """What the best checkpoint is chosen by, higher is better: of what `evaluate` gave."""
        return -values["loss"]

    @contextlib.contextmanager
    def evaluation_mode(self, engine: DeepSpeedEngine) -> Iterator[None]:
        """Evaluation without gradients, with the moving average where one is kept; then training mode again.

        Compiled blocks run as they were, so that all of their modules can be read.
        """
        engine.eval()
        try:
            with torch.no_grad(), self.averaged_weights(engine), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            engine.train()

    @contextlib.contextmanager
    def averaged_weights(self, engine: DeepSpeedEngine) -> Iterator[None]:
        """Within the context forward uses the moving average, where one is kept."""
        shards = Shards(engine)
        trained = shards.parameters.items() if self.has_average(engine) else ()
        for name, parameter in trained:
            set_working_copy(parameter, shards.full(name, "ema"))
        try:
            yield
        finally:
            for name, parameter in trained:
                set_working_copy(parameter, shards.full(name))

    def has_average(self, engine: DeepSpeedEngine) -> bool:
        """Whether there is a moving average; there is none before the first step."""
        return self.ema_decay is not None and engine.global_steps > engine.skipped_steps

    # --- At the end ----------------------------------------------------------------------------------------------

    def draw(self, engine: DeepSpeedEngine, loader: data.Loader | None, folder: Path) -> None:
        """Pictures of what came out, into `folder`, from an evaluation loader where there is one; a collective."""

    def export(self, engine: DeepSpeedEngine) -> dict[str, Tensor]:
        """The student's state dict on the CPU: trained weights from fp32 masters (or averages), the rest as it came.

        A collective, call it on all ranks. It is rank 0's to write, and empty on the others, whose host memory it would
        fill.
        """
        shards, key = Shards(engine), "ema" if self.has_average(engine) else WEIGHT
        trained = {}
        for name in shards.parameters:
            whole = shards.full(name, key)
            if dist.get_rank() == 0:
                trained[name.removeprefix("student.")] = whole.cpu()
        if dist.get_rank() != 0:
            return {}
        # Buffers that keep their precision are live, such as the running statistics of a head's batch norm.
        kept = {n: b for n, b in self.student.named_buffers() if n in self.frozen and b.dtype == self.frozen[n].dtype}
        return trained | self.frozen | kept

    def export_config(self) -> dict[str, Any]:
        """What the stage adds to the export's config.json."""
        return {}


def tokens_and_logits(vit: ViT, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens after the last norm [B, N, D], and the head's output [B, C]."""
    tokens = vit.forward_features(image)
    return tokens, vit.forward_head(tokens)


def trainable_parameters(student: ViT, which: str) -> list[nn.Parameter]:
    """Parameters by name: `qkv` (with the operator's own) or `attention` of the linear blocks, `head`, `all`, or
    `backbone`, which ends with the last norm.
    """
    linear = [block.attn for block in student.blocks if isinstance(block.attn, LinearAttention)]
    if which == "qkv":
        return [p for attn in linear for p in attn.alignment_parameters()]
    if which == "attention":
        return [p for attn in linear for p in attn.parameters()]
    head = [p for part in (student.attn_pool, student.fc_norm, student.head) if part for p in part.parameters()]
    if which == "head":
        return head
    ids = {id(p) for p in head} if which == "backbone" else set()
    return [p for p in student.parameters() if id(p) not in ids]
