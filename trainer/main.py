"""The trainer's main: from what was typed to a stage's export. `run.py` and a cluster's jobs both enter here."""

import math
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from data import DamagedError
from models import backbone_of, match_dtypes
from trainer.config import Settings, UserError, as_dict, parse, stage_of, user_errors
from trainer.engine.checkpoint import Checkpoints, Manifest
from trainer.engine.engine import build_engine, deepspeed_config, offloads, shard_frozen
from trainer.engine.optim import build_optimizer, build_schedule
from trainer.engine.profile import Profile
from trainer.loop import Training, train
from trainer.output.folder import StageFolder
from trainer.output.log import Log
from trainer.output.tracking import Tracker
from trainer.probe.quick import QuickProbe
from trainer.ranks.errors import MachineError, explain
from trainer.ranks.shared import check_shared
from trainer.ranks.signals import STOPPED, StopFlag, Stopped
from trainer.ranks.watchdog import MISTAKE, Watchdog
from trainer.ranks.world import World, building, check_driver, join, leave, this_process
from trainer.setup.build import Job, build, check_unchanged, in_one_line
from trainer.setup.dry_run import describe
from trainer.setup.flops import flops_by_step
from trainer.setup.inputs import loaders, reading_order
from trainer.setup.prepare import prepare, say_stopped


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a rank died, 2 a user's mistake (one line on stderr), 75 stopped by a signal and saved."""
    try:
        me = this_process()
    except MachineError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    with StopFlag() as should_stop, Watchdog(me.rank, me.size) as watchdog:
        settings = None
        try:
            check_driver()
            settings = parse(argv)
            watchdog.start = settings.train.start_limit
            stage = stage_of(settings)
            if not isinstance(stage, type):  # a module with a run of its own
                if not settings.dry_run:
                    with user_errors():
                        prepare(settings, me, should_stop)
                return stage.run(settings, me, should_stop)
            return run(settings, me, should_stop)
        except Stopped:
            say_stopped(me)
            return STOPPED
        except (UserError, DamagedError) as error:
            return watchdog.fail(error)
        except Exception as error:
            line = explain(error, settings and Path(settings.run))
            if line is None:
                raise
            return watchdog.fail(UserError(line))


def run(settings: Settings, me: World, should_stop: StopFlag) -> int:
    """Check one stage, and train it where it is to be trained."""
    folder = StageFolder(settings)
    with user_errors():
        config = deepspeed_config(settings, me.size)
        folder.check(settings)
        if not settings.dry_run and not folder.complete:
            prepare(settings, me, should_stop)
        job = build(settings, me)
    if not settings.dry_run and not folder.complete:
        folder.claim(settings, me.rank)
        with Log(folder.path, me.rank) as log:
            return train_stage(settings, config, folder, job, me, should_stop, log)
    if me.rank == 0:
        if folder.complete:
            check_unchanged(settings, job, job.steps, *folder.exported())
        complete = f"stage {settings.stage} is complete: {folder.export}"
        print(describe(settings, job, config, me) if settings.dry_run else complete, flush=True)
    return 0


