"""THE training loop, over a DeepSpeed engine. It knows no stage: a stage gives losses and judges itself."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from timm.scheduler.scheduler import Scheduler

from trainer.config import Train, UserError
from trainer.engine import DeepSpeedEngine
from trainer.tracking import Tracker

STOPPED = 75  # EX_TEMPFAIL: a signal came, everything is saved, run the same command again


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1 on this rank; the ranks agree on it once a step."""

    def __init__(self) -> None:
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.set = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; a collective."""
        flag = torch.tensor(float(self.set), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def train(
    engine: DeepSpeedEngine,
    loader,
    schedule: Scheduler,
    settings: Train,
    step: int,
    steps: int,
    tracker: Tracker,
    save: Callable[[int], None],
    evaluate: Callable[[int], None],
) -> int:
    """Train from `step` to `steps`; returns 0, or `STOPPED`.

    Args:
        engine: a DeepSpeed engine whose module returns {"loss": scalar, **parts} for a batch.
        loader: gives `steps_per_epoch`, `accumulate` and `epoch(epoch, start)`.
        schedule: sets the learning rate as a pure function of the step.
        save: publishes a checkpoint of the step; all ranks call it.
        evaluate: judges and logs at the step; all ranks call it.

    Raises:
        UserError: `max_skipped` steps in a row had a non-finite loss or gradient; or damaged data.
    """
    stop = StopFlag()
    batches = batches_from(loader, step)
    skipped, waited, since, counted = 0, 0.0, time.perf_counter(), 0
    while step < steps:
        schedule.step_update(step)
        seed_step(settings.seed, step)
        losses: dict[str, torch.Tensor] = {}
        for _ in range(loader.accumulate):
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            out = engine(batch)
            engine.backward(out["loss"])
            for key, value in out.items():
                losses[key] = losses.get(key, 0) + value.detach().float() / loader.accumulate
            engine.step()  # with the last micro-batch: reduces, and updates unless some rank's gradient is not finite
        step += 1
        counted += 1
        tracker.advance()
        skipped = 0 if engine.was_step_applied() else skipped + 1
        if skipped >= settings.max_skipped:
            loss = losses["loss"].item()
            raise UserError(
                f"step {step}: {skipped} steps in a row had a non-finite loss or gradient on some rank (here the loss is "
                f"{loss:.4g}); use a lower train.lr, or train.bf16 false, in another --run"
            )
        if step % settings.log_every == 0 or step == steps:
            means = torch.stack(list(losses.values()))
            dist.all_reduce(means, op=dist.ReduceOp.AVG if means.is_cuda else dist.ReduceOp.SUM)
            means = means if means.is_cuda else means / dist.get_world_size()
            elapsed = time.perf_counter() - since
            tracker.log({
                "step": step, "epoch": step / loader.steps_per_epoch, "split": "train",
                **dict(zip(losses, means.tolist(), strict=True)),
                "lr": max(group["lr"] for group in engine.optimizer.param_groups),
                "grad_norm": finite(engine.get_global_grad_norm()),
                "images_per_second": counted * settings.batch_size / elapsed, "data_wait": waited / elapsed,
            })  # fmt: skip
            waited, since, counted = 0.0, time.perf_counter(), 0
        if step == steps or (settings.eval_every and step % settings.eval_every == 0):
            evaluate(step)
            waited, since, counted = 0.0, time.perf_counter(), 0
        stopping = stop.agreed(engine.device)
        if stopping or step == steps or step % settings.save_every == 0:
            save(step)
        if stopping and step < steps:
            tracker.say(
                f"stopped by a signal at step {step} of {steps}, everything is saved; run the same command again"
            )
            return STOPPED
    return 0


def batches_from(loader, step: int) -> Iterator[dict[str, Any]]:
    """Micro-batches from the global batch of `step` on, epoch after epoch."""
    epoch, start = divmod(step, loader.steps_per_epoch)
    while True:
        try:
            yield from loader.epoch(epoch, start)
        except ValueError as error:
            raise UserError(str(error)) from error
        epoch, start = epoch + 1, 0


def seed_step(seed: int, step: int) -> None:
    """Make dropout, drop path and mixing a pure function of (seed, step, rank)."""
    state = np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(2)
    torch.manual_seed(int(state[0]))
    np.random.seed(state[1])  # timm's Mixup draws from it


def finite(value: float | torch.Tensor | None) -> float | None:
    """A float that JSON can hold, or None."""
    return None if value is None or not math.isfinite(value) else float(value)
