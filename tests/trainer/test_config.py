"""Settings: recipes, the command line, what may change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ENVIRONMENT, ROOT
from tools.write_settings import page
from trainer.config import RECIPES, Settings, UserError, as_dict, explained, first_difference, names, parse, run_recipe
from trainer.main import main
from trainer.output.folder import StageFolder
from trainer.stages import STAGES


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
    without, given = ({"student": {"operator_kwargs": kwargs}} for kwargs in ({}, {"power": 2}))
    for one, other in ((without, given), (given, without)):
        assert "student.operator_kwargs was" in first_difference(one, other)


def test_keywords_typed_for_a_run_are_those_of_its_later_stages(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "student: {operator: pooled, operator_kwargs: {cells: 16}}\nteacher: {name: a, kwargs: {depth: 2}}\n"
    )
    for i, kwargs in enumerate(({"window": 5}, {})):
        run = tmp_path / f"run{i}"
        options = ["--config", str(recipe), "--run", str(run), "--student.operator_kwargs", json.dumps(kwargs)]
        first = parse(["--stage", "1", *options, "--teacher.kwargs", '{"num_heads": 2}'])
        run.mkdir()
        (run / "recipe.yaml").write_text(run_recipe(first))
        later = parse(["--stage", "2", "--run", str(run)])
        assert (first.student, first.teacher) == (later.student, later.teacher)
        assert later.student.operator_kwargs == kwargs and later.teacher.kwargs == {"num_heads": 2}


def test_a_wrong_entry_of_a_list_is_one_plain_line() -> None:
    for option, value in (
        ("stage2.blocks", "[-1]"),
        ("student.keep_softmax", "[auto:2]"),
        ("student.keep_softmax", "[1.5]"),
    ):
        said = refused("--stage", "2", f"--{option}", value)
        assert said.startswith(f"{option} [") and "must be a list" in said and "pydantic" not in said


def test_settings_that_would_reach_nothing_are_refused() -> None:
    said = refused("--stage", "1", "--student.parent", "elsewhere")
    assert said.startswith("student.parent elsewhere: stage 1 starts from the teacher's weights")
    said = refused("--stage", "3", "--student.attention", "softmax", "--student.parent", "elsewhere")
    assert said.startswith("student.parent elsewhere: student.attention softmax starts")
    assert "without stage3.distill" in refused("--stage", "3", "--stage3.distill_weight", "0.9")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_parse(recipe: str) -> None:
    for stage in "123":
        if (recipe, stage) not in (("digits_teacher", "1"), ("digits_teacher", "2")):  # a stage-3 recipe
            assert Path(parse(["--config", recipe, "--stage", stage]).deepspeed).is_file()


def refused(*argv: str) -> str:
    """What a mistake on the command line is answered with."""
    with pytest.raises(UserError) as error:
        parse(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_teacher_takes_nothing_from_the_embedded_one(tmp_path: Path) -> None:
    settings = parse(["--stage", "2", "--teacher.name", "vit_small_patch14_dinov2.lvd142m"])
    assert (settings.teacher.kwargs, settings.teacher.weights, settings.data.train) == ({}, None, None)
    with_data = parse(["--stage", "2", "--config", "default", "--teacher.name=vit_small_patch16_224"])
    assert (with_data.teacher.kwargs, with_data.teacher.weights, with_data.data.train) == ({}, None, "digits")
    same = parse(["--stage", "2", "--config", "default", "--teacher.name", "vit_tiny_patch16_224"])
    assert same.teacher.kwargs and same.teacher.weights
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: {name: a, weights: w.pth}\nstages: {3: {teacher: {name: b}}}\n")
    assert parse(["--stage", "3", "--config", str(recipe)]).teacher.weights is None


@pytest.mark.parametrize("recipe", ["dinov2_imagenet", "cifar10", "ade20k", "own"])
def test_only_the_embedded_recipe_has_embedded_images(recipe: str, capsys: pytest.CaptureFixture) -> None:
    argv = ["--stage", "2", "--config", recipe, "--teacher.name", "vit_tiny_patch16_224", "--dry_run"]
    assert main(argv) == 2
    assert "data.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {lr: 0.5}\ndata: {image_size: 64}\ntrain: {steps: 7}\n", "line 3: train stands twice"),
        ("train:\n  lr: 0.5\n  steps: 3\n  lr: 0.25\n", "line 4: lr stands twice"),
        ("stages:\n  2: {train: {lr: 0.5}}\n  '2': {train: {steps: 3}}\n", "line 3: 2 stands twice"),
        ("teacher: {kwargs: {depth: 2, 'depth': 3}}\n", "depth stands twice"),
        ("a: &x {lr: 1}\n? [1]\n: 2\n", "not YAML"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    assert said in refused("--stage", "2", "--config", str(recipe))


def test_every_path_begins_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("deepspeed: ~/zero.json\nteacher: {weights: ~/w.pth}\n")
    argv = [
        "--stage",
        "3",
        "--config",
        "~/r.yaml",
        "--run",
        "~/run",
        "--data.train",
        "~/t.beton",
        "--data.val=~/v.beton",
    ]
    argv += ["--student.parent", "~/export", "--segmentation.beside", "~/other", "--probe.test", "snow=~/snow.beton"]
    settings = parse(argv)
    home = str(tmp_path)
    found = [settings.deepspeed, settings.teacher.weights, settings.run, settings.data.train, settings.data.val]
    found += [settings.student.parent, settings.segmentation.beside, settings.probe.test[0].partition("=")[2]]
    assert all(path.startswith(f"{home}/") for path in found), found


def test_none_means_without() -> None:
    for word in ("none", "None", "null"):
        settings = parse(["--stage", "3", "--data.val", word, "--teacher.weights", word, "--segmentation.beside", word])
        assert (settings.data.val, settings.teacher.weights, settings.segmentation.beside) == (None, None, None)
    assert parse(["--stage", "3", "--student.parent", "none"]).student.parent == "none"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("train.learning_rate", "train.lr"), ("lr", "train.lr"), ("batch_size", "train.batch_size"),
        ("train.batchsize", "train.batch_size"), ("teacher.model", "teacher"), ("data.workerz", "data.workers"),
        ("train.gradient_checkpointing", "train.grad_checkpointing"), ("stage3.mix_up", "stage3.mixup"),
    ],
)  # fmt: skip
def test_a_hint_names_the_setting_that_was_meant(asked: str, meant: str) -> None:
    assert f"did you mean {meant}" in refused("--stage", "2", f"--{asked}", "1")


def test_a_run_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    run = tmp_path / "own"
    begun = parse(
        ["--stage", "1", "--config", "cifar10", "--run", str(run), "--data.train", "t.beton", "--train.lr", "9"]
    )
    begun.teacher.weights = "w.pth"
    StageFolder(begun).claim(begun, rank=0)
    later = parse(["--stage", "3", "--run", str(run)])
    assert (later.data.train, later.teacher.weights) == ("t.beton", "w.pth")
    assert later.teacher.kwargs == begun.teacher.kwargs
    assert later.train.lr == parse(["--stage", "3", "--config", "cifar10"]).train.lr  # the stage's own
    (run / "stage1/checkpoints/step-00000001").mkdir(parents=True)
    assert parse(["--stage", "1", "--run", str(run)]).train.lr == 9
    assert parse(["--stage", "1", "--run", str(run), "--train.lr", "8"]).train.lr == 8
    assert parse(["--stage", "1", "--run", str(run), "--config", "default"]).data.train == "digits"
    assert parse(["--stage", "3", "--run", str(run)]).changed == ()
    said = parse(["--stage", "3", "--run", str(run), "--data.image_size", "64"]).changed
    assert said == ("data.image_size was 32, is now 64",)


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its config.yaml has settings of other names, and lacks younger ones."""
    stage = tmp_path / "run/stage2"
    (stage / "checkpoints/step-00000001").mkdir(parents=True)
    typed = ["--stage", "2", "--config", "default", "--run", str(tmp_path / "run")]
    kept = as_dict(parse([*typed, "--student.operator", "relu"]))
    for name in ("operator", "operator_kwargs", "additions"):
        del kept["student"][name]
    kept["student"]["feature_map"] = "relu"
    (stage / "config.yaml").write_text(yaml.safe_dump(kept))
    settings = parse(["--stage", "2", "--run", str(tmp_path / "run")])
    assert settings.student.operator == "relu"
    StageFolder(settings).check(settings)
    with pytest.raises(UserError, match=r"student\.operator was 'relu', is now 'elu1'"):
        StageFolder(settings).check(parse(typed))
    recipe = tmp_path / "old.yaml"
    recipe.write_text("student: {feature_map: relu}\nstages: {1: {student: {feature_map: elu1}}}\n")
    assert [parse(["--stage", s, "--config", str(recipe)]).student.operator for s in "12"] == ["elu1", "relu"]
    recipe.write_text("wandb: {enabled: false}\nstages: {1: {wandb: {enabled: true, project: mine}}}\n")
    found = [parse(["--stage", s, "--config", str(recipe)]) for s in "12"]
    assert [(s.tracking, s.wandb.project) for s in found] == [(["wandb"], "mine"), ([], "unsoftmax")]
    with pytest.raises(UserError, match=r"wandb\.enabled: its name is now tracking"):
        parse(["--stage", "1", "--wandb.enabled", "false"])


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs/settings.md").read_text() == page(), "python -m tools.write_settings"


