"""What the stages share: a student beside a frozen teacher, how it is judged, what it hands on."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from torch.nn import functional as F

from data import Loader
from models import LinearAttention, ViT, taps
from trainer.config import Settings
from trainer.engine.engine import DeepSpeedEngine, set_working_copy
from trainer.engine.shards import WEIGHT, Shards

Batch = dict[str, Tensor]


class Pass:
    """One batch of images through student and teacher, each run at most once and only when asked for."""

    def __init__(self, stage: "Stage", image: Tensor) -> None:
        self.stage, self.image = stage, image

    @functools.cached_property
    def student(self) -> tuple[Tensor, Tensor]:
        """Tokens after the last norm [B, N, D], and the head's output [B, C]."""
        return self.stage.student(self.image)

    @functools.cached_property
    def teacher(self) -> dict[str, Tensor]:
        """What the stage reads of the teacher: `norm`, the tokens [B, N, D]; `logits` [B, C]; its `teacher_taps`."""
        with torch.no_grad(), taps(self.stage.teacher, ["norm", *self.stage.teacher_taps]) as read:
            read["logits"] = self.stage.teacher(self.image)
        return read


class Stage(nn.Module):
    """A student in training. `forward(batch)` gives mean losses in training, values a sample in evaluation.

    Subclasses give `losses` and `trainable`, and may override `prepare` (before the optimizer exists).
    """

    name: str
    trainable: str  # default of student.trainable
    teacher_taps: tuple[str, ...] = ()
    teacher: ViT | None

    def __init__(self, settings: Settings, student: ViT, teacher: ViT | None) -> None:
        """Selects what is trained. `teacher` None: there is none to compare with (stage 3 from scratch)."""
        super().__init__()
        self.settings = settings
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
        # The engine rounds frozen weights to its working precision: what is exported are these.
        self.frozen = {
            name: value.detach().clone()
            for name, value in self.student.state_dict(keep_vars=True).items()
            if not value.requires_grad
        }

    def wrap(self, student: ViT) -> nn.Module:
        """The module that is trained: the student itself, called for what `Pass.student` gives, or one around it."""
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

    def losses(self, batch: Batch, see: Pass) -> dict[str, Tensor]:
        """The loss and its parts, a value a sample: {"loss": [B], ...}."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Training: {"loss": scalar, **parts}. Evaluation: the same a sample [B], and what the student is judged by."""
        see = Pass(self, batch["image"])
        losses = self.losses(batch, see)
        if self.training:
            return {key: value.mean() for key, value in losses.items()}
        return losses | self.judge(batch, see)

    def judge(self, batch: Batch, see: Pass) -> dict[str, Tensor]:
        """`top1`, `top5`, `teacher_top1` (percent) and `feature_cosine`, a value a sample [B], where they apply."""
        values = {}
        tokens, logits = see.student
        if self.teacher is not None:
            values["feature_cosine"] = F.cosine_similarity(tokens.float(), see.teacher["norm"].float(), dim=-1).mean(-1)
        if "label" in batch and self.student.num_classes > 1:
            hits = logits.topk(min(5, logits.shape[-1])).indices == batch["label"][:, None]
            values["top1"], values["top5"] = hits[:, 0] * 100.0, hits.any(-1) * 100.0
            if self.teacher is not None and self.teacher.num_classes == self.student.num_classes:
                values["teacher_top1"] = (see.teacher["logits"].argmax(-1) == batch["label"]) * 100.0
        return values

    def evaluate(self, engine: DeepSpeedEngine, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over all images of an epoch of an evaluation loader, each counted once over all ranks.

        What `batches` raises, on all ranks together, leaves the engine ready to go on.
        """
        sums: dict[str, Tensor] = {}
        with self.judging(engine):
            for batch in batches:
                out = engine(batch) | {"images": torch.ones_like(batch["valid"], dtype=torch.float64)}
                for key, value in out.items():
                    sums[key] = sums.get(key, 0) + (value.double() * batch["valid"]).sum()
        total = torch.stack(list(sums.values()))
        dist.all_reduce(total)
        values = dict(zip(sums, total.tolist(), strict=True))
        images = values.pop("images")
        return {key: value / images for key, value in values.items()}

    def score(self, values: dict[str, float]) -> float:
        """What the best checkpoint is chosen by, higher is better: of what `evaluate` gave."""
        return -values["loss"]

    def averages(self, engine: DeepSpeedEngine) -> bool:
        """Whether a moving average of the weights is judged and exported; there is none before the first step."""
        kept = self.settings.stage == "3" and self.settings.stage3.ema is not None
        return kept and engine.global_steps > engine.skipped_steps

    @contextlib.contextmanager
    def judging(self, engine: DeepSpeedEngine) -> Iterator[None]:
        """Evaluation mode, without gradients, with the moving average where one is kept; then training mode again."""
        engine.eval()
        try:
            with torch.no_grad(), self.averaged_weights(engine):
                yield
        finally:
            engine.train()

    @contextlib.contextmanager
    def averaged_weights(self, engine: DeepSpeedEngine) -> Iterator[None]:
        """Within the context forward uses the moving average, where one is kept."""
        shards = Shards(engine)
        trained = shards.parameters.items() if self.averages(engine) else ()
        for name, parameter in trained:
            set_working_copy(parameter, shards.full(name, "ema"))
        try:
            yield
        finally:
            for name, parameter in trained:
                set_working_copy(parameter, shards.full(name))

    def draw(self, engine: DeepSpeedEngine, loader: Loader | None, folder: Path) -> None:
        """Pictures of what came out, into `folder`, from an evaluation loader where there is one; a collective."""

    def export(self, engine: DeepSpeedEngine) -> dict[str, Tensor]:
        """The student's state dict on the CPU: trained weights from fp32 masters (or averages), the rest as it came.

        A collective, call it on all ranks.
        """
        shards, key = Shards(engine), "ema" if self.averages(engine) else WEIGHT
        trained = {name.removeprefix("student."): shards.full(name, key).cpu() for name in shards.parameters}
        # Buffers that keep their precision are live, such as the running statistics of a head's batch norm.
        kept = {n: b for n, b in self.student.named_buffers() if n in self.frozen and b.dtype == self.frozen[n].dtype}
        return trained | self.frozen | kept


def tokens_and_logits(vit: ViT, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens after the last norm [B, N, D], and the head's output [B, C]."""
    tokens = vit.forward_features(image)
    return tokens, vit.forward_head(tokens)


def trainable_parameters(student: ViT, which: str) -> list[nn.Parameter]:
    """Parameters by name: `qkv` or `attention` of the linear blocks, `backbone` up to the last norm, `head`, `all`."""
    linear = [block.attn for block in student.blocks if isinstance(block.attn, LinearAttention)]
    if which == "qkv":
        return [p for attn in linear for p in attn.qkv_parameters()]
    if which == "attention":
        return [p for attn in linear for p in attn.parameters()]
    head = [p for part in (student.attn_pool, student.fc_norm, student.head) if part for p in part.parameters()]
    if which == "head":
        return head
    ids = {id(p) for p in head} if which == "backbone" else set()
    return [p for p in student.parameters() if id(p) not in ids]
