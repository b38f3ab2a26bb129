"""The stages on real DeepSpeed ranks: what is trained, what is frozen, equal curves on 1 and 2 ranks, resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import models
from data.write import write
from tests.conftest import ROOT, Blobs, curve, forget_after, run_trainer
from trainer.engine.checkpoint import digest

STAGES = (1, 2, 3)
# fp32; ranks add up gradients and losses in another order.
SAME = {"rel": 2e-4, "abs": 1e-7}
OPTIONS = {
    1: [],
    2: ["--stage2.loss", "cosine_smooth_l1"],
    3: [
        "--stage3.layer_decay",
        "0.7",
        "--stage3.ema",
        "0.9",
        "--stage3.label_smoothing",
        "0.1",
        "--train.weight_decay",
        "0.05",
        "--stage3.mixup",
        "0.8",
        "--stage3.cutmix",
        "1.0",
        "--stage3.drop_path",
        "0.3",
    ],
}

SAVES = ["--train.save_every", "3", "--train.keep", "9"]


@pytest.fixture(scope="module")
def alone(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with stages 1, 2 and 3, one after the other, on one rank, each in a fresh process."""
    run = tmp_path_factory.mktemp("alone")
    for stage in STAGES:
        done = run_trainer(small, run, stage, *OPTIONS[stage], *SAVES, launcher=True)
        assert done.code == 0, done.err
    return run


def assert_same_curve(left: Path, right: Path) -> None:
    pairs = list(zip(curve(left), curve(right), strict=True))
    assert {line["split"] for line, _ in pairs} == {"train", "val"}
    for a, b in pairs:
        assert a == {k: pytest.approx(v, **SAME) if isinstance(v, float) else v for k, v in b.items()}


def assert_resumes_to_the_bit(small: Path, run: Path, stage: int, *options: str, ranks: int = 1) -> None:
    """Killed after step 3 and started again, a run ends with the same metrics, weights, moments and averages."""
    folder = run / f"stage{stage}"

    def end() -> tuple:
        manifest = json.loads((folder / "checkpoints/step-00000006/manifest.json").read_text())
        return curve(folder), manifest["files"], load_file(folder / "export/model.safetensors")

    lines, files, weights = end()
    forget_after(folder, 3)
    done = run_trainer(small, run, stage, *options, ranks=ranks)
    assert done.code == 0, done.err
    assert "from step 3" in done.err
    resumed_lines, resumed_files, resumed_weights = end()
    assert resumed_lines == lines
    assert resumed_files == files  # sizes and hashes
    assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("zero", (1, 2, 3))
def test_two_ranks_give_the_curve_of_one_and_resume(
    small: Path, alone: Path, tmp_path: Path, stage: int, zero: int
) -> None:
    options = [*OPTIONS[stage], *SAVES, "--deepspeed", str(ROOT / f"ds_configs/zero{zero}.json")]
    options += ["--train.micro_batch_size", "4"]  # two accumulated
    if stage > 1:
        options += ["--student.parent", str(alone / f"stage{stage - 1}" / "export")]
    done = run_trainer(small, tmp_path, stage, *options, ranks=2, launcher=stage == zero)
    assert done.code == 0, done.err
    assert_same_curve(done.folder, alone / f"stage{stage}")
    mine, theirs = (load_file(folder / "export/model.safetensors") for folder in (done.folder, alone / f"stage{stage}"))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4)
    assert_resumes_to_the_bit(small, tmp_path, stage, *options, ranks=2)


def test_accumulation_gives_the_same_curve(small: Path, alone: Path, tmp_path: Path) -> None:
    options = [*OPTIONS[3], "--student.parent", str(alone / "stage2/export"), "--train.micro_batch_size", "4"]
    done = run_trainer(small, tmp_path, 3, *options)
    assert done.code == 0, done.err
    assert_same_curve(done.folder, alone / "stage3")


def test_offload_to_the_host_gives_the_same_curve(small: Path, alone: Path, tmp_path: Path) -> None:
    options = [*OPTIONS[2], "--student.parent", str(alone / "stage1/export")]
    done = run_trainer(small, tmp_path, 2, *options, "--deepspeed", str(ROOT / "ds_configs/offload.json"))
    assert done.code == 0, done.err
    assert_same_curve(done.folder, alone / "stage2")


