"""What would fail a stage within its first minute, found without its weights and its ranks: before it waits in a queue.

`python -m trainer.setup.check` reads a JSON list of {"argv": the program's arguments, "ranks": [numbers of ranks]}.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

import data
import models
from trainer.config import Settings, UserError, parse
from trainer.engine import engine as ds
from trainer.output.folder import StageFolder
from trainer.probe.stage import check_labels, test_sets
from trainer.setup.build import build_teacher, input_of, num_classes_of


def check(settings: Settings, ranks: Iterable[int]) -> None:
    """Settings, data, files and run folder of a stage, on each of these numbers of ranks.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    folder = StageFolder(settings)
    folder.check(settings)
    if folder.complete:
        return
    infos = {s: data.inspect(data.resolve(spec, s)) for s in ("train", "val") if (spec := getattr(settings.data, s))}
    if settings.stage == "probe":
        check_labels(infos["train"], test_sets(settings))
    else:
        for size in ranks:
            ds.deepspeed_config(settings, size)
    if infos["train"].num_samples < settings.train.batch_size:
        raise UserError(f"train.batch_size {settings.train.batch_size}: {infos['train'].path} has only "
                        f"{infos['train'].num_samples} images")  # fmt: skip
    if settings.student.parent not in (None, "none"):
        models.read_config(Path(settings.student.parent))
    weights = settings.teacher.weights
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"teacher.weights {weights}: no such file")
    with torch.device("meta"):  # of any size, at no cost
        teacher = build_teacher(replace(settings, teacher=replace(settings.teacher, weights=None, pretrained=False)))
        input_of(settings, teacher)
        if settings.stage != "probe":
            student = models.linearize(teacher, settings.student.feature_map, settings.student.keep_softmax)
            num_classes_of(settings, infos, student)


def main() -> int:
    """Exit status: 0, or 2 after one line on what does not fit."""
    try:
        for job in json.load(sys.stdin):
            check(parse(job["argv"]), job["ranks"])
    except (UserError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    ds.end(main())
