"""THE training loop, over a DeepSpeed engine. It knows no stage: a stage gives losses and evaluates itself."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler

from trainer.config import UserError
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import DeepSpeedEngine
from trainer.engine.settings import Train
from trainer.output.tracking import Tracker
from trainer.ranks.signals import STOPPED, StopFlag, Stopped, on_any_rank
from trainer.ranks.world import dist


@dataclass(kw_only=True)
class Training:
    """What the loop works with."""

    engine: DeepSpeedEngine  # its module returns {"loss": scalar, **parts} for a batch
    loader: Any  # gives `steps_per_epoch`, `accumulate` and `epoch(epoch, start)`
    schedule: Scheduler  # sets the learning rate as a pure function of the step
    settings: Train
    tracker: Tracker
    should_stop: StopFlag  # asked before each step; the run then saves and ends, as when `evaluate` raises Stopped
    checkpoints: Checkpoints  # published at the first step boundary after all ranks wrote
    save: Callable[[int], None]  # begins a checkpoint of the step; all ranks call it
    evaluate: Callable[[int], None]  # evaluates and logs at the step; all ranks call it


def train(training: Training, step: int, steps: int) -> int:
    """Train from `step` to `steps`; returns 0, or `STOPPED`.

    Raises:
        UserError: `max_skipped` steps in a row, or half of a short run, had a non-finite loss or gradient; or damaged
            data.
    """
    engine, loader, settings = training.engine, training.loader, training.settings
    tracker, checkpoints = training.tracker, training.checkpoints
    clock, skipped, saved = Clock(step), [], step
    most_skipped = min(settings.max_skipped, -(-steps // 2))  # a short run counts too
    batches = clock.waiting_for(batches_from(loader, step))
    try:
        if should_evaluate(settings, step, steps) and not on_any_rank(tracker.was_evaluated(step), engine.device):
            training.evaluate(step)  # at the start, or where a stop came first
            clock.restart(step)
        while step < steps:
            training.should_stop.raise_if_set(engine.device)
            training.schedule.step_update(step)
            seed_step(settings.seed, step)
            losses: dict[str, torch.Tensor] = {}
            parts = []
            for _ in range(loader.accumulate):
                batch = next(batches)
                out = engine(batch)
                engine.backward(out["loss"])
                for key, value in out.items():
                    losses[key] = losses.get(key, 0) + value.detach().float() / loader.accumulate
                parts.append((out["loss"].detach(), batch["index"]))
                # With the last micro-batch the ranks update together, or none does if any's gradient is not finite.
                engine.step()
            step += 1
            tracker.advance()
            skipped = [] if engine.was_step_applied() else [*skipped, (step, parts)]
            if len(skipped) >= most_skipped:
                last = step - len(skipped)  # nothing has changed since
                if last > saved:
                    training.save(last)
                checkpoints.publish()
                raise UserError(skipped_steps_message(skipped, last))
            if step % settings.log_every == 0 or step == steps:
                means = torch.stack(list(losses.values()))
                dist.all_reduce(means)
                means = dict(zip(losses, (means / dist.get_world_size()).tolist(), strict=True))
                lr, norm = max(group["lr"] for group in engine.optimizer.param_groups), engine.get_global_grad_norm()
                line = {"step": step, "epoch": step / loader.steps_per_epoch, "split": "train"} | means
                tracker.log(line | {"lr": lr, "grad_norm": norm} | clock.rates(step, settings.batch_size))
            if should_evaluate(settings, step, steps):
                training.evaluate(step)
                clock.restart(step)
            if checkpoints.pending and not on_any_rank(checkpoints.writing, engine.device):
                clock.standing_still(checkpoints.publish)
            # Not while steps are being skipped: the newest checkpoint stays from before.
            if step == steps or (not skipped and step // settings.save_every > saved // settings.save_every):
                clock.standing_still(training.save, step)
                saved = step
        checkpoints.publish()
    except Stopped:
        if step > saved:
            training.save(step)
        checkpoints.publish()
        tracker.stopped(f"stopped by a signal at step {step} of {steps}, all is saved; run the same command again")
        return STOPPED
    return 0


def should_evaluate(settings: Train, step: int, steps: int) -> bool:
    """Whether the student is evaluated at `step`."""
    if step == 0:
        return settings.eval_first
    return step == steps or (settings.eval_every > 0 and step % settings.eval_every == 0)


def skipped_steps_message(skipped: list[tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]], last: int) -> str:
    """Where losses or gradients were not finite: ranks, steps, and samples of the micro-batches; a collective.

    Args:
        skipped: (step, this rank's (loss, sample indices [B]) a micro-batch).
        last: the step that was applied last.
    """
    rank, room, words = dist.get_rank(), 128, []  # indices named, at most
    mine = [(step, rank, bool(loss.isfinite()), index.tolist()) for step, parts in skipped for loss, index in parts]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = sorted(part for theirs in everyone for part in theirs)
    bad = [part for part in found if not part[2]]
    for step, rank, _, index in bad or found:
        if room > 0:
            words.append(f"step {step}, rank {rank}, samples {' '.join(map(str, index[:room]))}")
            room -= len(index)
    where = "; ".join([*words, "and more"] if room < 0 else words)
    what = (
        f"{len(skipped)} steps in a row had a non-finite {'loss' if bad else 'gradient, though every loss was finite'}"
    )
    how = f"step {last} is kept, from before; mend these samples, or use a lower train.lr in another --run"
    return f"{what}: {where}; {how}"


class Clock:
    """Images per second, and the shares of time spent waiting for data and for checkpoints, since the last reading."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new reading at `step`."""
        self.step, self.waited, self.stood, self.since = step, 0.0, 0.0, time.perf_counter()

    def waiting_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, the time that each took noted."""
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - began
            yield batch

    def standing_still(self, work: Callable[..., None], *args: Any) -> None:
        """Do what training waits for."""
        began = time.perf_counter()
        work(*args)
        self.stood += time.perf_counter() - began

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """Ends the reading at `step`, and begins the next."""
        elapsed = time.perf_counter() - self.since
        speed = (step - self.step) * batch_size / elapsed
        values = {"images_per_second": speed, "data_wait": self.waited / elapsed, "save_wait": self.stood / elapsed}
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