@pytest.mark.parametrize("stage", STAGES)
def test_resume_continues_to_the_bit(small: Path, alone: Path, tmp_path: Path, stage: int) -> None:
    shutil.copytree(alone, tmp_path / "run")
    assert_resumes_to_the_bit(small, tmp_path / "run", stage, *OPTIONS[stage], *SAVES)


def test_a_damaged_checkpoint_is_named_and_passed_over(small: Path, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    folder = tmp_path / "run/stage2"
    shutil.rmtree(folder / "export")
    victim = folder / "checkpoints/step-00000006/rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = run_trainer(small, tmp_path / "run", 2, *OPTIONS[2])
    assert done.code == 0, done.err
    assert f"{victim.name} is not what was written" in done.err
    assert "from step 3" in done.err


def test_each_stage_trains_what_it_says(small: Path, alone: Path) -> None:
    before = load_file(small / "teacher.safetensors")
    for stage in STAGES:
        after = load_file(alone / f"stage{stage}/export/model.safetensors")
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        if stage == 1:
            assert changed == {name for name in before if ".attn.qkv." in name}
        elif stage == 2:
            assert changed == {name for name in before if not name.startswith("head.")}
        else:
            assert changed == set(before)
        before = after


def test_the_teacher_is_in_no_checkpoint(small: Path, alone: Path) -> None:
    teacher = load_file(small / "teacher.safetensors")
    counts = {}
    for stage in STAGES:
        saved = load_file(alone / f"stage{stage}/checkpoints/step-00000003/rank-00000.safetensors")
        weights = {name.split(":student.")[1]: v for name, v in saved.items() if name.startswith("weight:")}
        assert len(saved) == (4 if stage == 3 else 3) * len(weights)  # two moments, and in stage 3 an average
        counts[stage] = sum(value.numel() for value in weights.values())
        assert not any(torch.equal(teacher[n].flatten(), v) for n, v in weights.items() if teacher[n].ndim > 1)
    qkv = sum(value.numel() for name, value in teacher.items() if ".attn.qkv." in name)
    everything = sum(value.numel() for value in teacher.values())
    head = sum(value.numel() for name, value in teacher.items() if name.startswith("head."))
    assert counts == {1: qkv, 2: everything - head, 3: everything}


def test_the_export_is_a_timm_model_with_its_lineage(small: Path, alone: Path) -> None:
    config = models.read_config(alone / "stage3/export")
    assert config["lineage"]["stages"] == ["1", "2", "3"]
    assert [entry["stage"] for entry in config["lineage"]["data"]] == ["1", "2", "3"]
    assert config["lineage"]["linear_blocks"] == [0, 1]
    model = models.load(alone / "stage3/export")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    # What was evaluated last is what was exported, the moving average.
    from data import eval_loader

    last = curve(alone / "stage3", "val")[-1]
    loader = eval_loader(
        small / "val.beton", image_size=32, batch_size=22, mean=config["input"]["mean"], std=config["input"]["std"]
    )
    (batch,) = loader.epoch()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"])
    assert loss.item() == pytest.approx(last["loss"], rel=1e-4)


def test_a_complete_stage_is_not_run_again(small: Path, alone: Path) -> None:
    done = run_trainer(small, alone, 2, *OPTIONS[2], *SAVES)
    assert done.code == 0
    assert "complete" in done.out


def test_softmax_baseline_and_fine_tuning_options(small: Path, tmp_path: Path) -> None:
    done = run_trainer(
        small, tmp_path, 3, "--student.attention", "softmax", "--stage3.mixup", "0.8", "--stage3.cutmix", "1.0",
        "--stage3.drop_path", "0.1", "--train.bf16", "true", "--train.grad_checkpointing", "true",
        "--train.eval_every", "3",
    )  # fmt: skip
    assert done.code == 0, done.err
    first, middle, last = done.lines("val")
    assert (first["step"], middle["step"], last["step"]) == (0, 3, 6)
    assert first["feature_cosine"] == pytest.approx(1, abs=1e-2)  # it starts as the teacher
    assert first["top1"] == first["teacher_top1"]
    assert models.linear_blocks(models.load(tmp_path / "stage3/export")) == []


def test_from_scratch_without_a_teacher(small: Path, tmp_path: Path) -> None:
    options = ["--teacher.weights", "null", "--teacher.pretrained", "false", "--student.attention", "softmax"]
    done = run_trainer(small, tmp_path, 3, *options)
    assert done.code == 0, done.err
    assert "random weights" in done.err
    assert "feature_cosine" not in done.lines("val")[-1]


@pytest.mark.parametrize("option", (("--stage1.match", "heads"), ("--train.compile", "true")))
def test_stage_1_before_the_projection_and_compiled(small: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    options = [*option, "--train.grad_checkpointing", "true", "--train.steps", "2"]
    # compiled code in a fresh process: autograd's threads and a fork's thread pool have met badly
    done = run_trainer(small, tmp_path, 1, *options, launcher="--train.compile" in option)
    assert done.code == 0, done.err
    assert done.lines("val")[-1]["loss"] < done.lines("val")[0]["loss"]


def test_wandb_goes_on_under_its_id(small: Path, tmp_path: Path) -> None:
    options = ["--tracking", "[wandb]", "--train.steps", "2", "--train.save_every", "1"]
    for _ in range(2):
        done = run_trainer(small, tmp_path, 2, *options)
        assert done.code == 0, done.err
        assert "warning: " not in done.err, done.err
        shutil.rmtree(done.folder / "export")
        shutil.rmtree(done.folder / "checkpoints/step-00000002")
    identity = (done.folder / "wandb_id").read_text().strip()
    assert len(list((done.folder / "wandb").glob(f"offline-run-*-{identity}"))) == 2


def test_a_run_that_stays_non_finite_stops_and_says_so(small: Path, tmp_path: Path) -> None:
    done = run_trainer(small, tmp_path, 2, "--train.lr", "1e30", "--train.steps", "20", "--train.max_skipped", "3")
    assert "3 steps in a row had a non-finite loss: step 2, rank 0, samples" in done.error
    skipped = [line for line in done.lines("train") if line["grad_norm"] is None]
    assert skipped and skipped[-1]["loss"] is None
    assert not (done.folder / "export").exists()


def test_unlabelled_images_and_another_image_size(small: Path, alone: Path, tmp_path: Path) -> None:
    class Unlabelled(Blobs):
        def __getitem__(self, index: int) -> np.ndarray:
            return super().__getitem__(index)[0]

    write(Unlabelled(32, 2), tmp_path / "train.beton", raw_share=1.0, progress=False)
    options = ["--data.train", str(tmp_path / "train.beton"), "--student.parent", str(alone / "stage1/export")]
    done = run_trainer(small, tmp_path, 2, *options, "--data.image_size", "48", "--train.steps", "2")
    assert done.code == 0, done.err
    last = done.lines("val")[-1]
    assert {"top1", "teacher_top1", "feature_cosine"} <= last.keys()
    assert models.load(done.folder / "export")(torch.zeros(1, 3, 48, 48)).shape == (1, 4)


def test_the_windowed_order_gives_one_curve_on_any_ranks(small: Path, alone: Path, tmp_path: Path) -> None:
    options = ["--data.order", "windowed", "--data.window", "4"]
    one, two = (run_trainer(small, tmp_path / str(n), 1, *options, ranks=n) for n in (1, 2))
    assert one.code == two.code == 0, one.err + two.err
    assert "train.beton: read in long runs, shuffled within 4 MiB" in one.err
    assert_same_curve(one.folder, two.folder)
    assert curve(one.folder) != curve(alone / "stage1")


def test_a_run_goes_on_in_the_order_it_began_with(small: Path, alone: Path, tmp_path: Path) -> None:
    """Whatever `data.order auto` would choose on the machine where it goes on."""
    shutil.copytree(alone / "stage1", tmp_path / "stage1")
    forget_after(tmp_path / "stage1", 3)
    path = tmp_path / "stage1/checkpoints/step-00000003/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["reading"]["order"] == "random" and manifest["settings"]["data"]["order"] == "auto"
    begun_with_less_memory = {"order": "windowed", "window": 4}
    del manifest["sha256"]
    manifest["reading"] = begun_with_less_memory
    path.write_text(json.dumps(manifest | {"sha256": digest(manifest)}))
    done = run_trainer(small, tmp_path, 1)
    assert done.code == 0, done.err
    assert "from step 3" in done.err and "shuffled within 4 MiB" in done.err
    last = json.loads((tmp_path / "stage1/checkpoints/step-00000006/manifest.json").read_text())
    assert last["reading"] == begun_with_less_memory
    assert curve(done.folder)[:4] == curve(alone / "stage1")[:4] and curve(done.folder) != curve(alone / "stage1")
