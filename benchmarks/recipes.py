"""Every operator, addition, hybrid and loss on the embedded default, at equal budgets: `make bench-recipes`.

For each seed stages 1 and 2 on the budget of the recipe `adala`, which is the first row; each other row changes what
its name says. Recipes that differ in stage 2 alone share stage 1. Judged at the last step, on images that chose
nothing. A run that is done is only read, so the same command goes on where it was interrupted, and makes what is new.
"""

import argparse
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.common import ROOT, markdown, run_stage
from models import ADDITIONS, OPERATORS

STRONG = {"operator": "focused"}  # a sharper operator, to which additions, hybrids and losses are tried as well
SHARPER = {**STRONG, "operator_kwargs": {"power": 8}}


@dataclass(frozen=True)
class Recipe:
    """What a row changes, as options of the program."""

    kind: str
    student: tuple[str, ...] = ()  # of both stages
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()


def options(group: str, **given: object) -> tuple[str, ...]:
    """("--student.operator", "focused") and so on."""
    return tuple(word for name, value in given.items() for word in (f"--{group}.{name}", _text(value)))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def recipes() -> dict[str, Recipe]:
    """Name of a row -> what it changes."""
    found = {"elu1": Recipe("operator")}
    found |= {name: Recipe("operator", options("student", operator=name)) for name in OPERATORS if name != "elu1"}
    for power in (2, 3, 4, 8):
        given = options("student", **STRONG, operator_kwargs={"power": power})
        found[f"focused, power {power}"] = Recipe("operator", given)
    for name, base in {"focused, power 8": SHARPER, "hedgehog": {"operator": "hedgehog"}}.items():
        found[f"{name} + value_conv5"] = Recipe("addition", options("student", **base, additions=["value_conv5"]))
    for base in ({}, STRONG):
        name = base.get("operator", "elu1")
        for addition in ADDITIONS:
            found[f"{name} + {addition}"] = Recipe("addition", options("student", **base, additions=[addition]))
        for keep in (*([i] for i in range(5)), "auto:1", "auto:2"):
            words = f"{name}, softmax in {keep if isinstance(keep, str) else keep[0]}"
            found[words] = Recipe("hybrid", options("student", **base, keep_softmax=keep))
        student = options("student", **base)
        found[f"{name}, stage 1 on heads"] = Recipe("loss", student, stage1=options("stage1", match="heads"))
        for words, given in LOSSES.items():
            found[f"{name}, {words}"] = Recipe("loss", student, stage2=options("stage2", **given))
        for factor in (0.3, 3):
            rate = options("train", lr_attention=factor)
            found[f"{name}, attention at {factor} x lr"] = Recipe("rate", student, stage2=rate)
    halves = options("train", batch_size=32)  # the same images in twice the steps
    slower = options("train", lr=5e-4) + options("stage2", blocks=[0, 1, 2, 3])
    for name in ("elu1", "focused, power 8", "focused, power 8 + value_conv5"):
        found[f"{name}, batches of 32, all blocks"] = Recipe("rate", found[name].student, halves, halves + slower)
    rate = options("train", lr=5e-4)  # a copy of the teacher is near to it already
    found["pooled, 5e-4"] = Recipe("rate", options("student", operator="pooled"), rate, rate)
    for factor in (3, 10):
        rate = options("train", lr_new=factor)
        found[f"hedgehog, new at {factor} x lr"] = Recipe("rate", options("student", operator="hedgehog"), rate, rate)
    return found


LOSSES = {
    "cosine + smooth L1": {"loss": "cosine_smooth_l1"},
    "standardised": {"standardise": True},
    "standardised cosine + smooth L1": {"standardise": True, "loss": "cosine_smooth_l1"},
    "blocks 1 and 3 too": {"blocks": [1, 3]},
    "attention kept on, 50": {"attention_weight": 50},
}


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return re.sub(r"[^\w.+-]+", "-", name)


