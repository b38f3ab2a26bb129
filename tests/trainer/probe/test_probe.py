"""The probe stage: the solver against scikit-learn's optimum, ranks, resume, what it says, and bad input."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

import data
import models
from data.write import write
from tests.conftest import ARCHITECTURE, ROOT, Blobs, run_trainer, zygote
from tests.support.zygote import Run
from trainer.config import UserError, parse
from trainer.main import main
from trainer.output.folder import StageFolder
from trainer.output.intervals import wilson
from trainer.probe.images import share_out
from trainer.probe.plan import first_difference, make_plan
from trainer.probe.report import paired
from trainer.probe.solve import logistic, ridge, statistics
from trainer.probe.stage import check

PENALTIES = [0.01, 1.0, 10.0]


@pytest.fixture(scope="module")
def hard() -> tuple[torch.Tensor, torch.Tensor]:
    """Features [2, 600, 24] fp64 of very different spreads, correlated, far from zero, one constant; labels [600]."""
    torch.manual_seed(0)
    y = torch.randint(0, 5, (600,))
    spread = torch.randn(2, 24, 24, dtype=torch.float64) * torch.logspace(0, -2, 24, dtype=torch.float64)
    centres = torch.randn(2, 5, 24, dtype=torch.float64)
    x = (torch.randn(2, 600, 24, dtype=torch.float64) + 0.7 * centres[:, y]) @ spread + 5 * torch.randn(
        2, 1, 24
    ).double()
    x[1, :, 3] = 0
    return x, y


def blocks_of(x: torch.Tensor, y: torch.Tensor, rows: int = 250):
    return lambda: ((x[:, i : i + rows], y[i : i + rows]) for i in range(0, len(y), rows))


def test_logistic_regression_finds_scikit_learns_optimum(hard) -> None:
    x, y = hard
    stats = statistics(blocks_of(x, y), 5)
    z = stats.standardise(x)
    probes = logistic(blocks_of(z, y), stats, PENALTIES, tolerance=1e-15)
    assert probes.gap_MP.max() <= 1e-15
    for m in range(2):
        wanted = make_pipeline(Normalizer(), StandardScaler()).fit_transform(x[m].numpy())
        np.testing.assert_allclose(z[m].numpy(), wanted, atol=1e-11)
        for p, penalty in enumerate(PENALTIES):
            theirs = LogisticRegression(C=penalty, tol=1e-8, max_iter=100_000).fit(wanted, y.numpy())
            np.testing.assert_allclose(probes.weight_MPKD[m, p].numpy(), theirs.coef_, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(probes.bias_MPK[m, p].numpy(), theirs.intercept_, rtol=1e-3, atol=1e-4)
            assert objective(probes.weight_MPKD[m, p], probes.bias_MPK[m, p], z[m], y, penalty) <= 1e-9 + objective(
                torch.tensor(theirs.coef_), torch.tensor(theirs.intercept_), z[m], y, penalty
            )
            said = probes.predict(z)[m, p].numpy()
            assert (said == theirs.predict(wanted)).mean() > 0.999


def objective(weight, bias, x, y, penalty) -> float:
    """In nats an image."""
    loss = torch.nn.functional.cross_entropy(x @ weight.mT + bias, y)
    return (loss + 0.5 * weight.square().sum() / (penalty * len(y))).item()


def test_logistic_regression_in_fp32_at_the_default_tolerance(hard) -> None:
    x, y = hard
    stats = statistics(blocks_of(x.float(), y), 5)
    z = stats.standardise(x.float())
    exact_stats = statistics(blocks_of(x, y), 5)
    exact = logistic(blocks_of(exact_stats.standardise(x), y), exact_stats, PENALTIES, tolerance=1e-15)
    probes = logistic(blocks_of(z, y), stats, PENALTIES)
    for m in range(2):
        for p, penalty in enumerate(PENALTIES):
            least = objective(exact.weight_MPKD[m, p], exact.bias_MPK[m, p], exact_stats.standardise(x)[m], y, penalty)
            mine = objective(
                probes.weight_MPKD[m, p].double(), probes.bias_MPK[m, p].double(), z[m].double(), y, penalty
            )
            assert mine <= least + 2e-3


def test_ridge_is_scikit_learns(hard) -> None:
    x, y = hard
    stats = statistics(blocks_of(x, y), 5)
    probes, hot = ridge(stats, PENALTIES), torch.nn.functional.one_hot(y, 5).numpy()
    for m in range(2):
        for p, penalty in enumerate(PENALTIES):
            theirs = Ridge(alpha=1 / penalty).fit(stats.standardise(x)[m].numpy(), hot)
            np.testing.assert_allclose(probes.weight_MPKD[m, p].numpy(), theirs.coef_, atol=1e-9)
            np.testing.assert_allclose(probes.bias_MPK[m, p].numpy(), theirs.intercept_, atol=1e-9)


def test_intervals() -> None:
    low, high = wilson(80, 100)  # Wilson's for 80 of 100, e.g. statsmodels' proportion_confint
    assert (low, high) == (pytest.approx(71.11, abs=0.01), pytest.approx(86.66, abs=0.01))
    right, other = np.array([1, 1, 1, 0] * 25, bool), np.array([1, 0, 1, 0] * 25, bool)
    gain, half = paired(right, other)
    assert gain == pytest.approx(25) and half == pytest.approx(1.96 * 100 * (0.25 * 0.75 / 100) ** 0.5, rel=1e-4)


OPTIONS = ("--probe.batch_size", "8", "--probe.validation", "0.25", "--probe.keep_features", "true")


@pytest.fixture(scope="module")
def shifted(small: Path) -> Path:
    """A second test set, of other images."""
    path = small / "shifted.beton"
    write(Blobs(30, 7), path, raw_share=1.0, progress=False)
    return path


@pytest.fixture(scope="module")
def alone(small: Path, shifted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe of teacher and copied weights, on one rank: its folder."""
    done = run_trainer(small, tmp_path_factory.mktemp("probe"), "probe", *OPTIONS, "--probe.test", f"shifted={shifted}")
    assert done.code == 0, done.err
    (done.folder / "said").write_text(done.out + done.err)
    return done.folder


