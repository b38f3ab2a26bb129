"""Stage 1, attention alignment: each linear attention learns its frozen softmax counterpart's output.

ViT-AdaLA, arXiv 2603.16063. The teacher runs once; at each block the student's attention reads the very input that the
teacher's attention read, so blocks are independent, and errors do not add up over depth.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import linear_blocks, note_image_size, rotary_embeddings, taps
from trainer.stages.base import Batch, ForwardOutputs, Stage


class AttentionAlignment(Stage):
    """Mean over linear blocks of MSE(student attention output, teacher attention output); only Q, K, V are trained."""

    name = "attention alignment"
    trainable = "qkv"

    def prepare(self) -> None:
        """Names what is read of the teacher."""
        self.blocks = linear_blocks(self.student)
        self.point = {"output": "mha", "heads": "heads"}[self.settings.stage1.match]
        self.teacher_taps = tuple(f"blocks.{i}.{point}" for i in self.blocks for point in ("attn_in", self.point))
        self.student_taps = tuple(f"blocks.{i}.{self.point}" for i in self.blocks)
        if self.settings.train.compile:
            for i in self.blocks:
                self.student.blocks[i].attn.compile()

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """{"loss": [B]}."""
        note_image_size(self.student, outputs.image.shape[-2:])
        ropes = rotary_embeddings(self.teacher, outputs.image.shape[-2:])
        with taps(self.student, self.student_taps) as read:
            for i in self.blocks:
                self.attend(self.student.blocks[i].attn, outputs.teacher[f"blocks.{i}.attn_in"], ropes[i])
        errors = [
            F.mse_loss(read[name].float(), outputs.teacher[name].float(), reduction="none").mean((1, 2))
            for name in self.student_taps
        ]
        return {"loss": torch.stack(errors).mean(0)}

    def attend(self, attn: torch.nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
        """`attn(tokens)`, recomputed in backward where memory is to be saved."""
        if self.training and self.settings.train.grad_checkpointing:
            return checkpoint(attn, tokens, rope=rope, use_reentrant=False)
        return attn(tokens, rope=rope)