def train_stage(
    settings: Settings, config: dict, folder: StageFolder, job: Job, me: World, should_stop: StopFlag, log: Log
) -> int:
    """Train, evaluate and export one stage."""
    if me.rank == 0:
        print(building(), end="", file=sys.stderr, flush=True)
    with log.printed():
        join(me)
    check_shared(folder.path)
    checkpoints = Checkpoints(folder.checkpoints, settings.train.keep)
    found = checkpoints.newest()
    if found:
        resume_lineage(settings, job, found[1])
    order = reading_order(settings, job, found[1].get("reading") if found else None)
    train_data, val_data = loaders(settings, job, me, order)
    on_gpu = me.device.type == "cuda"
    optimizer = build_optimizer(
        job.stage.parameter_groups(), settings.train, job.stage.ema_decay, fused=on_gpu, cpu_offload=offloads(config)
    )
    schedule = build_schedule(optimizer, settings.train, job.steps)
    flops = flops_by_step(job, settings.train.bf16, me.device_name) if me.rank == 0 else None
    if me.rank == 0:
        job.stage.keep_frozen()
    engine = build_engine(job.stage, optimizer, config)
    match_dtypes(job.stage)
    beside, dtype = job.stage.beside(), torch.bfloat16 if settings.train.bf16 else torch.float32
    sharded = [shard_frozen(model, me.device, dtype) for model in beside if settings.teacher.shard]
    for model in () if sharded else beside:
        model.to(me.device, dtype)
    step = found[1]["step"] if found else 0
    if found:
        checkpoints.restore(engine, found)
    job.stage.begin(engine, train_data, folder.path, step)
    tracker = Tracker(folder.path, settings, me.rank, step, job.steps)
    start = f"step {step}" if found else job.start
    vit = backbone_of(job.stage.student)
    tracker.started(
        steps=job.steps, ranks=me.size, device=me.device_name, student=job.start, notes=job.notes,
        image_size=job.export["input"]["image_size"], tokens=vit.patch_embed.num_patches + vit.num_prefix_tokens,
        prefix_tokens=vit.num_prefix_tokens, versions={name: version(name) for name in ("torch", "timm", "deepspeed")},
    )  # fmt: skip
    tracker.info(in_one_line(settings, job, me, start))
    log.note(f"{job.images}; settings of {', but '.join((settings.source, *settings.changed))}")
    for note in job.notes:
        tracker.info(f"note: {note}")
    for engine_of in sharded:
        parameters = list(engine_of.module.parameters())
        held, whole = sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters)
        tracker.info(f"teacher: spread over the ranks, {held:,} of its {whole:,} parameters on each")
    if order["order"] == "windowed":
        tracker.info(
            f"{job.train.path}: read in long runs, shuffled within {order['window']} MiB (data.order windowed)"
        )
    quick_probe, scores = QuickProbe(settings, job, me, engine), {}

    def evaluate(at: int) -> None:
        if val_data is not None:
            values = job.stage.evaluate(engine, should_stop.stoppable(val_data.epoch(), me.device))
            scores[at] = job.stage.score(values)
            tracker.log({"step": at, "epoch": at / job.steps_per_epoch, "split": "val", **values, **quick_probe(at)})
            if at == job.steps:
                check_outcome(tracker, job, scores[at])

    def save(at: int) -> None:
        state = {"step": at, "samples": at * settings.train.batch_size, "settings": as_dict(settings)}
        state |= {"lineage": job.export["lineage"], "reading": order, "score": scores.get(at)}
        checkpoints.begin(engine, state)

    training = Training(
        engine=engine, loader=train_data, schedule=schedule, settings=settings.train, tracker=tracker,
        should_stop=should_stop, checkpoints=checkpoints, save=save, evaluate=evaluate, flops=flops,
        profile=Profile(settings.train.profile if me.rank == 0 else None, folder.path / "profile", me.device),
    )  # fmt: skip
    status = train(training, step, job.steps)
    if status == 0:
        job.stage.draw(engine, val_data, folder.path / "pictures")
        tracker.pictures(
            sorted(path for where in ("*.png", "pictures/*.png") for path in folder.path.glob(where)), job.steps
        )
        state = job.stage.export(engine)
        if me.rank == 0:
            folder.write_export(state, job.export, settings)
            tracker.info(f"stage {settings.stage} is done: {folder.export}")
    train_data.close()
    tracker.close()
    leave()
    return status


def check_outcome(tracker: Tracker, job: Job, score: float) -> None:
    """Whether the stage was of use: at its end against the evaluation before its first step.

    Raises:
        UserError: the final evaluation is not finite; nothing is to be exported.
    """
    if not math.isfinite(score):
        raise UserError(
            f"{job.stage.name}: diverged, the evaluation at step {job.steps} is not finite; nothing is exported; use a "
            "lower train.lr or more train.warmup_steps in another --run"
        )
    first = tracker.first_evaluation
    before = job.stage.score(first) if first and None not in first.values() else None
    if before is not None and score < before:
        tracker.warn(
            f"the student got worse: {job.stage.scored} was {abs(before):.4g} before the first step and is "
            f"{abs(score):.4g} at step {job.steps}; use a lower train.lr or more train.warmup_steps in another --run",
            step=job.steps,
        )


def resume_lineage(settings: Settings, job: Job, manifest: Manifest) -> None:
    """The lineage of a run that goes on is its checkpoint's. Raises UserError when what it names has changed."""
    check_unchanged(settings, job, manifest["step"], manifest["lineage"], manifest["settings"])
    job.export["lineage"] = manifest["lineage"]