def test_what_it_leaves(alone: Path) -> None:
    results = json.loads((alone / "results.json").read_text())
    rows = results["results"]
    seen = {(row["model"], row["block"], row["module"], row["pooling"]) for row in rows}
    modules = [(i, m) for i in range(2) for m in models.BLOCK_MODULES] + [(None, "norm")]
    wanted = {(model, *place, pool) for model in ("teacher", "student") for place in modules
              for pool in ("mean", "prefix", "both")}  # fmt: skip
    wanted |= {(model, None, "patch_embed", "mean") for model in ("teacher", "student")}
    assert seen == wanted
    for place in wanted:  # every penalty on the validation images, the chosen one on each test set
        own = [row for row in rows if (row["model"], row["block"], row["module"], row["pooling"]) == place]
        tried = {row["penalty"]: row["top1"] for row in own if row["data"] == "validation"}
        assert list(tried) == [0.01, 0.1, 1.0]
        best = min(penalty for penalty in tried if tried[penalty] == max(tried.values()))
        tests = {row["data"]: row for row in own if row["data"] != "validation"}
        assert list(tests) == ["val", "shifted"] and {row["penalty"] for row in tests.values()} == {best}
        assert {name: row["images"] for name, row in tests.items()} == {"val": 22, "shifted": 30}
        assert all(row["low"] - 1e-9 <= row["top1"] <= row["high"] + 1e-9 for row in own)
    with (alone / "results.csv").open() as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [row["top1"] for row in rows]
    for name in ("depth", "heatmap_val", "heatmap_shifted"):
        assert (alone / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["advice"]) == 3 and "over the last layer" in results["advice"][0]
    assert results["advice"][0] in (alone / "said").read_text()


