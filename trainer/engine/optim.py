"""Optimizer, parameter groups and schedule of a stage; the moving average of the weights lives in the optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from trainer.config import UserError
from trainer.engine.settings import Train


class AdamW(torch.optim.AdamW):
    """AdamW that can keep an exponential moving average of what it optimizes, as the state `ema` of each parameter.

    Under ZeRO the optimizer sees fp32 master shards, so the average is fp32 too, sharded like the moments, and saved,
    loaded and reshaped with them. The decay warms up as min(decay, (1 + step) / (10 + step)), as in timm's ModelEmaV3.
    """

    def __init__(self, groups: list[dict[str, Any]], ema_decay: float | None = None, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of parameters and averages. `closure` is not supported."""
        assert closure is None
        super().step()
        if self.ema_decay is None:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "ema" not in state:
                    state["ema"] = p.detach().clone()
                # Counted on the host; `step` may lie on the device, where only the first look at it waits.
                made = state["updates"] = state["updates"] + 1 if "updates" in state else int(state["step"])
                state["ema"].lerp_(p, 1 - min(self.ema_decay, (1 + made) / (10 + made)))


def build_optimizer(
    groups: list[dict[str, Any]], train: Train, ema_decay: float | None, fused: bool, cpu_offload: bool
) -> torch.optim.Optimizer:
    """AdamW over a stage's parameter groups; those without parameters are left out.

    Args:
        ema_decay: of the moving average; None keeps none.
        fused: torch's fused kernel, on a GPU.
        cpu_offload: the state lies in host memory: DeepSpeed's own CPU Adam.

    Raises:
        UserError: an average is asked for together with offload.
    """
    if cpu_offload and ema_decay is not None:
        raise UserError("stage3.ema: cannot be kept with offload_optimizer; use a --deepspeed file without it")
    groups = [group for group in groups if group["params"]]
    options = {"lr": train.lr, "betas": tuple(train.betas), "weight_decay": train.weight_decay}
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return AdamW(groups, ema_decay, fused=fused, **options)


def scaled(groups: list[dict[str, Any]], of: Iterable[nn.Parameter], factor: float) -> list[dict[str, Any]]:
    """The groups, with the parameters `of` in groups of their own, at `factor` times the learning rate."""
    chosen = {id(p) for p in of}
    rest = [group | {"params": [p for p in group["params"] if id(p) not in chosen]} for group in groups]
    own = [group | {"params": [p for p in group["params"] if id(p) in chosen]} for group in groups]
    return rest + [group | {"lr_scale": factor * group.get("lr_scale", 1.0)} for group in own]


def build_schedule(optimizer: torch.optim.Optimizer, train: Train, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then cosine from `train.lr` to `train.min_lr` over `steps`; `step_update(step)` is stateless."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps - train.warmup_steps),
        lr_min=train.min_lr,
        warmup_t=train.warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
