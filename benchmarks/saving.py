"""How long training stands still for a checkpoint: ours beside DeepSpeed's own, in the same run.

A ViT-S trains on random images; every few steps it is saved in one of three ways, in turn:
  deepspeed   engine.save_checkpoint, whose pickles carry no hashes and are not flushed
  waiting     ours, the loop waiting until the checkpoint is published (flushed, hashed, renamed)
  ours        ours as the loop uses it: state is copied, a thread writes, a later step boundary publishes
Time that stands still is what the calls take; what the writing thread costs the steps between shows in the last column.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch

from benchmarks.common import claim, markdown
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import build_engine
from trainer.engine.optim import AdamW
from trainer.ranks.world import join, this_process

BATCH, STEPS = 2, 6  # images a step; steps after each save


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    me = this_process()
    join(me)
    vit = timm.create_model(options.model, num_classes=1000)
    bf16 = me.device.type == "cuda"  # many CPUs emulate it
    config = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
    }
    engine = build_engine(vit, AdamW([{"params": list(vit.parameters())}]), config)
    dtype = torch.bfloat16 if bf16 else torch.float32
    images = torch.randn(BATCH, *vit.pretrained_cfg["input_size"], dtype=dtype, device=me.device)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    checkpoints = Checkpoints(folder / "ours", 2)

    def step() -> None:
        engine.backward(engine(images).float().square().mean())
        engine.step()

    def save(kind: str) -> float:
        began = time.perf_counter()
        if kind == "deepspeed":
            engine.save_checkpoint(str(folder / kind), tag="step")
        else:
            checkpoints.begin(engine, {"step": engine.global_steps, "samples": 0})
            if kind == "waiting":
                checkpoints.publish()
        return time.perf_counter() - began

    def boundary() -> float:
        """What the loop does after each step."""
        began = time.perf_counter()
        if checkpoints.written:
            checkpoints.publish()
        return time.perf_counter() - began

    still: dict[str, list[float]] = {"deepspeed": [], "waiting": [], "ours": []}
    total: dict[str, list[float]] = {kind: [] for kind in still}
    step()
    try:
        for _ in range(options.rounds):
            for kind, waits in still.items():
                began = time.perf_counter()
                wait = save(kind)
                for _ in range(STEPS):
                    step()
                    wait += boundary()
                waits.append(wait)
                total[kind].append(time.perf_counter() - began)
                checkpoints.publish()  # a writer that is still busy is not the next one's burden
    finally:
        shutil.rmtree(folder)
    peer, whole = (statistics.median(values["deepspeed"]) for values in (still, total))
    if options.json:
        words = f"{options.model}: training stands still for a checkpoint, over DeepSpeed's own"
        print(json.dumps({"rows": [claim(words, statistics.median(still["ours"]), 1.0, "s", peer=peer)]}))
        return
    rows = []
    for kind in still:
        wait, time_ = statistics.median(still[kind]), statistics.median(total[kind])
        rows.append([kind, f"{wait / peer:.3f}", f"{wait / time_:.1%}", f"{time_ / whole:.2f}"])
    millions = sum(p.numel() for p in vit.parameters()) / 1e6
    print(f"{options.model}, {millions:.0f} million parameters, a save every {STEPS} steps of {BATCH} images, "
          f"medians of {options.rounds} interleaved rounds\n")  # fmt: skip
    print(markdown(["save", "stands still / DeepSpeed's", "share of the time", "all / with DeepSpeed's"], rows))


if __name__ == "__main__":
    main()