def test_its_features_are_the_models_on_centre_views_and_its_probes_say_what_it_reports(
    small: Path, alone: Path
) -> None:
    """By hand: the teacher's final norm, both poolings joined, judged with the probe that was kept."""
    teacher = models.build_backbone(
        "vit_tiny_patch16_224", ARCHITECTURE, small / "teacher.safetensors", image_size=32
    )  # fp32
    loader = data.eval_loader(small / "val.beton", image_size=32, batch_size=22, mean=[0.5] * 3, std=[0.5] * 3)
    (batch,) = loader.epoch()
    with torch.no_grad():
        tokens = teacher.forward_features(batch["image"])
    with safe_open(alone / "features/val/00000000.safetensors", "pt") as chunk:
        torch.testing.assert_close(chunk.get_tensor("teacher.norm.mean"), tokens.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chunk.get_tensor("teacher.norm.prefix"), tokens[:, 0], rtol=1e-4, atol=1e-5)
        assert torch.equal(chunk.get_tensor("label"), batch["label"])
    with safe_open(alone / "probes/teacher.norm.both.safetensors", "pt") as probe:
        mean, std, weight, bias = (probe.get_tensor(name) for name in ("mean", "std", "weight", "bias"))
    x = torch.nn.functional.normalize(torch.cat([tokens[:, 0], tokens.mean(1)], 1), dim=1)
    top1 = 100 * (((x - mean) / std @ weight.T + bias).argmax(1) == batch["label"]).float().mean().item()
    rows = json.loads((alone / "results.json").read_text())["results"]
    (said,) = (row["top1"] for row in rows if (row["model"], row["module"], row["pooling"], row["data"])
               == ("teacher", "norm", "both", "val"))  # fmt: skip
    assert said == pytest.approx(top1)


def test_fit_and_validation_are_parts_of_the_training_images(alone: Path) -> None:
    plan = json.loads((alone / "plan.json").read_text())
    assert plan["split"] == {"fit": 72, "validation": 24, "val": 22, "shifted": 30}


def test_two_ranks_find_the_same(small: Path, shifted: Path, alone: Path, tmp_path: Path) -> None:
    done = run_trainer(small, tmp_path, "probe", *OPTIONS, "--probe.test", f"shifted={shifted}", ranks=2)
    assert done.code == 0, done.err
    assert contents(done.folder) == contents(alone)


def test_a_rotary_teacher_alone_and_beside_its_student_by_ridge(small: Path, tmp_path: Path) -> None:
    kwargs = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    teacher = ["--teacher.name", "eva02_tiny_patch14_224", "--teacher.kwargs", json.dumps(kwargs)]
    teacher += ["--teacher.weights", "null", "--teacher.pretrained", "false"]
    wanted = ["--probe.solver", "ridge", "--probe.pooling", "[both]", "--train.bf16", "true"]
    for probed in (["teacher"], ["teacher", "student"]):
        run, chosen = tmp_path / str(len(probed)), ["--probe.models", json.dumps(probed)]
        done = run_trainer(small, run, "probe", *teacher, *wanted, *chosen)
        assert done.code == 0, done.err
        rows = json.loads((done.folder / "results.json").read_text())["results"]
        modules = {"patch_embed", *models.BLOCK_MODULES, "norm"}
        assert {(row["model"], row["module"]) for row in rows} == {(m, module) for m in probed for module in modules}
        assert not (done.folder / "features").exists()


def contents(folder: Path) -> dict[str, bytes]:
    """All that the images and the models alone decide."""
    parts = [*folder.glob("features/*/*"), *folder.glob("probes/*"), folder / "results.csv", folder / "plan.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts}


def test_killed_and_stopped_it_goes_on(small: Path, shifted: Path, alone: Path, tmp_path: Path) -> None:
    """Some chunks and probes are there, one cut short, as a kill leaves them; then a signal; then to the end."""
    run = tmp_path / "run"
    shutil.copytree(alone, run / "probe")
    for name in ("results.json", "features/val/00000000.safetensors", "probes/teacher.norm.both.safetensors",
                 "probes/student.blocks.0.act.mean.safetensors"):  # fmt: skip
        (run / "probe" / name).unlink()
    whole = run / "probe/features/fit/00000000.safetensors"
    whole.write_bytes(whole.read_bytes()[:5000])
    kept = (run / "probe/features/validation/00000000.safetensors").stat().st_mtime_ns
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(run), *OPTIONS]
    stopped = Run(zygote(small / "train.beton"), [*argv, "--probe.test", f"shifted={shifted}"], tmp_path)
    while "feature vectors" not in stopped.text("err"):  # then it is at work
        assert stopped.poll() is None, stopped.text("err")
        time.sleep(0.01)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(120) == 75 and "run the same command again" in stopped.text("err")
    assert not (run / "probe/results.json").exists()
    done = run_trainer(small, run, "probe", *OPTIONS, "--probe.test", f"shifted={shifted}")
    assert done.code == 0, done.err
    assert contents(done.folder) == contents(alone)
    assert (run / "probe/features/validation/00000000.safetensors").stat().st_mtime_ns == kept


