"""The error of each linear block's attention against its softmax counterpart, in two ways.

Teacher-forced: the student's attention reads the very input that the teacher's read, so blocks are independent.
Free-running: the student runs by itself, and errors add up over depth. An error is the mean squared one, [B].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import backbone_of, linear_blocks, note_image_size, rotary_embeddings, taps
from trainer.stages.base import ForwardOutputs, Stage

TEACHER_FORCED, FREE_RUNNING = "error_teacher_forced", "error_free_running"  # names of metrics
POINT = "mha"  # where attentions are compared, unless a stage says otherwise


def forced_taps(blocks: Sequence[int], point: str) -> tuple[str, ...]:
    """What `teacher_forced` reads of the teacher."""
    return tuple(f"blocks.{i}.{at}" for i in blocks for at in ("attn_in", point))


def teacher_forced(stage: Stage, outputs: ForwardOutputs, blocks: Sequence[int], point: str) -> dict[str, Tensor]:
    """{"blocks.0": error [B], ...}; the stage's `teacher_taps` hold `forced_taps`.

    Args:
        point: where the two are compared: `mha` after the output projection, `heads` before it.
    """
    size, student = outputs.image.shape[-2:], backbone_of(stage.student)
    note_image_size(student, size)
    ropes, read_of_teacher = rotary_embeddings(stage.teacher, size), outputs.teacher
    saves_memory = stage.training and stage.settings.train.grad_checkpointing
    with taps(student, [f"blocks.{i}.{point}" for i in blocks]) as read:
        for i in blocks:
            attend(student.blocks[i].attn, read_of_teacher[f"blocks.{i}.attn_in"], ropes[i], saves_memory)
    return errors(read, read_of_teacher, blocks, point)


def kept_on(stage: Stage, outputs: ForwardOutputs, losses: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """`losses`, with stage 1's added by `weight`; the stage's `teacher_taps` hold `forced_taps` unless that is 0."""
    if weight == 0:
        return losses
    attention = mean_of(teacher_forced(stage, outputs, linear_blocks(backbone_of(stage.student)), POINT))
    return losses | {"loss": losses["loss"] + weight * attention, "attention": attention}


def attend(attn: nn.Module, tokens: Tensor, rope: Tensor | None, recompute: bool) -> Tensor:
    """`attn(tokens)`, recomputed in backward where memory is to be saved."""
    return checkpoint(attn, tokens, rope=rope, use_reentrant=False) if recompute else attn(tokens, rope=rope)


def errors(
    student: dict[str, Tensor], teacher: dict[str, Tensor], blocks: Sequence[int], point: str
) -> dict[str, Tensor]:
    """{"blocks.0": error [B], ...} of what was read of both at `point`."""
    pairs = {f"blocks.{i}": f"blocks.{i}.{point}" for i in blocks}
    return {
        block: F.mse_loss(student[name].float(), teacher[name].float(), reduction="none").mean((1, 2))
        for block, name in pairs.items()
    }


def mean_of(found: dict[str, Tensor]) -> Tensor:
    """The mean over blocks, [B]."""
    return torch.stack(list(found.values())).mean(0)


def named(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """As metrics: {"error_free_running.blocks.0": [B], ...}."""
    return {f"{name}.{block}": error for block, error in found.items()}
