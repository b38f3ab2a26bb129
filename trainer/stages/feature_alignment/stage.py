"""Stage 2, feature alignment: the whole student learns the final features of the frozen teacher.

ViT-AdaLA, arXiv 2603.16063: both run in the same process, the target is made on the fly.
"""

import functools
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from data import Loader, balanced, lots
from data.beton import open_checked
from models import linear_blocks
from trainer.config import UserError
from trainer.engine.engine import DeepSpeedEngine
from trainer.fields import count_of
from trainer.ranks.world import dist
from trainer.stages.base import Batch, ForwardOutputs, Stage
from trainer.stages.blockwise import FREE_RUNNING, POINT, errors, forced_taps, kept_on, named
from trainer.stages.pictures import Shown, draw_features

SHOWN = 8  # images in the picture
MEASURED = 8  # batches, over all ranks, whose targets give the standard deviations


def token_mean(error: Tensor, weights: Tensor | None) -> Tensor:
    """[B, N] or [B, N, D] -> [B], the mean over tokens with `weights` [N] (None: all alike) and over channels."""
    if weights is None:
        return error.mean(tuple(range(1, error.ndim)))
    return (error.flatten(2).mean(-1) if error.ndim > 2 else error) @ (weights / weights.sum())


def mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Mean squared error over tokens and channels: [B, N, D] twice -> {"loss": [B]}."""
    return {"loss": token_mean(F.mse_loss(student, teacher, reduction="none"), weights)}


def cosine_smooth_l1(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """0.9 (1 - cosine) + 0.1 smooth L1, means over tokens, as in AM-RADIO, arXiv 2312.06709, equation 3."""
    cosine = token_mean(1 - F.cosine_similarity(student, teacher, dim=-1), weights)
    smooth_l1 = token_mean(F.smooth_l1_loss(student, teacher, reduction="none"), weights)
    return {"loss": 0.9 * cosine + 0.1 * smooth_l1, "cosine": cosine, "smooth_l1": smooth_l1}


LOSSES = {"mse": mse, "cosine_smooth_l1": cosine_smooth_l1}


class FeatureAlignment(Stage):
    """The student's final tokens, prefix and patches, are pulled to the teacher's; all but the head is trained.

    By its settings also the outputs of blocks, and the attention of each block as in stage 1. Evaluations tell the
    error of each block's attention where the student runs by itself.
    """

    name = "feature alignment"
    trainable = "backbone"
    previous = "1"
    quick_probes = True
    keeping: list[Shown] | None = None  # while an evaluation goes on
    kept: list[Shown] | None = None  # of the last one, on this rank

    def prepare(self) -> None:
        """What is matched; checkpointing and compilation, block by block.

        Raises:
            UserError: `stage2.blocks` names a block that there is not.
        """
        options, depth = self.settings.stage2, len(self.student.blocks)
        blocks = options.blocks
        if isinstance(blocks, str):
            parts = min(count_of(blocks) + 1, depth)
            blocks = [depth * i // parts for i in range(1, parts)]
        if any(i >= depth for i in blocks):
            raise UserError(f"stage2.blocks {options.blocks}: the model has blocks 0 to {depth - 1}")
        self.linear = linear_blocks(self.student)
        self.between = tuple(f"blocks.{i}.rc2" for i in dict.fromkeys(blocks))
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}  # mean and deviation [D]; no buffers, which would be bf16
        self.save_memory_and_time(self.student, self.teacher)

    def notes(self) -> list[str]:
        """With the weights that have nothing to weigh."""
        options, said = self.settings.stage2, super().notes()
        if options.prefix_weight != 1 and not self.student.num_prefix_tokens:
            said.append(f"stage2.prefix_weight {options.prefix_weight:g}: changes nothing, there are no prefix tokens")
        if options.block_weight != 1 and not self.between:
            said.append(f"stage2.block_weight {options.block_weight:g}: changes nothing without stage2.blocks")
        return said

    @property
    def watched(self) -> tuple[str, ...]:
        """What an evaluation compares per block."""
        return () if self.training else tuple(f"blocks.{i}.{POINT}" for i in self.linear)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """The targets beside the final tokens."""
        forced = forced_taps(self.linear, POINT) if self.settings.stage2.attention_weight > 0 else ()
        return tuple(dict.fromkeys((*self.between, *forced, *self.watched)))

    @property
    def student_taps(self) -> tuple[str, ...]:
        """What is compared with them."""
        return (*self.between, *self.watched)

    def begin(self, engine: DeepSpeedEngine, loader: Loader, folder: Path, step: int) -> None:
        """With `stage2.standardise`: mean and deviation of the targets' channels, over the first batches.

        They are the run's: one that goes on reads them from its folder.
        """
        if not self.settings.stage2.standardise:
            return
        file = folder / "target_statistics.safetensors"
        if step == 0 or not file.is_file():
            found = self.measure_targets(loader)
            if dist.get_rank() == 0:
                save_file(found, part := file.with_suffix(".part"))
                os.replace(part, file)
        else:
            found = load_file(file, str(engine.device))
        names = ("norm", *self.between)
        self.scales = {name: (found[f"{name}.mean"], found[f"{name}.deviation"]) for name in names}
        dist.barrier()

    def measure_targets(self, loader: Loader) -> dict[str, Tensor]:
        """`NAME.mean` and `NAME.deviation`, [D] in fp32, over the tokens of the first batches; a collective."""
        sums: dict[str, Tensor] = {}
        batches = itertools.islice(loader.epoch(0, 0), MEASURED * loader.accumulate)
        for batch in batches:
            read = ForwardOutputs(self, batch["image"]).teacher
            for name in ("norm", *self.between):
                x = read[name].double().flatten(0, -2)
                new = torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
                sums[name] = sums.get(name, 0) + new
        loader.close()
        found = {}
        for name, total in sums.items():
            dist.all_reduce(total)
            count, mean, square = total[0], total[1] / total[0], total[2] / total[0]
            variance = (square - mean.square()) * count / (count - 1)
            # A channel that hardly moves does not count more than 100 times as much as the others do.
            deviation = variance.clamp_min(1e-4 * variance.mean()).sqrt()
            found |= {f"{name}.mean": mean.float(), f"{name}.deviation": deviation.float()}
        return found

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """{"loss": [B], **parts}."""
        options = self.settings.stage2
        values = self.pull("norm", outputs.student[0], outputs.teacher["norm"])
        if self.between:
            each = [self.pull(name, outputs.of_student[name], outputs.teacher[name])["loss"] for name in self.between]
            values["blocks"] = torch.stack(each).mean(0)
            values["loss"] = values["loss"] + options.block_weight * values["blocks"]
        return kept_on(self, outputs, values, options.attention_weight)

    def pull(self, name: str, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """`stage2.loss` between two tensors called `name`, [B, N, D]."""
        options, prefix, weights = self.settings.stage2, self.student.num_prefix_tokens, None
        student, teacher = student.float(), teacher.float()
        if name in self.scales:
            mean, deviation = self.scales[name]
            student, teacher = (student - mean) / deviation, (teacher - mean) / deviation
        if options.prefix_weight != 1 and prefix > 0:
            weights = student.new_ones(student.shape[1])
            weights[:prefix] = options.prefix_weight
        return LOSSES[options.loss](student, teacher, weights)

    def metrics(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """With the error of each block's attention where the student runs by itself."""
        values = super().metrics(batch, outputs)
        if self.watched:
            values |= named(FREE_RUNNING, errors(outputs.of_student, outputs.teacher, self.linear, POINT))
        if self.keeping is not None:
            self.keep(batch, outputs, values["feature_cosine"])
        return values

    def evaluate(self, engine: DeepSpeedEngine, batches: Iterable[Batch]) -> dict[str, float]:
        """On the way some images are kept for the picture, chosen to differ."""
        self.keeping = []
        try:
            values = super().evaluate(engine, batches)
            self.kept = self.keeping
        finally:
            self.keeping = None
        return values

    @functools.cached_property
    def to_show(self) -> Tensor:
        """Which images of data.val the picture has: of different classes; without labels from all over the file."""
        info = self.infos["val"]
        if info.has_labels:
            labels = open_checked(info.path)[1]["label"]
            chosen = balanced(labels, lots(len(labels), self.settings.train.seed))[:SHOWN]
        else:
            chosen = np.unique(np.linspace(0, info.num_samples - 1, SHOWN).round().astype(np.int64))
        return torch.from_numpy(np.sort(chosen))

    def keep(self, batch: Batch, outputs: ForwardOutputs, cosine: Tensor) -> None:
        """Keep those of a batch's images that the picture has."""
        among = torch.isin(batch["index"], self.to_show.to(batch["index"])) & batch["valid"]
        for i in among.nonzero()[:, 0].tolist():
            tokens = (outputs.teacher["norm"][i], outputs.student[0][i])
            grids = (
                x[self.student.num_prefix_tokens :].mT.unflatten(-1, self.student.patch_embed.grid_size) for x in tokens
            )
            predictions: list[tuple[int, float] | None] = []
            for logits in (outputs.teacher["logits"], outputs.student[1]):
                chance, which = logits[i].float().softmax(-1).max(-1) if self.student.num_classes > 1 else (None, None)
                predictions.append(None if chance is None else (which.item(), chance.item()))
            label = batch["label"][i].item() if "label" in batch else None
            tensors = (x.to("cpu", copy=True) for x in (batch["image"][i], *grids))
            self.keeping.append(Shown(batch["index"][i].item(), label, cosine[i].item(), *predictions, *tensors))

    def draw(self, engine: DeepSpeedEngine, loader: Loader | None, folder: Path) -> None:
        """`features.png`: the last tokens of images that differ, teacher beside student; cosine and predictions."""
        if loader is None:
            return
        if self.kept is None:  # evaluated by the process before this one
            self.evaluate(engine, loader.epoch())
        everyone: list[list[Shown]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self.kept)
        if dist.get_rank() == 0:
            shown = sorted((row for theirs in everyone for row in theirs), key=lambda row: row.index)
            images = [loader.pixels(row.image.to(engine.device)).cpu() for row in shown]
            labels = self.infos["val"].classes
            draw_features(folder / "features.png", shown, images, labels, None if self.other_classes else labels)
