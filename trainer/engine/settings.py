"""Settings of the training loop and its optimizer."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from trainer.fields import Count, CountOrZero, NonNegative, Positive, checked

Betas = checked(
    list[float], "two values, at least 0 and below 1", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v)
)
Steps = checked(str, "FROM-TO, the first and the last step", lambda v: _in_order(re.fullmatch(r"(\d+)-(\d+)", v)))


def _in_order(found: re.Match | None) -> bool:
    return found is not None and 1 <= int(found[1]) <= int(found[2])


@dataclass
class Train:
    """The training loop and its optimizer, AdamW."""

    free: ClassVar = frozenset(
        {"micro_batch_size", "max_skipped", "save_every", "keep", "log_every", "eval_first", "profile", "start_limit"}
    )

    epochs: Positive = 1.0
    """Passes over the training images."""
    steps: Count | None = None
    """Optimizer steps; wins over epochs."""
    batch_size: Count = 256
    """Images per optimizer step, over all ranks."""
    micro_batch_size: Count | None = None
    """Images per rank and forward pass, at most; by default no accumulation."""
    lr: Positive = 1e-3
    """Peak learning rate, between warm-up and the cosine to min_lr."""
    lr_new: Positive = 1.0
    """Factor on the learning rate of what the softmax model does not have: the operator's and additions' parameters."""
    lr_attention: Positive = 1.0
    """Factor on the learning rate of the attention's other parameters, in all blocks."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end."""
    warmup_steps: CountOrZero = 0
    """Steps in which the learning rate rises to lr."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay; none on biases, norms and embeddings."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay of its two moments."""
    clip_grad: NonNegative = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    bf16: bool = True
    """Weights and activations in bfloat16; master weights and optimizer state are fp32."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    seed: CountOrZero = 0
    """Seed of everything random."""
    save_every: Count = 1000
    """Steps between two checkpoints."""
    keep: Count = 2
    """Newest checkpoints that stay, beside the best one."""
    log_every: Count = 10
    """Steps between two lines of training metrics."""
    eval_first: bool = True
    """Evaluate before the first step."""
    eval_every: CountOrZero = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    max_skipped: Count = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    profile: Steps | None = None
    """Steps to profile, FROM-TO, such as 20-25: a trace in the run's folder, and a table of what takes how long."""
    start_limit: Positive = 300.0
    """Seconds within which all ranks must have started; more where many nodes read their programs from one disk."""
