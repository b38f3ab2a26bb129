"""What a training step computes, counted over shapes alone: nothing is allocated and nothing runs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models import LinearAttention, backbone_of
from models.operators.core import counting
from trainer.engine.speed import Flops, peak_flops
from trainer.setup.build import Job
from trainer.setup.resolution import Size, pair
from trainer.stages.base import Batch, Stage

PAIR = 2  # images that are counted: mixup pairs them


@contextmanager
def shapes_of(stage: Stage, size: Size, micro: int, dtype: torch.dtype) -> Iterator[tuple[Stage, Batch]]:
    """A copy of a stage without values, as it trains without compilation, and a batch of `micro` images for it."""
    height, width = pair(size)
    tensors = [x for module in (stage, *stage.beside()) for x in (*module.parameters(), *module.buffers())]
    tensors += [x for x in tree_leaves(stage.frozen) if isinstance(x, Tensor)]
    stage = copy.deepcopy(stage, {id(x): _empty(x) for x in tensors}).to("meta", dtype)
    for model in stage.beside():
        model.to("meta", dtype)
    for module in stage.modules():
        module._compiled_call_impl = None
    # Fake tensors rather than those of the meta device, which knows softmax attention as N x N products only.
    with FakeTensorMode(allow_non_fake_inputs=True), counting():
        for module in (stage, *stage.beside()):
            module.to_empty(device="cpu")
        yield (
            stage.train(),
            {
                "image": torch.empty(micro, 3, height, width, dtype=dtype),
                "label": torch.empty(micro, dtype=torch.long),
                "mask": torch.empty(micro, height, width, dtype=torch.uint8),
                "key": torch.empty(micro, dtype=torch.long),
            },
        )


def _empty(x: Tensor) -> Tensor:
    shape = torch.empty_like(x, device="meta", requires_grad=False)
    return nn.Parameter(shape, x.requires_grad) if isinstance(x, nn.Parameter) else shape


def count_flops(stage: Stage, size: Size, dtype: torch.dtype, peak: float | None = None) -> Flops:
    """Per image of `size`. What gradient checkpointing would compute again is left out, as MFU is defined."""
    teacher, calls = [], []
    with shapes_of(stage, size, PAIR, dtype) as (stage, batch):
        stage.settings.train.grad_checkpointing = False
        backbone_of(stage.student).set_grad_checkpointing(False)
        with FlopCounterMode(display=False) as counter:

            def note(sign: int) -> Callable[..., None]:
                return lambda *_: teacher.append(sign * counter.get_total_flops())

            for model in stage.beside():
                model.register_forward_pre_hook(note(-1))
                model.register_forward_hook(note(1))
            for module in backbone_of(stage.student).modules():
                if isinstance(module, LinearAttention):
                    module.operator.register_forward_pre_hook(lambda *call: calls.append(call))
            stage(batch)["loss"].backward()
        operator = 0
        if calls:  # that of each block does the same
            operator = len(calls) * _flops_alone(*calls[0])
    student = counter.get_total_flops() - sum(teacher)
    return Flops(sum(teacher) / PAIR, student / PAIR, operator / PAIR, peak)


def _flops_alone(module: nn.Module, given: tuple) -> int:
    """FLOPs of a module, forward and backward, on its own."""
    inputs = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in given]
    with FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    return counter.get_total_flops()


def flops_by_step(job: Job, bf16: bool, device_name: str) -> Callable[[int], Flops]:
    """`count_flops` of the images that a step sees."""
    peak, dtype = peak_flops(device_name, bf16), torch.bfloat16 if bf16 else torch.float32
    found = [(phase.until, count_flops(job.stage, phase.size, dtype, peak)) for phase in job.sizes]
    return lambda step: next((flops for until, flops in found if step <= until), found[-1][1])
