"""What a stage would run, without training: parameters, groups, FLOPs, memory, steps, parent."""

import copy
import weakref
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import Job
from trainer.config import Settings
from trainer.engine import World, accumulation, offloads
from trainer.optim import build_optimizer
from trainer.resolution import Size, pair
from trainer.stages import Stage

GIB = 2**30


def describe(settings: Settings, job: Job, config: dict, me: World) -> str:
    """The text of `--dry_run`."""
    stage, zero = job.stage, config["zero_optimization"]["stage"]
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in stage.parameters() if not p.requires_grad)
    teacher = sum(p.numel() for p in stage.teacher.parameters()) if stage.teacher is not None else 0
    accumulate = accumulation(settings, me.size)
    micro = settings.train.batch_size // me.size // accumulate
    dtype = torch.bfloat16 if settings.train.bf16 else torch.float32
    flops, activations = measure(stage, job.export["input"]["image_size"], micro, dtype)
    states = model_state_bytes(trained, frozen, teacher, zero, me.size, settings.train.bf16, offloads(config))
    buffers = buffer_bytes(config["zero_optimization"], trained, me.size, settings.train.bf16)
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
        f"memory a rank: {(states + buffers + activations) / GIB:.2f} GiB, an estimate: states {states / GIB:.2f} "
        f"(ZeRO {zero}), DeepSpeed's buffers {buffers / GIB:.2f}, a micro-batch {activations / GIB:.2f}",
    ]
    return "\n".join(lines)


def measure(stage: Stage, image_size: Size, micro: int, dtype: torch.dtype) -> tuple[float, int]:
    """FLOPs an image (forward and backward), and the most bytes that a micro-batch of `micro` images takes at a time.

    Both are counted on a real pass over shapes alone. The bytes are of all tensors that it makes: activations kept for
    backward, what the teacher and each operation hold for a while, the gradient of a weight until it is added up; also
    what gradient checkpointing makes again. Workspace inside a kernel is not seen.
    """
    height, width = pair(image_size)
    stage = copy.deepcopy(stage).to("meta", dtype)
    if stage.teacher is not None:
        stage.teacher.to("meta", dtype)
    for module in stage.modules():
        module._compiled_call_impl = None  # as it would run without train.compile
    # Fake tensors rather than those of the meta device, which knows softmax attention as N x N products only.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (stage, stage.teacher):
            if module is not None:
                module.to_empty(device="cpu")
        for p in stage.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        batch = {
            "image": torch.empty(micro, 3, height, width, dtype=dtype),
            "label": torch.empty(micro, dtype=torch.long),
            "mask": torch.empty(micro, height, width, dtype=torch.uint8),
            "key": torch.empty(micro, dtype=torch.long),
        }
        with FlopCounterMode(display=False) as counter, Taken() as taken:
            stage.train()(batch)["loss"].backward()
    return counter.get_total_flops() / micro, taken.most


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


def buffer_bytes(zero: dict[str, Any], trained: int, ranks: int, bf16: bool) -> float:
    """Bytes a rank of DeepSpeed's buffers, as `zero_optimization` sizes them.

    One in which gradients are reduced (two where ZeRO 1 or 2 overlaps that with backward); ZeRO 3's gathered weights,
    at most; and before an update this rank's gradients in fp32, which come when the activations are gone but are
    counted here: they are small where there are many ranks.
    """
    known, width = DeepSpeedZeroConfig(**zero), 2 if bf16 else 4
    buckets = 2 if known.overlap_comm and known.stage < 3 else 1
    gathered = min(known.max_live_parameters, trained) if known.stage == 3 else 0
    return (buckets * known.reduce_bucket_size + gathered) * width + 4 * trained / ranks
