"""Stage 1, attention alignment: each linear attention learns its frozen softmax counterpart's output.

ViT-AdaLA, arXiv 2603.16063. The teacher runs once; at each block the student's attention reads the very input that the
teacher's attention read, so blocks are independent, and errors do not add up over depth.
"""

from torch import Tensor

from models import linear_blocks
from trainer.stages.base import Batch, ForwardOutputs, Stage
from trainer.stages.blockwise import FREE_RUNNING, TEACHER_FORCED, errors, forced_taps, mean_of, named, teacher_forced


class AttentionAlignment(Stage):
    """Mean over linear blocks of MSE(student attention output, teacher attention output); only Q, K, V are trained.

    Evaluations tell the error of each block, and the one that it has when the student runs by itself (not where the
    attention is compiled).
    """

    name = "attention alignment"
    trainable = "qkv"

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
