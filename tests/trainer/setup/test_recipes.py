"""All shipped recipes run dry, without weights."""

import json
from pathlib import Path

import pytest
import timm
import torch

from trainer.config import RECIPES, UserError, parse
from trainer.engine.engine import accumulation
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
        if not settings.teacher.kwargs:
            settings.teacher.kwargs = {"depth": 4}  # time; the name still says which weights there are
        job = build(settings, ALONE)
        assert job.export["attention"]["linear_blocks"] == ([] if recipe == "digits_teacher" else list(
            range(len(getattr(job.stage.student, "backbone", job.stage.student).blocks))
        ))  # fmt: skip
        name = settings.teacher.name
        assert settings.teacher.weights or "." not in name or timm.get_pretrained_cfg(name).has_weights
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_for_gpus_say_what_one_holds(recipe: str) -> None:
    """And one, two and eight can share the batch, in micro-batches whose images pair for mixup."""
    for stage in ("3",) if recipe == "digits_teacher" else ("1", "2", "3"):
        settings = parse(["--config", recipe, "--stage", stage])
        if settings.deepspeed.endswith("zero1.json"):
            continue  # small models, on CPUs too
        micro, size = settings.train.micro_batch_size, settings.train.batch_size
        for ranks in (1, 2, 8):
            assert micro is not None and size // ranks // accumulation(settings, ranks) in (micro, size // ranks)
            assert size // ranks % 2 == 0


def test_a_checkpoint_of_transformers_is_a_teacher(small: Path, tmp_path: Path) -> None:
    """Its export says what timm builds, and not where on this disk the checkpoint lies."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    given = [option for option in dry("own", "2", small, tmp_path) if option not in ("vit_tiny_patch16_224", "false")]
    at = given.index("--teacher.pretrained")
    given[at : at + 1] = []
    given.insert(given.index("--teacher.name") + 1, f"hf:{tmp_path / 'tower'}")
    job = build(parse(given), ALONE)
    assert job.export["backbone"]["name"] == "vit_base_patch16_clip_quickgelu_224"
    assert job.export["backbone"]["kwargs"]["depth"] == 2 and job.export["input"]["image_size"] == 32
    assert job.export["lineage"]["teacher"]["name"] == "hf:tower" and str(tmp_path) not in json.dumps(job.export)
    assert job.steps_per_epoch == 24


def test_without_weights_it_runs_dry_alone(small: Path, tmp_path: Path) -> None:
    given = [option for option in dry("own", "2", small, tmp_path) if option != "--dry_run"]
    with pytest.raises(UserError, match=r"teacher\.pretrained false: stage 2 aligns with .* --teacher\.weights FILE"):
        build(parse([*given, "--teacher.kwargs", "{depth: 1}", "--data.image_size", "32"]), ALONE)


@pytest.mark.parametrize(("recipe", "stage"), [("siglip2", "2"), ("dinov3", "3")])
def test_it_says_what_would_run(recipe: str, stage: str, small: Path, tmp_path: Path, capsys) -> None:
    assert main([*dry(recipe, stage, small, tmp_path), "--teacher.kwargs", "{depth: 2}"]) == 0
    said = capsys.readouterr().out
    assert "FLOPs per step" in said and "memory per rank" in said and "the teacher's copied weights" in said
