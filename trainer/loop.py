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
    stop, clock, skipped = StopFlag(), Clock(step), 0
    batches = clock.waiting_for(batches_from(loader, step))
    while step < steps:
        schedule.step_update(step)
        seed_step(settings.seed, step)
        losses: dict[str, torch.Tensor] = {}
        for _ in range(loader.accumulate):
            batch = next(batches)
            out = engine(batch)
            engine.backward(out["loss"])
            for key, value in out.items():
                losses[key] = losses.get(key, 0) + value.detach().float() / loader.accumulate
            # With the last micro-batch the ranks update together, or none does if a gradient on any is not finite.
            engine.step()
        step += 1
        tracker.advance()
        skipped = 0 if engine.was_step_applied() else skipped + 1
        if skipped >= settings.max_skipped:
            what = f"{skipped} steps in a row had a non-finite loss or gradient on some rank"
            here = f"rank {dist.get_rank()}'s loss is {losses['loss'].item():.4g}"
            raise UserError(f"step {step}: {what}; {here}; use a lower train.lr, or train.bf16 false, in another --run")
        if step % settings.log_every == 0 or step == steps:
            means = torch.stack(list(losses.values()))
            dist.all_reduce(means)
            means = dict(zip(losses, map(finite, (means / dist.get_world_size()).tolist()), strict=True))
            lr, norm = max(group["lr"] for group in engine.optimizer.param_groups), engine.get_global_grad_norm()
            line = {"step": step, "epoch": step / loader.steps_per_epoch, "split": "train"} | means
            tracker.log(line | {"lr": lr, "grad_norm": finite(norm)} | clock.rates(step, settings.batch_size))
        if step == steps or (settings.eval_every and step % settings.eval_every == 0):
            evaluate(step)
            clock.restart(step)
        stopping = stop.agreed(engine.device)
        if stopping or step == steps or step % settings.save_every == 0:
            save(step)
        if stopping and step < steps:
            tracker.say(f"stopped by a signal at step {step} of {steps}, all is saved; run the same command again")
            return STOPPED
    return 0


class Clock:
    """Images a second, and the share of time spent waiting for data, since the last reading."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new reading at `step`."""
        self.step, self.waited, self.since = step, 0.0, time.perf_counter()

    def waiting_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, the time that each took noted."""
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - began
            yield batch

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """Ends the reading at `step`, and begins the next."""
        elapsed = time.perf_counter() - self.since
        speed = (step - self.step) * batch_size / elapsed
        values = {"images_per_second": speed, "data_wait": self.waited / elapsed}
        self.restart(step)
        return values


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
    """Make what torch's generator draws a pure function of (seed, step, rank).

    That is dropout and whatever else `teacher.kwargs` switches on inside timm; it changes with the world size and the
    accumulation, unlike views, mixing and stage 3's drop path, which are keyed by sample.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1)[0]))


def finite(value: float | torch.Tensor | None) -> float | None:
    """A float that JSON can hold, or None."""
    return None if value is None or not math.isfinite(value) else float(value)
