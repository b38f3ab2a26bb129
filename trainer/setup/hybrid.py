"""Which blocks keep softmax attention, by measured damage: `student.keep_softmax auto:K`.

The teacher's blocks are made linear one at a time, with copied weights; the damage is what its final tokens lose,
1 - cosine. The block that does the least damage stays linear, and so on, until K softmax blocks are left.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import data
import models
from trainer.config import Settings, UserError
from trainer.output import charts
from trainer.output.paths import stage_path, write_aside
from trainer.ranks.errors import cause
from trainer.ranks.world import World, dist, join
from trainer.setup.student import check_count, convert, parent_of
from trainer.setup.teacher import OPERATOR_FIELDS

IMAGES, BATCH = 64, 16  # training images that are looked at, without augmentation
FILE = "blocks.json"


def chosen_blocks(
    settings: Settings, teacher: models.ViT, given: dict[str, Any], train: data.Info, previous: str | None, me: World
) -> tuple[list[int], str | None]:
    """The blocks that keep softmax attention, and where they were chosen here a line on how.

    A stage that starts from an export takes the export's. Else rank 0 measures, for all, and `RUN/stage1/blocks.json`
    keeps the ranking, so that a run which goes on has the same blocks.

    Args:
        given: how images reach the model, see `input_of`.
        previous: see `build_student`.

    Raises:
        UserError: there are not as many blocks, the export has another number, or the ranking cannot be written.
    """
    wanted, depth = settings.student.keep_softmax, len(teacher.blocks)
    if not isinstance(wanted, str) or settings.student.attention == "softmax":
        return list(wanted) if not isinstance(wanted, str) else [], None
    count = check_count(wanted, depth)
    parent = parent_of(settings, previous)
    if parent is not None:
        linear = models.read_config(parent)["attention"]["linear_blocks"]
        keep = [i for i in range(depth) if i not in linear]
        if len(keep) != count:
            raise UserError(
                f"{parent}: does not fit as a parent: its blocks {keep} keep softmax attention, "
                f"student.keep_softmax is {wanted}; mend the setting, or choose another with --student.parent"
            )
        return keep, None
    if next(teacher.parameters()).is_meta:
        return list(range(count)), f"which {count} blocks keep softmax attention is measured with the teacher's weights"
    path = stage_path(settings.run, settings.stage) / FILE
    of = {
        "teacher": models.fingerprint(teacher.blocks),
        **{field: getattr(settings.student, field) for field in OPERATOR_FIELDS},
        "images": train.sha256 or str(train.path),
        "image_size": given["image_size"],
        "keep": count,
    }
    if settings.dry_run or me.size == 1:
        found = ranking(settings, teacher, given, train, me, of, path)
    else:
        join(me)
        shared = [ranking(settings, teacher, given, train, me, of, path) if me.rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        dist.barrier()  # no rank ends, with nothing left to do, before all have it
        found = shared[0]
    alone = "  ".join(f"{i}: {damage:.3g}" for i, damage in enumerate(found["alone"]))
    which = f"block{'s' if count > 1 else ''} {', '.join(map(str, found['softmax']))}"
    lost = f"the final tokens lose, with one block alone linear, {alone}"
    return found["softmax"], f"student.keep_softmax {wanted}: {which} of {depth}; {lost}"


def ranking(
    settings: Settings, teacher: models.ViT, given: dict[str, Any], train: data.Info, me: World,
    of: dict[str, Any], path: Path,
) -> dict[str, Any]:  # fmt: skip
    """What `path` keeps where it is `of` the same; else measured, and kept there unless it is a dry run."""
    try:
        kept = json.loads(path.read_text())
        if kept["of"] == json.loads(json.dumps(of)):
            return kept
    except (OSError, ValueError, TypeError, KeyError):
        pass  # none yet, or damaged: the measurement gives the same again
    if not train.path.is_file():
        raise UserError(f"student.keep_softmax {settings.student.keep_softmax}: is measured on the training images, "
                        "which are not written yet; leave it out of the dry run, or name the blocks")  # fmt: skip
    loader = data.eval_loader(
        train.path, image_size=given["image_size"], batch_size=BATCH, crop_pct=given["crop_pct"], mean=given["mean"],
        std=given["std"], device=me.device, workers=settings.data.workers,
    )  # fmt: skip
    images = []
    for batch in loader.epoch():
        images.append(batch["image"][batch["valid"]])
        if sum(map(len, images)) >= IMAGES:
            break
    loader.close()
    student = convert(settings, teacher, ()).to(me.device)
    found = {**rank_blocks(teacher.to(me.device), student, images, of["keep"]), "of": of}
    teacher.to("cpu")
    if not settings.dry_run:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, json.dumps(found, indent=1) + "\n")
            both = [partial(draw, found=found) for draw in (charts.damage_alone, charts.damage_in_order)]
            width = charts.width_of(len(found["alone"]))
            charts.save(path.with_suffix(".png"), charts.figure(*both, width=width))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({cause(error)})") from error
    return found


@torch.no_grad()
def rank_blocks(teacher: models.ViT, student: models.ViT, images: Sequence[Tensor], keep: int) -> dict[str, Any]:
    """The greedy choice.

    Args:
        student: of the same weights, linear in every block.
        images: batches [B, 3, H, W].
        keep: blocks that stay softmax.

    Returns:
        `softmax`, the blocks that stay so; `alone`, the damage of each block that alone is linear; `order`, {block,
        damage} in which blocks became linear, with the damage of all up to it. Plain values.
    """
    teacher.eval(), student.eval()
    targets = [teacher.forward_features(x).float() for x in images]

    def damage(linear: Sequence[int]) -> float:
        with models.borrowed_attention(teacher, student, linear):
            losses = [
                1 - F.cosine_similarity(teacher.forward_features(x).float(), target, dim=-1).mean(1)
                for x, target in zip(images, targets, strict=True)
            ]
        value = torch.cat(losses).double().mean().item()
        return value if math.isfinite(value) else math.inf

    left, order, alone = list(range(len(teacher.blocks))), [], []
    while len(left) > keep:
        linear = [entry["block"] for entry in order]
        damages = [damage([*linear, i]) for i in left]
        alone = alone or damages
        least = min(damages)
        order.append({"block": left.pop(damages.index(least)), "damage": least})
    return {"softmax": left, "alone": alone, "order": order}
