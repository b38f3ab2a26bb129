"""Training steps on real DeepSpeed engines, looked at from within: `python tests/support/steps.py RANKS` prints JSON.

`waits`: of some stages, ZeRO stages, accumulations and numbers of parameter groups, the host waits and collectives of a
step, by the place that asks for them. On CPU ranks a tensor counts as the device's until it is copied to the host by
name (`.to("cpu", copy=True)`); so what would wait for a GPU is seen without one. On a GPU torch itself says what waits.
`stop`: what a stop within a step leaves. `sums`: how the gradients of many micro-batches add up.
`bench`: the rows of `make bench-step`.
"""

import json
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.step import arguments as command_line
from benchmarks.step import build_stage, compare, engine_of, memory_loader, parse_options, training_of
from tests.support.ranks import forked
from trainer.config import parse
from trainer.loop import Training, train
from trainer.ranks.world import World, deepspeed, join, this_process

ROOT = Path(__file__).parents[2]
WARM_UP, STEPS = 2, 2
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")


class Waits(TorchDispatchMode):
    """Within it: `found`, how often (kind, place) occurred. `kind` is an operator, `synchronize` or a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on_host = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        host = bool(tensors) and all(x in self.on_host for x in tensors)
        if func.namespace == "c10d" or (name in READS and not host):
            self.note(name)
        elif name == "_to_copy" and kwargs.get("device") == torch.device("cpu") and not host:
            self.note("copy to the host")
            host = True
        if host:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.on_host[x] = True
        return out

    def note(self, kind: str) -> None:
        """Count it where it was asked for: the innermost place in this repository, and in DeepSpeed."""
        frames = traceback.extract_stack()
        ours = next((f for f in reversed(frames) if f.filename.startswith(str(ROOT)) and "/support/" not in f.filename
                     and ".venv" not in f.filename), None)  # fmt: skip
        where = f"{Path(ours.filename).name}:{ours.name}" if ours else "?"
        self.found[f"{kind} {where}"] += 1


@contextmanager
def counting(device: torch.device) -> Iterator[Counter]:
    """Within it the mapping fills with what is waited for."""
    accelerator = deepspeed.accelerator.get_accelerator()
    if device.type == "cuda":
        found: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                found[f"wait {Path(warning.filename).name}:{warning.lineno}"] += 1
        return
    with Waits() as waits:
        own = accelerator.synchronize
        accelerator.synchronize = lambda *_: waits.note("synchronize")
        try:
            yield waits.found
        finally:
            accelerator.synchronize = own


def build(me: World, folder: Path, which: str, zero: int, accumulate: int, given: list[str]) -> Training:
    """A tiny stage in an engine, with batches in memory."""
    options = parse_options(["--tiny", "--deepspeed", str(ROOT / f"ds_configs/zero{zero}.json")])
    options.batch_size, options.micro_batch_size = 4 * me.size * accumulate, 4
    settings = parse([*command_line(which, options, folder), *given, "--train.log_every", "1000"])
    stage = build_stage(settings)
    engine = engine_of(settings, stage, me, fused=True)  # as on a GPU: torch's other AdamW counts its steps in tensors
    return training_of(settings, engine, memory_loader(settings, stage, me), folder / str(me.rank), 100)


def count(me: World, folder: Path, which: str, zero: int, accumulate: int, given: list[str]) -> dict[str, float]:
    """What a step waits for, by place; the mean of the steps after the first ones."""
    training = build(me, folder, which, zero, accumulate, given)

    def steps(at: int, until: int) -> None:
        # The loop logs at its last step: it is told of one more, and stopped at the step that counts.
        class Enough(Exception):
            pass

        def before(step: int) -> None:
            if step == until + 1:
                raise Enough

        training.profile = SimpleNamespace(before=before)
        with suppress(Enough):
            train(training, at, until + 1)

    steps(0, WARM_UP)
    with counting(me.device) as found:
        steps(WARM_UP, WARM_UP + STEPS)
    return {key: value / STEPS for key, value in sorted(found.items())}


CASES = {
    "one micro-batch": ("2", 1, 1, []),
    "three micro-batches": ("2", 1, 3, []),
    "more groups": ("2", 1, 1, ["--train.lr_attention", "0.5"]),
    "zero 3": ("2", 3, 2, []),
    "stage 3": ("3", 2, 2, ["--stage3.ema", "0.9", "--stage3.drop_path", "0.1", "--stage3.mixup", "0.8",
                            "--stage3.layer_decay", "0.7"]),
    "stage 1": ("1", 1, 2, []),
}  # fmt: skip


def stop_within_a_step(me: World, folder: Path) -> dict[str, Any]:
    """The last rank is asked to stop while it makes the second of five micro-batches of step 2."""
    training, made, saved = build(me, folder, "2", 1, 5, []), [], []
    stage, epoch = training.engine.module, training.loader.epoch
    stage.register_buffer("seen", torch.zeros(()))
    stage.register_forward_pre_hook(lambda *_: stage.seen.add_(1) and None)

    def batches(*args: int) -> Iterator[dict[str, torch.Tensor]]:
        for batch in epoch(*args):
            made.append(1)
            training.should_stop.set |= me.rank == me.size - 1 and len(made) == 7
            yield batch

    training.loader.epoch, training.save = batches, saved.append
    status = train(training, 0, 9)
    return {"status": status, "saved": saved, "made": len(made), "seen": stage.seen.item()}


def norm_of_sums(me: World, folder: Path, zero: int) -> float:
    """The gradient's norm in bf16, two batches added 16 times each over that of once each: 1 but for rounding."""
    norms = []
    for accumulate in (32, 2):
        training = build(me, folder / str(accumulate), "2", zero, accumulate, ["--train.bf16", "true"])
        train(training, 0, 1)
        norms.append(float(training.engine.get_global_grad_norm()))
    return norms[0] / norms[1]


def run_rank(folder: Path) -> None:
    """All cases on this rank; rank 0 prints."""
    me = this_process()
    torch.set_num_threads(1)
    join(me)
    found = {name: count(me, folder / str(number), *case) for number, (name, case) in enumerate(CASES.items())}
    stop = stop_within_a_step(me, folder / "stop")
    bench, _ = compare(parse_options(["--tiny", "--rounds", "1", "--stages", "1"]), me)
    sums = {f"zero {zero}": norm_of_sums(me, folder / f"sums{zero}", zero) for zero in (1, 2, 3)}
    if me.rank == 0:
        print(json.dumps({"waits": found, "stop": stop, "sums": sums, "bench": bench}), flush=True)


def main(ranks: int) -> int:
    """The ranks, forked; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        if ranks == 1:  # a fork could not use a GPU
            run_rank(Path(folder))
            return 0
        return 0 if forked(ranks, lambda: run_rank(Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
