"""THE training loop, over a DeepSpeed engine. It knows no stage: a stage gives losses and evaluates itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler

from trainer.config import UserError
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import DeepSpeedEngine
from trainer.engine.profile import Profile, part
from trainer.engine.settings import Train
from trainer.engine.speed import Clock, Flops
from trainer.output.tracking import Tracker
from trainer.ranks.signals import STOPPED, OnAnyRank, StopFlag, Stopped, on_any_rank
from trainer.ranks.world import dist


@dataclass(kw_only=True)
class Training:
    """What the loop works with."""

    engine: DeepSpeedEngine  # its module returns {"loss": scalar, **parts} for a batch
    loader: Any  # gives `steps_per_epoch`, `accumulate` and `epoch(epoch, start)`
    schedule: Scheduler  # sets the learning rate as a pure function of the step
    settings: Train
    tracker: Tracker
    should_stop: StopFlag  # asked before each micro-batch, heeded at the next one: the run then saves and ends
    checkpoints: Checkpoints  # published at the first step boundary after all ranks wrote
    save: Callable[[int], None]  # begins a checkpoint of the step; all ranks call it
    evaluate: Callable[[int], None]  # evaluates and logs at the step; all ranks call it; may raise Stopped
    flops: Callable[[int], Flops] | None = None  # of an image at a step, for the metrics of the rank that logs
    profile: Profile | None = None


def train(training: Training, step: int, steps: int) -> int:
    """Train from `step` to `steps`; returns 0, or `STOPPED`.

    Raises:
        UserError: `max_skipped` steps in a row, or half of a short run, had a non-finite loss or gradient; or damaged
            data.
    """
    engine, loader, settings = training.engine, training.loader, training.settings
    tracker, checkpoints = training.tracker, training.checkpoints
    clock, skipped, saved = Clock(step, engine.device), [], step
    profile = training.profile or Profile(None, Path(), engine.device)
    on_any = OnAnyRank(engine.device)
    most_skipped = min(settings.max_skipped, -(-steps // 2))  # a short run counts too
    batches = clock.waiting_for(batches_from(loader, step))
    try:
        if should_evaluate(settings, step, steps) and not on_any_rank(tracker.was_evaluated(step), engine.device):
            training.evaluate(step)  # at the start, or where a stop came first
            clock.restart(step)
        training.should_stop.raise_if_set(engine.device)
        while step < steps:
            if (table := profile.before(step + 1)) is not None:
                tracker.info(table)
                clock.restart(step)  # writing the trace took a while
            before = [(buffer, buffer.clone()) for buffer in engine.module.buffers()] if loader.accumulate > 1 else []
            training.schedule.step_update(step)
            seed_step(settings.seed, step)
            losses: dict[str, torch.Tensor] = {}
            parts = []
            for _ in range(loader.accumulate):
                stopped, unwritten = on_any(training.should_stop.set, not checkpoints.written)
                if stopped:  # what was accumulated of this step is left
                    for buffer, value in before:
                        buffer.copy_(value)
                    raise Stopped
                batch = next(batches)
                with part("student forward"):
                    out = engine(batch)
                with part("backward"):
                    engine.backward(out["loss"])
                for key, value in out.items():
                    losses[key] = losses.get(key, 0) + value.detach().float() / loader.accumulate
                parts.append((out["loss"].detach(), batch["index"]))
                # With the last micro-batch the ranks update together, or none does if any's gradient is not finite.
                with part("optimizer"):
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
                with part("logging"):
                    log(training, step, losses, clock)
            if should_evaluate(settings, step, steps):
                training.evaluate(step)
                clock.restart(step)
            if checkpoints.pending and not unwritten:
                clock.standing_still(checkpoints.publish)
            # Not while steps are being skipped: the newest checkpoint stays from before.
            if step == steps or (not skipped and step // settings.save_every > saved // settings.save_every):
                clock.standing_still(training.save, step)
                saved = step
        say(tracker, profile.stop(step))
        checkpoints.publish()
    except Stopped:
        say(tracker, profile.stop(step))
        if step > saved:
            training.save(step)
        checkpoints.publish()
        tracker.stopped(f"stopped by a signal at step {step} of {steps}, all is saved; run the same command again")
        return STOPPED
    return 0


def log(training: Training, step: int, losses: dict[str, torch.Tensor], clock: Clock) -> None:
    """The metrics line of a step; a collective. It waits for the device."""
    engine, loader, ranks = training.engine, training.loader, dist.get_world_size()
    means = torch.stack(list(losses.values()))
    dist.all_reduce(means)
    line = {"step": step, "epoch": step / loader.steps_per_epoch, "split": "train"}
    line |= dict(zip(losses, (means / ranks).tolist(), strict=True))
    line |= {"lr": max(group["lr"] for group in engine.optimizer.param_groups)}
    line |= {"grad_norm": engine.get_global_grad_norm()}
    flops = training.flops(step) if training.flops else None
    training.tracker.log(line | clock.rates(step, training.settings.batch_size, ranks, flops))


def say(tracker: Tracker, table: str | None) -> None:
    """A profile's table, where there is one."""
    if table is not None:
        tracker.info(table)


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
