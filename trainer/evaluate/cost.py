"""What a model costs: images per second, latency of one image, FLOPs and memory, at a size in pixels."""

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import models
from trainer.setup.dry_run import Taken
from trainer.setup.resolution import Size, pair

MIB = 2**20


def at_size(model: nn.Module, size: Size) -> nn.Module:
    """A copy of a model that is built for images of `size`; `model` itself where it takes any."""
    height, width = pair(size)
    net = models.backbone_of(model)
    if not hasattr(net, "set_input_size") or tuple(net.patch_embed.img_size) == (height, width):
        return model
    models.check_image_size(net, (height, width), "evaluate.sizes")
    model = copy.deepcopy(model)
    models.backbone_of(model).set_input_size(img_size=(height, width))
    return model


@torch.no_grad()
def measure(model: nn.Module, size: Size, batch_size: int, seconds: float) -> dict[str, Any]:
    """Of a forward pass, on the model's device and in its precision.

    Returns:
        `images_per_second` with `batch_size` images a call, and `latency_ms` with one: medians, each with the quartiles
        `_low` and `_high`; `gflops` of an image, a multiplication and an addition being two; `memory_mib`, what a call
        of `batch_size` images takes beside the weights, at most; `parameters`.
    """
    parameter = next(model.parameters())
    model = at_size(model, size)
    found: dict[str, Any] = {"batch_size": batch_size, "parameters": sum(p.numel() for p in model.parameters())}
    for name, count in (("images_per_second", batch_size), ("latency_ms", 1)):
        images = torch.randn(count, 3, *pair(size), device=parameter.device, dtype=parameter.dtype)
        model(images)  # whatever the first call alone does
        timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())
        taken = timer.blocked_autorange(min_run_time=seconds)
        quartiles = [torch.tensor(taken.times, dtype=torch.float64).quantile(q).item() for q in (0.25, 0.5, 0.75)]
        if name == "latency_ms":
            low, value, high = (1000 * x for x in quartiles)
        else:
            high, value, low = (count / x for x in quartiles)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    flops, taken = counted(model, size, batch_size, parameter.dtype)
    if parameter.device.type == "cuda":
        images = torch.randn(batch_size, 3, *pair(size), device=parameter.device, dtype=parameter.dtype)
        before = torch.cuda.memory_allocated(parameter.device)
        torch.cuda.reset_peak_memory_stats(parameter.device)
        model(images)
        taken = torch.cuda.max_memory_allocated(parameter.device) - before
    return found | {"gflops": flops / 1e9, "memory_mib": taken / MIB}


def counted(model: nn.Module, size: Size, batch_size: int, dtype: torch.dtype) -> tuple[float, int]:
    """FLOPs of an image, and the most bytes of tensors that a call holds at a time; of a pass over shapes alone."""
    model = copy.deepcopy(model).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = torch.empty(batch_size, 3, *pair(size), dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            model(images)
        with Taken() as taken:
            model(images)
    return counter.get_total_flops() / batch_size, taken.most