class Other(Blobs):
    classes = ("a", "b", "x", "d")


class Unlabelled(Blobs):
    def __getitem__(self, index: int) -> dict:
        return {"image": super().__getitem__(index)[0]}


class Five(Blobs):
    classes = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return super().__getitem__(index)[0], index % 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.train", "{bad}/unlabelled.beton"], ("data.train", "unlabelled.beton", "no labels")),
        (["--probe.test", "odd={bad}/unlabelled.beton"], ("probe.test odd", "no labels")),
        (["--probe.test", "odd={bad}/other.beton"], ("probe.test odd", "other classes", "class 2 is 'x', there 'c'")),
        (["--probe.test", "odd={bad}/five.beton"], ("probe.test odd", "labels up to 4", "4 classes")),
        (["--probe.test", "odd=/nope.beton"], ("/nope.beton", "no such file")),
        (["--probe.test", "val={small}/val.beton"], ("probe.test val=", "taken")),
        (["--probe.test", "{small}/val.beton"], ("probe.test", "NAME=FILE")),
        (["--data.val", "null"], ("data.val null", "--probe.test NAME=FILE")),
        (["--data.train", "null"], ("data.train", "--data.train FOLDER")),
        (["--probe.test", "train={small}/val.beton"], ("probe.test train=", "taken")),
        (["--probe.store_gib", "1e-6"], ("probe.store_gib 1e-06", "at least", "probe.dtype fp16")),
        (["--probe.store_gib", "1e-4", "--probe.images", "70"], ("probe.store_gib 0.0001", "at least")),
        (["--probe.modules", "[blocks.*.nope]"], ("blocks.*.nope", "unknown", "act")),
        (["--probe.modules", "[blocks.7.act]"], ("blocks.7.act", "blocks.<0..1")),
        (["--probe.modules", "[]"], ("probe.modules", "at least one")),
        (["--probe.penalties", "[1, 0]"], ("probe.penalties", "above 0")),
        (["--probe.validation", "0.001"], ("probe.validation 0.001", "0 to choose on", "96")),
        (["--probe.validation", "1"], ("probe.validation 1", "below 1")),
        (["--probe.models", "[pupil]"], ("probe.models", "teacher")),
        (["--student.parent", "/nope"], ("/nope", "no export")),
        (["--teacher.name", "resnet18", "--teacher.kwargs", "{}", "--teacher.weights", "null", "--teacher.pretrained",
          "false", "--data.image_size", "null"], ("ResNet", "vit_*")),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line(options, words, small: Path, bad: Path, tmp_path: Path, capsys) -> None:
    options = [option.replace("{bad}", str(bad)).replace("{small}", str(small)) for option in options]
    run = tmp_path / "run"
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(run), "--dry_run", *options]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert not [word for word in words if word not in said.err], said.err
    assert not run.exists()


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, images in {"other": Other(8, 0), "unlabelled": Unlabelled(8, 0), "five": Five(10, 0)}.items():
        write(images, folder / f"{name}.beton", raw_share=1.0, progress=False)
    return folder


