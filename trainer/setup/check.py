"""What would fail a stage within its first minute, found without its weights and its ranks: before it waits in a queue.

`python -m trainer.setup.check` reads a JSON list of {"argv": the program's arguments, "ranks": [numbers of ranks]}.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

import models
from trainer.config import Settings, UserError, parse, stage_of
from trainer.engine.engine import accumulation, deepspeed_config
from trainer.output.folder import StageFolder
from trainer.ranks.world import end
from trainer.setup.cache import inspect_data
from trainer.setup.student import convert
from trainer.setup.teacher import build_teacher, input_of


def check(settings: Settings, ranks: Iterable[int]) -> None:
    """Settings, data, files and run folder of a stage, on each of these numbers of ranks.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    folder = StageFolder(settings)
    folder.check(settings)
    if folder.complete:
        return
    stage = stage_of(settings)
    if isinstance(stage, type) and settings.student.parent not in (None, "none"):
        models.read_config(Path(settings.student.parent))
    weights = settings.teacher.weights
    if weights is not None and not Path(weights).exists():
        raise UserError(f"teacher.weights {weights}: no such file")
    if isinstance(stage, type):
        infos = inspect_data(settings)
        for size in ranks:
            deepspeed_config(settings, size)
            stage.check(settings, infos, settings.train.batch_size // size // accumulation(settings, size))
    else:
        stage.check(settings)
        if settings.teacher.name is None:  # an export's own, which it may be judged without
            return
    with torch.device("meta"):  # of any size, at no cost
        teacher = build_teacher(replace(settings, teacher=replace(settings.teacher, weights=None, pretrained=False)))
        input_of(settings, teacher)
        if isinstance(stage, type):
            student = convert(settings, teacher)
            stage.head_classes(settings, infos, student)


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
    end(main())
