"""Learning rates by part, in every stage's parameter groups."""

from pathlib import Path

import pytest

import models
from tests.trainer.stages.test_base import job_of
from trainer.engine.engine import deepspeed_config
from trainer.ranks.world import this_process
from trainer.setup.dry_run import describe

RATES = ["--train.lr_new", "10", "--train.lr_attention", "0.5"]
STUDENT = ["--student.operator", "hedgehog", "--student.additions", "[gate]", "--student.keep_softmax", "[0]"]
LAYERS = ["--stage3.layer_decay", "0.5"]
MASKS = ["--task", "segmentation", "--segmentation.head_lr", "3"]


def rates(stage) -> dict[str, float]:
    """The factor on the learning rate of each parameter; each is in one group."""
    groups = stage.parameter_groups()
    found = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return {name: found[id(p)] for name, p in stage.student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", ("1", "2", "3", "3 layers", "3 masks"))
def test_each_part_has_its_rate(small: Path, stage: str) -> None:
    options = {"3 layers": LAYERS, "3 masks": MASKS}.get(stage, [])
    if "masks" in stage:
        options = [*options, "--data.train", str(small / "masked.beton"), "--data.val", str(small / "masked_val.beton")]
    plain, scaled = (rates(job_of(small, int(stage[0]), *STUDENT, *options, *more).stage) for more in ([], RATES))
    assert plain.keys() == scaled.keys()
    new = ("operator.", "on_output.")
    seen = set()
    for name, rate in scaled.items():
        inside = name.partition(".attn.")[2]
        factor = 10 if inside.startswith(new) else 0.5 if inside else 1
        seen.add(factor)
        assert rate == pytest.approx(plain[name] * factor), name
    assert seen == ({10, 0.5} if stage == "1" else {10, 0.5, 1})


def test_a_dry_run_says_the_rates(small: Path) -> None:
    job = job_of(small, 1, *STUDENT, *RATES)
    said = describe(job.stage.settings, job, deepspeed_config(job.stage.settings, 1), this_process())
    assert "learning rate 0.01" in said and "learning rate 0.0005" in said
    assert models.linear_blocks(job.stage.student) == [1]
