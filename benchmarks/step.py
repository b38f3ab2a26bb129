"""What a training step costs: `make bench-step`.

Our loop over a bare DeepSpeed loop, on the same module, in the same process, with batches in memory. Then the step of
stages 1 and 2 over one forward pass of the teacher on the same images. All take turns, round by round; figures are
medians. On a CPU with one thread (OMP_NUM_THREADS=1) CPU time counts, so that the machine may be busy.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import data
from benchmarks.common import ROOT, claim, markdown
from benchmarks.memory import MemoryLoader
from models import linearize, match_dtypes
from trainer.config import Settings, parse, stage_of
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import DeepSpeedEngine, accumulation, build_engine, deepspeed_config
from trainer.engine.optim import build_optimizer, build_schedule
from trainer.engine.speed import Flops, peak_flops
from trainer.loop import Training, train
from trainer.output.tracking import Tracker
from trainer.ranks.signals import StopFlag
from trainer.ranks.world import World, deepspeed, join, leave, this_process
from trainer.setup.flops import count_flops
from trainer.setup.teacher import build_teacher
from trainer.stages.base import Stage

LOOP = 1.03  # our loop over a bare one, at most
STEPS = {"1": 2.0, "2": 4.4}  # a stage's step over a teacher's forward pass, at most
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 4}


def build_stage(settings: Settings) -> Stage:
    """The stage that the settings ask for, on random weights and without a data set."""
    teacher = build_teacher(settings)
    student = linearize(teacher, settings.student.operator)
    nothing = dict.fromkeys(data.Info.__dataclass_fields__)
    info = data.Info(**nothing | {"path": Path("memory"), "num_samples": 1 << 20, "has_labels": True, "fields": ()})
    return stage_of(settings)(settings, student, teacher, teacher.num_classes, {"train": info})


def memory_loader(settings: Settings, stage: Stage, me: World) -> MemoryLoader:
    """Batches for it."""
    accumulate = accumulation(settings, me.size)
    return MemoryLoader(
        settings.data.image_size, settings.train.batch_size // me.size // accumulate, accumulate=accumulate,
        num_classes=max(2, stage.num_classes), device=me.device,
        dtype=torch.bfloat16 if settings.train.bf16 else torch.float32,
    )  # fmt: skip


def engine_of(settings: Settings, stage: Stage, me: World, bare: bool = False, fused: bool = False) -> DeepSpeedEngine:
    """As a run builds it; `bare` as DeepSpeed alone does, with the same configuration."""
    config = deepspeed_config(settings, me.size)
    fused = fused or me.device.type == "cuda"
    optimizer = build_optimizer(stage.parameter_groups(), settings.train, stage.ema_decay, fused, cpu_offload=False)
    if bare:
        engine, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=config)
    else:
        engine = build_engine(stage, optimizer, config)
    match_dtypes(stage)
    for model in stage.beside():
        model.to(me.device, next(stage.parameters()).dtype)
    return engine


def training_of(
    settings: Settings, engine: DeepSpeedEngine, loader: Any, folder: Path, steps: int, **how: Any
) -> Training:
    """What `trainer.main` gives the loop, without evaluations and checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)

    def nothing(_step: int) -> None:
        pass

    return Training(
        engine=engine, loader=loader, schedule=build_schedule(engine.optimizer.optimizer, settings.train, steps),
        settings=settings.train, tracker=Tracker(folder, settings, engine.global_rank, 0, steps),
        should_stop=StopFlag(), checkpoints=Checkpoints(folder / "checkpoints", 1), save=nothing, evaluate=nothing,
        **how,
    )  # fmt: skip


