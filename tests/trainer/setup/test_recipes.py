"""All shipped recipes run dry, without weights."""

from pathlib import Path

import pytest
import timm
import torch

from trainer.config import RECIPES, UserError, parse
from trainer.main import main
from trainer.ranks.world import World
from trainer.setup.build import build

ALONE = World(0, 0, 1, torch.device("cpu"))
ON_MASKS = ("ade20k", "cityscapes")


def dry(recipe: str, stage: str, small: Path, run: Path) -> list[str]:
    train, val = ("masked", "masked_val") if recipe in ON_MASKS else ("train", "val")
    given = ["--stage", stage, "--config", recipe, "--dry_run", "--teacher.pretrained", "false", "--run", str(run)]
    given += ["--data.train", str(small / f"{train}.beton"), "--data.val", str(small / f"{val}.beton")]
    return [*given, "--train.batch_size", "4", *(["--teacher.name", "vit_tiny_patch16_224"] if recipe == "own" else [])]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_builds_dry(recipe: str, small: Path, tmp_path: Path) -> None:
    for stage in ("3",) if recipe == "digits_teacher" else ("2", "3"):
        settings = parse(dry(recipe, stage, small, tmp_path))
        job = build(settings, ALONE)
        assert job.export["attention"]["linear_blocks"] == ([] if recipe == "digits_teacher" else list(
            range(len(getattr(job.stage.student, "backbone", job.stage.student).blocks))
        ))  # fmt: skip
        name = settings.teacher.name
        assert settings.teacher.weights or "." not in name or timm.get_pretrained_cfg(name).has_weights
    assert not list(tmp_path.iterdir())


def test_without_weights_it_runs_dry_alone(small: Path, tmp_path: Path) -> None:
    given = [option for option in dry("own", "2", small, tmp_path) if option != "--dry_run"]
    with pytest.raises(UserError, match=r"teacher\.pretrained false: stage 2 aligns with .* --teacher\.weights FILE"):
        build(parse([*given, "--teacher.kwargs", "{depth: 1}", "--data.image_size", "32"]), ALONE)


@pytest.mark.parametrize(("recipe", "stage"), [("siglip2", "2"), ("dinov3", "3")])
def test_it_says_what_would_run(recipe: str, stage: str, small: Path, tmp_path: Path, capsys) -> None:
    assert main(dry(recipe, stage, small, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "FLOPs per step" in said and "memory per rank" in said and "the teacher's copied weights" in said
