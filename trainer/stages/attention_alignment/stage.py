"""Stage 1, attention alignment: each linear attention learns its frozen softmax counterpart's output.

ViT-AdaLA, arXiv 2603.16063. The teacher runs once; at each block the student's attention reads the very input that the
teacher's attention read, so blocks are independent, and errors do not add up over depth.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Loader
from models import attention_entropy, linear_blocks
from trainer.engine.engine import DeepSpeedEngine
from trainer.output import charts
from trainer.ranks.world import dist
from trainer.stages.base import Batch, ForwardOutputs, Stage
from trainer.stages.blockwise import FREE_RUNNING, TEACHER_FORCED, errors, forced_taps, mean_of, named, teacher_forced

LOOKED_AT = 8  # images whose attention's entropy is measured, from all over data.val
ENTROPY = "teacher_entropy"  # name of a metric


class AttentionAlignment(Stage):
    """Mean over linear blocks of MSE(student attention output, teacher attention output); only Q, K, V are trained.

    Evaluations tell the error of each block, and the one that it has when the student runs by itself (not where the
    attention is compiled); and the entropy of the teacher's attention, see `models.attention_entropy`.
    """

    name = "attention alignment"
    trainable = "qkv"
    last: dict[str, float] | None = None  # what the last evaluation told

    def prepare(self) -> None:
        """Names what is read of the teacher."""
        self.blocks = linear_blocks(self.student)
        self.point = {"output": "mha", "heads": "heads"}[self.settings.stage1.match]
        self.teacher_taps = forced_taps(self.blocks, self.point)
        if self.settings.train.compile:
            for i in self.blocks:
                self.student.blocks[i].attn.compile()
        else:
            self.student_taps = tuple(f"blocks.{i}.{self.point}" for i in self.blocks)

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """{"loss": [B]}, in evaluation with the error of each block."""
        found = teacher_forced(self, outputs, self.blocks, self.point)
        return {"loss": mean_of(found)} | ({} if self.training else named(TEACHER_FORCED, found))

    def metrics(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """With the error of each block where the student runs by itself."""
        values = super().metrics(batch, outputs)
        if self.student_taps:
            values |= named(FREE_RUNNING, errors(outputs.of_student, outputs.teacher, self.blocks, self.point))
        return values

    def evaluate(self, engine: DeepSpeedEngine, batches: Iterable[Batch]) -> dict[str, float]:
        """With the entropy of the teacher's attention in each block, over a few images."""
        sums = torch.zeros(1 + len(self.teacher.blocks), dtype=torch.float64, device=engine.device)
        self.last = super().evaluate(engine, self.looked_at(batches, sums))
        dist.all_reduce(sums)
        nats = (sums[1:] / sums[0]).tolist()
        self.last |= {f"{ENTROPY}.blocks.{i}": nats[i] for i in range(len(nats))}
        return dict(self.last)

    def looked_at(self, batches: Iterable[Batch], sums: Tensor) -> Iterator[Batch]:
        """The same batches; on the way the entropies of some images are added to `sums`: [images, block 0, ...]."""
        chosen = np.linspace(0, self.infos["val"].num_samples - 1, LOOKED_AT).round().astype(int)
        for batch in batches:
            among = torch.isin(batch["index"], torch.from_numpy(chosen).to(batch["index"])) & batch["valid"]
            which = among.nonzero().flatten().tolist()
            calls = len(which)
            if self.settings.teacher.shard:  # all ranks call it equally often
                most = torch.tensor(calls, device=sums.device)
                dist.all_reduce(most, dist.ReduceOp.MAX)
                calls = int(most)
            for call in range(calls):
                at = which[call] if call < len(which) else 0
                with attention_entropy(self.teacher) as found:
                    self.teacher(batch["image"][at : at + 1])
                if call < len(which):
                    sums += torch.cat([torch.ones(1), *(x.cpu() for x in found.values())]).to(sums)
            yield batch

    def draw(self, engine: DeepSpeedEngine, loader: Loader | None, folder: Path) -> None:
        """`errors.png`: the error of each block, teacher-forced beside free-running, over the entropy."""
        if loader is None:
            return
        if self.last is None:  # evaluated by the process before this one
            self.evaluate(engine, loader.epoch())
        if dist.get_rank() == 0:
            forced, free, nats = (charts.by_block(self.last, name) for name in (TEACHER_FORCED, FREE_RUNNING, ENTROPY))
            found = {"teacher-forced": forced, "free-running": free} if free else {"teacher-forced": forced}
            both = partial(charts.block_errors, found=found), partial(charts.entropy, found=nats)
            charts.save(folder / "errors.png", charts.figure(*both, width=charts.width_of(len(nats))))
