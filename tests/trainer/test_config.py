"""Settings: recipes, the command line, what may change."""

import os
from pathlib import Path

import pytest

from trainer.config import RECIPES, first_difference, parse


def test_a_recipes_stage_section_is_laid_over_the_rest_and_the_command_line_over_both(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {lr: 1.0, batch_size: 8}\nstages: {2: {train: {lr: 2.0}}}\n")
    lrs = [parse(["--config", str(recipe), "--stage", stage]).train.lr for stage in "123"]
    assert lrs == [1.0, 2.0, 1.0]
    settings = parse(["--config", str(recipe), "--stage", "2", "--train.lr", "3", "--local_rank=1"])
    assert (settings.train.lr, settings.train.batch_size, settings.run) == (3.0, 8, os.path.join("runs", "mine"))


def test_only_settings_that_change_what_is_learned_are_compared() -> None:
    before = {"train": {"lr": 1.0, "log_every": 1}, "teacher": {"kwargs": {"depth": 2}}}
    assert first_difference(before, {"train": {"lr": 1.0, "log_every": 5}, "teacher": {"kwargs": {"depth": 2}}}) is None
    assert "teacher.kwargs was {'depth': 2}" in first_difference(before, before | {"teacher": {"kwargs": {"depth": 3}}})


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_parse(recipe: str) -> None:
    for stage in "123":
        if (recipe, stage) not in (("digits_teacher", "1"), ("digits_teacher", "2")):  # a stage-3 recipe
            assert Path(parse(["--config", recipe, "--stage", stage]).deepspeed).is_file()
