"""Stage 2, feature alignment: the whole student learns the final features of the frozen teacher.

ViT-AdaLA, arXiv 2603.16063: both run in the same process, the target is made on the fly.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from data import Loader
from models import taps
from trainer.engine.engine import DeepSpeedEngine
from trainer.ranks.world import dist
from trainer.stages.base import Batch, ForwardOutputs, Stage
from trainer.stages.pictures import draw_features

SHOWN = 8  # images in the picture, at most


def mse(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Mean squared error over tokens and channels: [B, N, D] twice -> {"loss": [B]}."""
    return {"loss": F.mse_loss(student, teacher, reduction="none").mean((1, 2))}


def cosine_smooth_l1(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """0.9 (1 - cosine) + 0.1 smooth L1, means over tokens, as in AM-RADIO, arXiv 2312.06709, equation 3."""
    cosine = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean(1)
    smooth_l1 = F.smooth_l1_loss(student, teacher, reduction="none").mean((1, 2))
    return {"loss": 0.9 * cosine + 0.1 * smooth_l1, "cosine": cosine, "smooth_l1": smooth_l1}


LOSSES = {"mse": mse, "cosine_smooth_l1": cosine_smooth_l1}


class FeatureAlignment(Stage):
    """The student's final tokens, prefix and patches, are pulled to the teacher's; all but the head is trained."""

    name = "feature alignment"
    trainable = "backbone"
    previous = "1"
    quick_probes = True

    def prepare(self) -> None:
        """Checkpointing and compilation, block by block."""
        self.save_memory_and_time(self.student, self.teacher)

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """{"loss": [B], **parts}."""
        return LOSSES[self.settings.stage2.loss](outputs.student[0].float(), outputs.teacher["norm"].float())

    def draw(self, engine: DeepSpeedEngine, loader: Loader | None, folder: Path) -> None:
        """`features.png`: the last tokens of the first images, teacher beside student."""
        if loader is None:
            return
        rows: list[tuple[Tensor, ...]] = []
        grid = self.student.patch_embed.grid_size
        engine.eval()
        # Through the engine, whose call gathers what ZeRO 3 has spread over the ranks.
        with torch.no_grad(), taps(self.student, ["norm"]) as student, taps(self.teacher, ["norm"]) as teacher:
            for batch in loader.epoch():
                engine(batch)
                patches = (read["norm"][:, self.student.num_prefix_tokens :] for read in (teacher, student))
                rows.append((batch["image"], *(x.mT.unflatten(-1, grid) for x in patches)))
                if sum(len(row[0]) for row in rows) >= SHOWN:
                    break
        loader.close()
        engine.train()
        if dist.get_rank() == 0:
            image, of_teacher, of_student = (torch.cat(x)[:SHOWN] for x in zip(*rows, strict=True))
            draw_features(folder / "features.png", loader.pixels(image), of_teacher, of_student)