def test_every_setting_is_explained_in_one_sentence() -> None:
    told = dict(explained(Settings))
    assert told.keys() == dict(names(Settings)).keys()
    for name, text in told.items():
        assert text.endswith(".") and "\n" not in text, f"{name}: {text!r}"


def test_help_and_mistakes_import_nothing_heavy() -> None:
    for argv, status in ((["--help"], 0), (["--stage", "1", "--train.lrr", "1"], 2), (["--stage", "7"], 2)):
        code = f"import sys, runpy; sys.argv = ['trainer/run.py', *{argv}]\n"
        code += "try: runpy.run_path('trainer/run.py', run_name='__main__')\n"
        code += "finally: print('heavy:', *{'torch', 'timm', 'ffcv'} & {*sys.modules})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == status and "heavy:\n" in done.stdout, done.stdout + done.stderr


def test_help_has_a_word_for_every_setting_and_names_the_stages(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    usage, described = said.split("\n\n")[:2]
    assert usage.count("\n") < 2  # not all settings a second time
    words = " ".join(described.split())
    assert all(f"{stage}, " in words for stage in (*STAGES, "all"))
    without = [name for name, text in explained(Settings) if not text.strip()]
    assert not without
    for name, _ in names(Settings):
        assert f"--{name} " in said or f"--{name}," in said, name
