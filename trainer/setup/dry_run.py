"""What a stage would run, without training: parameters, groups, FLOPs, memory, steps, parent."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Settings
from trainer.engine.engine import DeepSpeedZeroConfig, accumulation, offloads, sums_in_fp32
from trainer.ranks.world import World
from trainer.setup.build import Job
from trainer.setup.cache import notes
from trainer.setup.flops import shapes_of
from trainer.setup.resolution import Size
from trainer.stages.base import Stage

GIB = 2**30


def describe(settings: Settings, job: Job, config: dict, me: World) -> str:
    """The text of `--dry_run`."""
    stage, zero = job.stage, config["zero_optimization"]["stage"]
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in stage.parameters() if not p.requires_grad)
    teacher = sum(p.numel() for model in stage.beside() for p in model.parameters())
    accumulate = accumulation(settings, me.size)
    micro = settings.train.batch_size // me.size // accumulate
    dtype = torch.bfloat16 if settings.train.bf16 else torch.float32
    flops, activations = measure(stage, job.export["input"]["image_size"], micro, dtype)
    bf16, offload = settings.train.bf16, offloads(config)
    held = teacher / (me.size if settings.teacher.shard else 1)
    states = model_state_bytes(trained, frozen, held, zero, me.size, bf16, offload)
    known = DeepSpeedZeroConfig(**config["zero_optimization"])
    memory = memory_bytes(trained, frozen, held, known, me.size, bf16, offload, activations, accumulate)
    groups = [group for group in stage.parameter_groups() if group["params"]]
    infos = [info for info in (job.train, job.val) if info is not None]
    unverified = [str(info.path) for info in infos if info.digest is None and info.fields]  # those that are written
    lines = [
        f"stage {settings.stage}: {stage.name}",
        f"starts from: {job.start}",
        f"settings of: {', but '.join((settings.source, *settings.changed))}",
        job.images,
        f"trainable parameters: {trained:,}",
        f"frozen parameters: {frozen:,} of the student, {teacher:,} of the teacher",
        f"parameter groups: {len(groups)}",
        *(
            f"  {sum(p.numel() for p in group['params']):,} parameters, weight decay {group['weight_decay']:g}, "
            f"learning rate {settings.train.lr * group.get('lr_scale', 1.0):g}"
            for group in groups
        ),
        f"images: {job.train.num_samples:,} to train on, {job.val.num_samples if job.val else 0:,} to evaluate on",
        *notes(settings),
        *(f"note: {note}" for note in job.notes),
        *(f"written without checksums, damage to its images goes unnoticed: {path}" for path in unverified),
        f"steps: {job.steps:,} of {settings.train.batch_size} images "
        f"({me.size} ranks x {accumulate} x {micro}), {job.steps_per_epoch:,} per epoch",
        f"FLOPs per step: {flops * settings.train.batch_size:.3e}",
        f"memory per rank: {memory / GIB:.2f} GiB at most, an estimate; of it weights, gradients and optimizer "
        f"{states / GIB:.2f} (ZeRO {zero}), a micro-batch {activations / GIB:.2f}, the rest DeepSpeed's buffers",
    ]
    return "\n".join(lines)


def measure(stage: Stage, image_size: Size, micro: int, dtype: torch.dtype) -> tuple[float, int]:
    """FLOPs per image (forward and backward), and the most bytes that a micro-batch of `micro` images takes at a time.

    Both are counted on a real pass over shapes alone. The bytes are of all tensors that it makes: activations kept for
    backward, what the teacher and each operation hold for a while, the gradient of a weight until it is complete; also
    what gradient checkpointing makes again. Workspace inside a kernel is not seen.
    """
    with shapes_of(stage, image_size, micro, dtype) as (stage, batch):
        for p in stage.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_drop_gradient)
        # In turn: the counter of FLOPs keeps what gradient checkpointing would free.
        with FlopCounterMode(display=False) as counter:
            stage(batch)["loss"].backward()
        with Taken() as taken:
            stage(batch)["loss"].backward()
    return counter.get_total_flops() / micro, taken.most


def _drop_gradient(p: torch.Tensor) -> None:
    p.grad = None  # counted with the states


class Taken(TorchDispatchMode):
    """Bytes of the tensors made within the context that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._known | before:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, which: int, size: int) -> None:
        self._known.remove(which)
        self.now -= size


def model_state_bytes(
    trained: int, frozen: int, teacher: float, zero: int, ranks: int, bf16: bool, offload: bool
) -> float:
    """Bytes per rank of weights, gradients and optimizer state, after ZeRO, arXiv 1910.02054, section 3.

    Weights and gradients in the working precision; fp32 masters and two moments, 12 bytes a trained parameter, sharded
    from stage 1 on; gradients from stage 2, weights from stage 3. A rank holds `teacher` of its teacher's.
    """
    width = 2 if bf16 else 4
    weights = (trained + frozen) * width / (ranks if zero == 3 else 1)
    optimizer = 0 if offload else trained * 12 / ranks
    return weights + gradient_bytes(trained, zero, ranks, width) + optimizer + teacher * width


def gradient_bytes(trained: int, zero: int, ranks: int, width: int) -> float:
    """Bytes per rank of complete gradients, `width` of an element."""
    return trained * width / (ranks if zero >= 2 else 1)


def memory_bytes(
    trained: int, frozen: int, teacher: float, zero: DeepSpeedZeroConfig, ranks: int, bf16: bool, offload: bool,
    activations: float, accumulate: int,
) -> float:  # fmt: skip
    """Bytes per rank at most, as DeepSpeed takes them.

    Beside the states there is a buffer in which gradients are reduced (two where ZeRO 1 or 2 overlaps that with
    backward), ZeRO 3's gathered weights, and its second partitions, if any. A micro-batch takes most when its backward
    begins: there are no gradients yet then, but those of earlier micro-batches, and ZeRO 3's, which stay. The update
    takes this rank's in fp32.
    """
    width = 2 if bf16 else 4
    buffers = width * zero.reduce_bucket_size * (2 if zero.overlap_comm and zero.stage < 3 else 1)
    if zero.stage == 3:
        buffers += width * min(zero.max_live_parameters, trained + frozen)
        if zero.zero_hpz_partition_size > 1:
            buffers += width * (trained + frozen) / min(zero.zero_hpz_partition_size, ranks)
    gradients = gradient_bytes(trained, zero.stage, ranks, width)
    rest = model_state_bytes(trained, frozen, teacher, zero.stage, ranks, bf16, offload) - gradients
    if sums_in_fp32(zero.stage, accumulate, bf16, offload):
        gradients *= 2
    kept = gradients if accumulate > 1 or zero.stage == 3 else 0
    update = 0 if offload else 4 * trained / ranks
    return rest + buffers + max(kept + activations, gradients + update)