@dataclass
class Turns:
    """Seconds per step of what takes turns, by name."""

    device: torch.device
    seconds: dict[str, list[float]]

    def take(self, name: str, work: Callable[[], None], steps: int) -> None:
        """One turn of `steps` steps."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        self.wait()
        began = clock()
        work()
        self.wait()
        self.seconds.setdefault(name, []).append((clock() - began) / steps)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def of(self, name: str) -> float:
        """The median."""
        return statistics.median(self.seconds[name])


def measure(which: str, options: argparse.Namespace, me: World, folder: Path) -> tuple[Turns, Flops]:
    """Our loop, a bare loop and the teacher's forward pass of one stage."""
    settings = parse(arguments(which, options, folder))
    stages = [build_stage(settings) for _ in range(2)]
    size, dtype = settings.data.image_size, torch.bfloat16 if settings.train.bf16 else torch.float32
    flops = count_flops(stages[0], size, dtype, peak_flops(me.device_name, settings.train.bf16))
    loader, steps = memory_loader(settings, stages[0], me), options.steps
    engine, bare = engine_of(settings, stages[0], me), engine_of(settings, stages[1], me, bare=True)
    last = steps * (options.rounds + 1)
    training, turns = training_of(settings, engine, loader, folder, last, flops=lambda _: flops), Turns(me.device, {})

    def our_loop() -> None:
        at = engine.global_steps
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            train(training, at, at + steps)

    def bare_loop() -> None:
        batches = loader.epoch(0, bare.global_steps)
        for _ in range(steps * loader.accumulate):
            bare.backward(bare(next(batches))["loss"])
            bare.step()

    @torch.no_grad()
    def teacher_forward() -> None:
        batches = loader.epoch()
        for _ in range(steps * loader.accumulate):
            stages[0].teacher(next(batches)["image"])

    work = {"ours": our_loop, "bare": bare_loop, "teacher": teacher_forward}
    for i in range(options.rounds + 1):
        for name in work if i % 2 else reversed(work):
            turns.take(name, work[name], steps)
    for seconds in turns.seconds.values():
        del seconds[0]  # the first turn compiles, and fills caches
    training.tracker.close()
    return turns, flops


def arguments(which: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of a run of stage `which`."""
    given = ["--config", "own", "--stage", which, "--run", str(folder), "--tracking", "[]"]
    given += ["--teacher.name", options.teacher, "--teacher.pretrained", "false", "--deepspeed", options.deepspeed]
    given += ["--data.image_size", str(options.image_size), "--student.operator", options.operator]
    given += ["--train.batch_size", str(options.batch_size), "--train.micro_batch_size", str(options.micro_batch_size)]
    given += ["--train.eval_first", "false", "--train.bf16", str(options.bf16).lower(), "--train.log_every", "50"]
    given += ["--train.compile", str(options.compile).lower()]
    return given + (["--teacher.kwargs", json.dumps(TINY)] if options.tiny else [])


def rows_of(which: str, turns: Turns) -> list[dict[str, Any]]:
    """Claim, seconds of ours and of the peer, ratio, target, whether it is met."""
    pairs = [(f"stage {which}: our loop over a bare DeepSpeed loop", "bare", LOOP)]
    pairs += [(f"stage {which}: a step over one forward pass of the teacher", "teacher", STEPS[which])]
    return [claim(words, turns.of("ours"), target, "s", peer=turns.of(peer)) for words, peer, target in pairs]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="vit_large_patch14_dinov2" if cuda else "vit_tiny_patch16_224")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--operator", default="focused")
    parser.add_argument("--batch_size", type=int, default=256 if cuda else 8, help="images per step")
    parser.add_argument("--micro_batch_size", type=int, default=128 if cuda else 4)
    parser.add_argument("--deepspeed", default=str(ROOT / "ds_configs/zero1.json"))
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--stages", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--steps", type=int, default=5 if cuda else 3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7 if cuda else 5)
    parser.add_argument("--tiny", action="store_true", help="two small blocks, for tests of this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args(argv)
    if options.tiny:
        options.teacher, options.image_size, options.rounds = "vit_tiny_patch16_224", 32, min(options.rounds, 3)
        options.batch_size, options.micro_batch_size = 8, 4
    return options


def compare(options: argparse.Namespace, me: World) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all stages, and a line on each stage's speed."""
    rows, notes = [], []
    for which in options.stages:
        with tempfile.TemporaryDirectory() as folder:
            turns, flops = measure(which, options, me, Path(folder) / "stage")
        rows += rows_of(which, turns)
        work = (flops.teacher + flops.student) * options.batch_size / me.size
        speed = work / turns.of("ours")
        mfu = f", MFU {speed / flops.peak:.1%}" if flops.peak else ""
        notes.append(f"stage {which}: {speed / 1e12:.3g} TFLOP/s{mfu}; {turns.of('ours'):.4g} s per step")
    return rows, notes


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options, me = parse_options(argv), this_process()
    if me.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    join(me)
    rows, notes = compare(options, me)
    if options.json:
        print(json.dumps({"rows": rows, "notes": notes}))
    else:
        where = me.device_name if me.device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
        what = f"{options.batch_size} images of {options.image_size} pixels, {options.micro_batch_size} at a time"
        print(f"{options.teacher}, {options.operator}, {what}, {where}; {options.rounds} rounds\n")
        table = [[row["claim"], f"{row['ours']:.4g} s", f"{row['peer']:.4g} s", f"{row['ratio']:.3f}",
                  f"{row['target']:g}", "yes" if row["met"] else "NO"] for row in rows]  # fmt: skip
        print(markdown(["claim", "ours", "peer", "ratio", "at most", "met"], table))
        print("\n".join(notes))
    leave()


if __name__ == "__main__":
    main()
