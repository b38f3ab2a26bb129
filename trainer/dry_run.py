"""What a stage would run, without training: parameters, groups, FLOPs, memory, steps, parent."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import Job
from trainer.config import Settings
from trainer.engine import World, accumulation, offloads
from trainer.optim import build_optimizer

GIB = 2**30


def describe(settings: Settings, job: Job, config: dict, me: World) -> str:
    """The text of `--dry_run`."""
    stage, zero = job.stage, config["zero_optimization"]["stage"]
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in stage.parameters() if not p.requires_grad)
    teacher = sum(p.numel() for p in stage.teacher.parameters()) if stage.teacher is not None else 0
    accumulate = accumulation(settings, me.size)
    micro = settings.train.batch_size // me.size // accumulate
    flops, activations = measure(settings, job)
    states = model_state_bytes(trained, frozen, teacher, zero, me.size, settings.train.bf16, offloads(config))
    groups = build_optimizer(stage.student, settings, fused=False, cpu_offload=False).param_groups
    unverified = [str(info.path) for info in (job.train, job.val) if info is not None and info.digest is None]
    lines = [
        f"stage {settings.stage}: {stage.name}",
        f"starts from: {job.start}",
        f"trainable parameters: {trained:,}",
        f"frozen parameters: {frozen:,} of the student, {teacher:,} of the teacher",
        f"parameter groups: {len(groups)}",
        *(
            f"  {sum(p.numel() for p in group['params']):,} parameters, weight decay {group['weight_decay']:g}, "
            f"learning rate {settings.train.lr * group.get('lr_scale', 1.0):g}"
            for group in groups
        ),
        f"images: {job.train.num_samples:,} to train on, {job.val.num_samples if job.val else 0:,} to judge on",
        *(f"written without checksums, damage to its images goes unnoticed: {path}" for path in unverified),
        f"steps: {job.steps:,} of {settings.train.batch_size} images "
        f"({me.size} ranks x {accumulate} x {micro}), {job.steps_per_epoch:,} an epoch",
        f"FLOPs a step: {flops * settings.train.batch_size:.3e}",
        f"memory a rank: {(states + activations * micro) / GIB:.2f} GiB, of which states {states / GIB:.2f} "
        f"(ZeRO {zero}) and activations {activations * micro / GIB:.2f}; an estimate, without temporary buffers",
    ]
    return "\n".join(lines)


def measure(settings: Settings, job: Job) -> tuple[float, float]:
    """FLOPs (forward and backward) and bytes kept for backward, an image; counted on a real pass over shapes alone."""
    dtype = torch.bfloat16 if settings.train.bf16 else torch.float32
    stage = copy.deepcopy(job.stage).to("meta", dtype)
    if stage.teacher is not None:
        stage.teacher.to("meta", dtype)
    for module in stage.modules():
        module._compiled_call_impl = None  # as it would run without train.compile
    size, images = job.export["input"]["image_size"], 2
    batch = {
        "image": torch.empty(images, 3, size, size, dtype=dtype, device="meta"),
        "label": torch.empty(images, dtype=torch.long, device="meta"),
        "key": torch.empty(images, dtype=torch.long, device="meta"),
    }
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in stage.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = stage.train()(batch)["loss"]
        loss.backward()
    return counter.get_total_flops() / images, sum(kept.values()) / images


def model_state_bytes(
    trained: int, frozen: int, teacher: int, zero: int, ranks: int, bf16: bool, offload: bool
) -> float:
    """Bytes a rank of weights, gradients and optimizer state, after ZeRO, arXiv 1910.02054, section 3.

    Weights and gradients in the working precision; fp32 masters and two moments, 12 bytes a trained parameter, sharded
    from stage 1 on; gradients from stage 2, weights from stage 3. The teacher is whole on every rank.
    """
    width = 2 if bf16 else 4
    weights = (trained + frozen) * width / (ranks if zero == 3 else 1)
    gradients = trained * width / (ranks if zero >= 2 else 1)
    optimizer = 0 if offload else trained * 12 / ranks
    return weights + gradients + optimizer + teacher * width
