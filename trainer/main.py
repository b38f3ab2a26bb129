"""The trainer's main: from what was typed to a stage's export. `run.py` and a cluster's jobs both enter here."""

from data import DamagedError
from trainer import probe
from trainer.config import Settings, UserError, as_dict, parse
from trainer.engine import engine as ds
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.optim import build_optimizer, build_schedule
from trainer.loop import train
from trainer.output.folder import StageFolder
from trainer.output.tracking import Tracker
from trainer.ranks.signals import StopFlag
from trainer.ranks.watchdog import Watchdog
from trainer.setup.build import Job, build, check_unchanged, loaders, reading
from trainer.setup.dry_run import describe


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a rank died, 2 a user's mistake (one line on stderr), 75 stopped by a signal and saved."""
    me = ds.world()
    with StopFlag() as stop, Watchdog(me.rank, me.size) as watchdog:
        try:
            settings = parse(argv)
            if settings.stage == "probe":
                return probe.run(settings, me, stop)
            config = ds.deepspeed_config(settings, me.size)
            folder = StageFolder(settings)
            folder.check(settings)
            job = build(settings, me, folder.run)
            if settings.dry_run or folder.complete:
                if me.rank == 0:
                    complete = f"stage {settings.stage} is complete: {folder.export}"
                    print(describe(settings, job, config, me) if settings.dry_run else complete, flush=True)
                return 0
            folder.claim(settings, me.rank)
        except (UserError, ValueError, OSError) as error:
            return watchdog.fail(error)
        try:
            return run(settings, config, folder, job, me, stop)
        except (UserError, DamagedError, OSError) as error:
            return watchdog.fail(error)


def run(settings: Settings, config: dict, folder: StageFolder, job: Job, me: ds.World, stop: StopFlag) -> int:
    """Train, judge and hand on one stage."""
    ds.join(me)
    checkpoints = Checkpoints(folder.checkpoints, settings.train.keep)
    found = checkpoints.newest()
    check_unchanged(settings, job, found)
    order = reading(settings, job, found[1].get("reading") if found else None)
    train_data, val_data = loaders(settings, job, me, order)
    optimizer = build_optimizer(job.stage.student, settings, me.device.type == "cuda", ds.offloads(config))
    schedule = build_schedule(optimizer, settings.train, job.steps)
    engine = ds.build_engine(job.stage, optimizer, config)
    if job.stage.teacher is not None:
        job.stage.teacher.to(me.device, next(job.stage.parameters()).dtype)
    step = found[1]["step"] if found else 0
    if found:
        checkpoints.restore(engine, found)
    tracker = Tracker(folder.path, settings, me.rank, step, job.steps)
    start = f"step {step}" if found else job.start
    tracker.say(f"stage {settings.stage}, {job.stage.name}: from {start}, to step {job.steps}")
    if order["order"] == "windowed":
        tracker.say(f"{job.train.path}: read in long runs, shuffled within {order['window']} MiB (data.order windowed)")
    quick, scores = probe.QuickProbe(settings, job, me, engine), {}

    def evaluate(at: int) -> None:
        if val_data is not None:
            values = job.stage.evaluate(engine, stop.heeding(val_data.epoch(), me.device))
            scores[at] = job.stage.score(values)
            tracker.log({"step": at, "epoch": at / job.steps_per_epoch, "split": "val", **values, **quick(at)})

    def save(at: int) -> None:
        state = {"step": at, "samples": at * settings.train.batch_size, "settings": as_dict(settings)}
        state |= {"lineage": job.export["lineage"], "reading": order, "score": scores.get(at)}
        checkpoints.begin(engine, state)

    status = train(
        engine, train_data, schedule, settings.train, step, job.steps, tracker, stop, checkpoints, save, evaluate
    )
    if status == 0:
        job.stage.draw(engine, val_data, folder.path / "pictures")
        state = job.stage.export(engine)
        if me.rank == 0:
            folder.hand_on(state, job.export)
            tracker.say(f"stage {settings.stage} is done: {folder.export}")
    train_data.close()
    tracker.close()
    ds.leave()
    return status
