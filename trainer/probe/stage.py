"""The stage `probe`: linear probes on every module of every block, teacher beside student, in and out of distribution.

The method is that of "Layer by layer, module by module", arXiv 2603.05280. One pass over the images writes the features
to the run folder. Then each group of feature vectors is fitted on one rank. A probe that was stopped goes on with the
same command.
"""

import json
import sys

import numpy as np
import torch

import data
from trainer.config import Settings, user_errors
from trainer.output.folder import StageFolder
from trainer.output.log import Log
from trainer.output.paths import write_aside
from trainer.probe.barrier import Barrier
from trainer.probe.features import extract
from trainer.probe.fit import fit_groups, groups_of, kept
from trainer.probe.images import Split, available, inspect_images
from trainer.probe.plan import Plan, make_plan
from trainer.probe.report import report
from trainer.ranks.shared import check_shared
from trainer.ranks.signals import STOPPED, StopFlag, Stopped
from trainer.ranks.world import World, dist, join, leave


def check(settings: Settings) -> None:
    """Data and labels, before anything is built.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    available(settings, *inspect_images(settings))


def run(settings: Settings, me: World, should_stop: StopFlag) -> int:
    """Exit status: 0 done, 75 stopped by a signal with everything saved.

    Raises:
        UserError, ValueError, OSError: a user's mistake, in one line.
    """
    folder = StageFolder(settings)
    with user_errors():
        folder.check(settings)
        plan = make_plan(settings, folder)
    if settings.dry_run or folder.complete:
        if me.rank == 0:
            complete = f"the probe is complete: {folder.path / 'results.json'}"
            print(describe(plan) if settings.dry_run else complete, flush=True)
        return 0
    room = plan.store.check_room()
    folder.claim(settings, me.rank)
    with Log(folder.path, me.rank) as log, log.printed():
        join(me)
    check_shared(folder.path)
    counts = [plan.counts]
    dist.broadcast_object_list(counts, src=0)  # the free space may have changed between the ranks' looks
    if counts[0] != plan.counts:
        plan.use(counts[0])
    if me.rank == 0:
        write_aside(folder.path / "plan.json", json.dumps(plan.record, indent=2))
        sources = ", ".join(f"{model} from {about['from']}" for model, about in plan.models.items())
        for line in (sources, plan.note, f"{room}; {len(plan.vectors)} feature vectors"):
            if line:
                print(f"probe: {line}", file=sys.stderr, flush=True)
    barrier = Barrier(me, should_stop)
    try:
        extract_and_fit(plan, me, barrier)
    except Stopped:
        if me.rank == 0:
            print("stopped by a signal, all is saved; run the same command again", file=sys.stderr, flush=True)
        leave()
        return STOPPED
    if me.rank == 0:
        fits = [kept(folder.path / "probes", vector) for vector in plan.vectors]
        print(report(folder.path, fits, plan.record), flush=True)
        if not settings.probe.keep_features:
            plan.store.remove()
    barrier.wait("report")
    leave()
    return 0


def extract_and_fit(plan: Plan, me: World, barrier: Barrier) -> None:
    """Write the features and the probes that are missing, each rank its share.

    Raises:
        Stopped: on all ranks, when a signal came to one.
    """
    settings, store, probes = plan.settings, plan.store, plan.folder / "probes"
    chunks = store.missing()
    groups = groups_of(plan.vectors, store, plan.classes * len(settings.probe.penalties), me.device)
    groups = [group for group in groups if any(kept(probes, vector) is None for vector in group)]
    barrier.wait("look")  # nobody writes before all have looked
    if not groups:
        return
    for vit in plan.reader.vits.values():
        vit.to(me.device, torch.bfloat16 if settings.train.bf16 else torch.float32)
        if settings.train.compile:
            for block in vit.blocks:
                block.compile()

    def loader_of(split: Split) -> data.Loader:
        return data.eval_loader(
            split.path, indices=split.indices, batch_size=settings.probe.batch_size, device=me.device,
            dtype=next(iter(plan.reader.vits.values())).patch_embed.proj.weight.dtype,
            workers=settings.data.workers,
            **{key: plan.given[key] for key in ("image_size", "mean", "std", "crop_pct")},
        )  # fmt: skip

    mine = np.array_split(np.arange(len(chunks)), me.size)[me.rank]  # neighbours: one pass through the file
    made = extract(plan.reader, store, [chunks[i] for i in mine], loader_of)
    barrier.work(made, len(chunks), "features")
    fitted = fit_groups(store, groups[me.rank :: me.size], plan.classes, settings.probe, probes, me.device)
    barrier.work(fitted, len(groups), "probes")


def describe(plan: Plan) -> str:
    """The text of `--dry_run`."""
    options = plan.settings.probe
    lines = [
        *(f"{model}: {about['from']}" for model, about in plan.models.items()),
        f"classes: {plan.classes}",
        *(f"images, {name}: {count:,}" for name, count in plan.counts.items()),
        *([f"note: {plan.note}"] if plan.note else []),
        f"features: {plan.store.check_room()}",
        f"probes: {len(plan.vectors)} feature vectors x {len(options.penalties)} penalties, {options.solver}",
    ]
    return "\n".join(lines)