def test_check_needs_no_models(small: Path, bad: Path) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--teacher.name", "no_such_vit"]
    check(parse(argv))
    for options, words in ((["--data.train", "null"], "data.train: which images"),
                           (["--data.val", f"{bad}/other.beton"], "data.val .*: class 2 is 'x', there 'c'"),
                           (["--probe.validation", "0.001"], "probe.validation")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check(parse([*argv, *options]))


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def test_no_room_for_the_features(small: Path, disk: Path, capsys) -> None:
    fill(disk)
    run = disk / "run"
    assert main(["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(run)]) == 2
    said = capsys.readouterr().err
    assert "the features need" in said and "0 B free" in said and "probe.dtype fp16" in said
    assert not run.exists()


def test_a_finished_probe_is_not_made_again_nor_mixed_with_another(small: Path, alone: Path, tmp_path: Path, capsys):
    shutil.copytree(alone, tmp_path / "run/probe")
    shutil.copy(small / "recipe.yaml", tmp_path / "recipe.yaml")
    shifted = small / "shifted.beton"
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(tmp_path / "run"), *OPTIONS]
    argv += ["--probe.test", f"shifted={shifted}"]
    assert main(argv) == 0
    assert "the probe is complete" in capsys.readouterr().out
    plan = json.loads((tmp_path / "run/probe/plan.json").read_text())
    plan["models"]["student"]["sha256"] = "0" * 64
    (tmp_path / "run/probe/plan.json").write_text(json.dumps(plan))
    assert main(argv) == 2
    assert "was made of others: models.student.sha256" in capsys.readouterr().err


def test_a_file_is_known_by_what_it_holds(small: Path, alone: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(alone, tmp_path / "run/probe")
    for name in ("train", "val", "shifted"):
        for suffix in (".beton", ".beton.json"):
            shutil.copy(small / f"{name}{suffix}", tmp_path / f"moved_{name}{suffix}")
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(tmp_path / "run"), *OPTIONS]
    moved = ["--data.train", f"{tmp_path}/moved_train.beton", "--data.val", f"{tmp_path}/moved_val.beton"]
    assert main([*argv, *moved, "--probe.test", f"shifted={tmp_path}/moved_shifted.beton"]) == 0
    assert main([*argv, *moved, "--probe.test", f"shifted={tmp_path}/moved_val.beton"]) == 2
    assert "was made of others: data.shifted.images was 30, is now 22" in capsys.readouterr().err


def test_what_must_stay_the_same() -> None:
    def record(**changed) -> dict:
        student = {"from": "a", "sha256": "1", "export": "2"} | changed.pop("student", {})
        val = {"path": "val", "images": 3, "sha256": "4", "digest": "5"} | changed.pop("val", {})
        whole = {"models": {"student": student}, "data": {"val": val}, "split": {"fit": 6}, "images_per_file": 7}
        return whole | changed

    same = ({"student": {"from": "b"}}, {"val": {"path": "b"}}, {"val": {"sha256": None, "path": "b"}})
    assert not [changed for changed in same if first_difference(record(), record(**changed))]
    others = {
        "models.student.export was '2', is now '0'": {"student": {"export": "0"}},
        "data.val.sha256 was '4', is now '0'": {"val": {"sha256": "0"}},
        "data.val.path was 'val', is now 'b'": {"val": {"sha256": None, "digest": None, "path": "b"}},
        "split.fit was 6, is now 5": {"split": {"fit": 5}},
        "images_per_file was 7, is now 8": {"images_per_file": 8},
    }
    assert {words: first_difference(record(), record(**changed)) for words, changed in others.items()} == {
        words: words for words in others
    }


def test_images_that_fit_in_the_store() -> None:
    imagenet = {"fit": 1_153_000, "validation": 128_000, "val": 50_000}
    assert share_out(imagenet, 2_000_000, False) == imagenet
    assert share_out(imagenet, 12_000, False) == {"fit": 6_000, "validation": 3_000, "val": 3_000}
    assert share_out(imagenet, 300_000, False) == {"fit": 150_000, "validation": 100_000, "val": 50_000}
    assert share_out(imagenet | {"validation": 10}, 12_000, False) == {"fit": 6_000, "validation": 10, "val": 5_990}
    assert share_out(imagenet | {"fit": 10_000}, 12_000, True) == {"fit": 10_000, "validation": 1_000, "val": 1_000}
    labels = np.repeat([2, 0, 1], [50, 3, 20])
    drawn = labels[data.balanced(labels, np.random.default_rng(0).random(73))]
    assert np.bincount(drawn[:9]).tolist() == [3, 3, 3] and np.bincount(drawn[:23]).tolist() == [3, 10, 10]
    assert np.bincount(drawn).tolist() == [3, 20, 50]


def test_a_part_is_read_where_all_do_not_fit(small: Path, disk: Path, capsys) -> None:
    """The disk is the limit. A run that goes on keeps its images although less is free."""
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(disk / "run")]
    assert main([*argv, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "all images need" in said and "of 22 (val); for all give --probe.store_gib 1," in said
    settings = parse(argv)
    folder = StageFolder(settings)
    plan = make_plan(settings, folder)
    assert all(plan.counts[name] <= whole for name, whole in {"fit": 86, "validation": 10, "val": 22}.items())
    assert sum(plan.counts.values()) < 118
    (folder.path / "features/fit").mkdir(parents=True)
    (folder.path / "features/fit/00000000.safetensors.part").touch()
    (folder.path / "plan.json").write_text(json.dumps(plan.record))
    fill(disk)
    again = make_plan(settings, folder)
    for name, split in plan.store.splits.items():
        assert len(split.indices) == plan.counts[name]
        assert np.array_equal(split.indices, again.store.splits[name].indices)


def test_dry_run_says_what_would_be_read(small: Path, tmp_path: Path, capsys) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(tmp_path / "run"), "--dry_run"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "the teacher's copied weights" in said and "104 feature vectors x 3 penalties" in said
    assert not (tmp_path / "run").exists()


def test_test_sets_are_gathered() -> None:
    argv = ["--stage", "probe", "--probe.test", "a=x", "b=y", "--train.seed", "1", "--probe.test", "c=z"]
    assert parse(argv).probe.test == ["a=x", "b=y", "c=z"]
    with pytest.raises(UserError, match=r"probe\.test"):
        parse(["--stage", "probe", "--probe.test", "a"])


@pytest.mark.parametrize("ranks", (1, 2))
def test_quick_probes_while_stage_2_trains(small: Path, tmp_path: Path, ranks: int, capsys) -> None:
    options = ["--probe.every", "3", "--train.lr", "0.02", "--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    done = run_trainer(small, tmp_path, 2, *options, ranks=ranks)
    assert done.code == 0, done.err
    lines = done.lines("val")
    assert [line["step"] for line in lines] == [0, 3, 6]
    taps = [f"blocks.{i}.{module}" for i in range(2) for module in ("act", "rc2")]
    names = [f"{model}.{tap}" for model in ("student", "teacher") for tap in taps]
    assert all({name for name in line if name.startswith(("student.", "teacher."))} == set(names) for line in lines)
    for name in names:
        values = [line[name] for line in lines]
        assert all(0 <= value <= 100 for value in values)
        assert (len(set(values)) == 1) if name.startswith("teacher") else True  # the teacher stays
    assert any(lines[0][name] != lines[-1][name] for name in names)  # the student does not
    # And the probe then takes the student from there.
    assert main(["--config", str(small / "recipe.yaml"), "--stage", "probe", "--run", str(tmp_path), "--dry_run"]) == 0
    assert "student: " + str(tmp_path / "stage2/export (after stage 2)") in capsys.readouterr().out


def test_quick_probes_mistakes(small: Path, bad: Path, tmp_path: Path, capsys) -> None:
    argv = [
        "--config",
        str(small / "recipe.yaml"),
        "--stage",
        "2",
        "--run",
        str(tmp_path / "run"),
        "--probe.every",
        "3",
    ]
    assert main([*argv, "--train.eval_every", "2"]) == 2
    assert "probe.every 3: must be a multiple of train.eval_every 2" in capsys.readouterr().err
    unlabelled = ["--data.train", str(bad / "unlabelled.beton"), "--train.batch_size", "8"]
    done = run_trainer(small, tmp_path / "run", 2, "--probe.every", "3", *unlabelled)
    assert "probe.every 3" in done.error and "no labels" in done.error