class Runs:
    """The runs of one budget in a folder, `seed0/NAME/stage1` and so on."""

    def __init__(self, out: Path, budget: tuple[tuple[str, ...], tuple[str, ...]], read_only: bool) -> None:
        """`budget`: options of stages 1 and 2; `read_only`: what is not done counts as failed."""
        self.out, self.budget, self.read_only = out, budget, read_only

    def stage(self, seed: int, name: str, stage: int, given: tuple[str, ...]) -> dict | None:
        """The last validation line of a stage, done now or before; None where it failed."""
        folder = self.out / f"seed{seed}" / slug(name)
        asked = ["--config", "adala", "--train.seed", str(seed), "--train.eval_first", "false"]
        asked += [*self.budget[stage - 1], *given]
        kept, result = folder / f"stage{stage}.json", folder / f"stage{stage}/export/config.json"
        if result.is_file() and kept.is_file() and json.loads(kept.read_text()) == asked:
            lines = map(json.loads, (folder / f"stage{stage}/metrics.jsonl").read_text().splitlines())
            return [line for line in lines if line["split"] == "val"][-1]
        if self.read_only:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asked))
        try:
            return run_stage(folder, stage, asked, threads=1)[-1]
        except SystemExit as error:  # the others go on
            print(error, flush=True)
            return None

    def export(self, seed: int, name: str, stage: int) -> str:
        """Where a stage's export lies."""
        return str(self.out / f"seed{seed}" / slug(name) / f"stage{stage}/export")


def main() -> None:
    """Run what is asked for and not done yet, then print the table."""
    table = recipes()
    # Recipes with one stage 1 share it: the first by name has it.
    first: dict[tuple, str] = {}
    for name, row in table.items():
        first.setdefault((row.student, row.stage1), name)
    owner = {name: first[row.student, row.stage1] for name, row in table.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="some rows; what is no row's name stands for all that begin so"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--steps", type=int, nargs=2, metavar=("S1", "S2"), help="another budget than the recipe's")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-recipes")
    parser.add_argument("--done", action="store_true", help="run nothing; print the rows and seeds that are done")
    parser.add_argument("--names", action="store_true", help="print the names of all rows, and end")
    args = parser.parse_args()
    if args.names:
        print("\n".join(table))
        return
    if args.only:
        unknown = [word for word in args.only if not any(name.startswith(word) for name in table)]
        if unknown:
            parser.error(f"--only {unknown[0]}: no row begins so; --names prints them")
        whole = [word for word in args.only if word in table]
        starts = tuple(word for word in args.only if word not in table)
        names = ["elu1", *whole, *(name for name in table if name.startswith(starts))]
        table = {name: row for name, row in table.items() if name in names}
    steps = args.steps
    budget = tuple(("--train.steps", str(n)) for n in steps) if steps else ((), ())
    runs = Runs((args.out / ("-".join(map(str, steps)) if steps else "recipe")).resolve(), budget, args.done)

    def one(seed: int, name: str, row: Recipe) -> dict | None:
        return runs.stage(seed, owner[name], 1, row.student + row.stage1)

    def two(seed: int, name: str, row: Recipe) -> dict | None:
        if stage_1[seed, owner[name]].result() is None:
            return None
        parent = ("--student.parent", runs.export(seed, owner[name], 1))
        return runs.stage(seed, name, 2, row.student + row.stage2 + parent)

    stage_1: dict[tuple[int, str], Future] = {}
    stage_2: dict[tuple[int, str], Future] = {}
    # Row by row, so that what is interrupted leaves whole rows. A stage 2 is asked for after its stage 1, never before.
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, row in table.items():
            for seed in args.seeds:
                if (seed, owner[name]) not in stage_1:
                    stage_1[seed, owner[name]] = pool.submit(one, seed, name, row)
                stage_2[seed, name] = pool.submit(two, seed, name, row)
    after_1, after_2 = ({job: done.result() for job, done in made.items()} for made in (stage_1, stage_2))
    teacher = next((line["teacher_top1"] for line in after_2.values() if line), None)
    rows = [["softmax teacher", "", "", "", "" if teacher is None else f"{teacher:.2f}", "", "100.0 %", "1.000"]]
    for name, row in table.items():
        lines = [(after_1[seed, owner[name]], after_2[seed, name]) for seed in args.seeds]
        lines = [pair for pair in lines if None not in pair]
        if not lines:
            rows += [] if args.done else [[name, row.kind, *["failed"] * 6]]
            continue
        top, cosine = ([mean(pair[i][key] for pair in lines) for i in (0, 1)] for key in ("top1", "feature_cosine"))
        each = ", ".join(f"{pair[1]['top1']:.2f}" for pair in lines)
        rows.append([name, row.kind, f"{top[0]:.2f}", f"{cosine[0]:.3f}", f"{top[1]:.2f}", each,
                     f"{top[1] / teacher:.1%}", f"{cosine[1]:.4f}"])  # fmt: skip
    head = ["student", "kind", "top-1 after stage 1", "feature cosine", "after stages 1 + 2", "a seed"]
    head += ["of the teacher", "feature cosine"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
